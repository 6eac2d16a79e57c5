"""The private hook into discord.py: what it leans on, and what it makes of everything a gateway can send.

When an upgrade of discord.py turns this file red: read the new `DiscordWebSocket.received_message`, mend
`utils/mirror/discord/tap.py`, then write down the new version and digest here.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import weakref
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import discord
import orjson
import pytest
from discord import gateway, http, utils
from discord.gateway import DiscordWebSocket
from discord.shard import Shard
from hypothesis import given
from hypothesis import strategies as st

from utils.mirror.discord import tap
from utils.mirror.discord.tap import decode, install

VERSION = "2.7.1"
RECONNECT = "b4540433e4f8468c95525e1357158d083dda0325a4a34230d29a993f497d1924"
RECEIVED_MESSAGE = "62c9f5ec6596dfef517af14f3fd8c46fd5d68ccb8674893901dfd5944f463b94"
REPLACED = "\ufffd"


class Socket(DiscordWebSocket):
    """A gateway connection without a network."""

    def __init__(self, connection: object, *, session: str | None = "s", sequence: int | None = None) -> None:
        self._connection = connection  # type: ignore[assignment]
        self._decompressor = utils._ActiveDecompressionContext()
        self.session_id = session
        self.sequence = sequence
        self.shard_id = 3
        self.heard: list[tuple[str, Any]] = []
        self.ticks = 0
        self.alive = KeepAlive(self)
        self._keep_alive = self.alive  # type: ignore[assignment]
        self.closed = 0
        self._dispatch_listeners = []
        self._dispatch = lambda *arguments: None
        self._discord_parsers = Parsers(self)
        self.sent: list[Any] = []

    async def close(self, code: int = 4000) -> None:
        self.closed += 1

    def log_receive(self, data: Any, /) -> None:
        pass

    async def send_as_json(self, data: Any) -> None:
        self.sent.append(data)


class KeepAlive:
    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self.acknowledged = 0

    def tick(self) -> None:
        self._socket.ticks += 1

    def ack(self) -> None:
        self.acknowledged += 1

    def stop(self) -> None:
        pass


class Parsers(dict[str, Callable[[Any], None]]):
    """discord.py's parsers: they note what they are given; BROKEN raises, as several of the real ones do."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    def __missing__(self, event: str) -> Callable[[Any], None]:
        def parse(data: Any) -> None:
            if event.startswith("BROKEN"):
                raise KeyError("content")
            if event == "CLOSING":
                raise discord.ConnectionClosed(FakeClose(), shard_id=3)  # type: ignore[arg-type]
            self._socket.heard.append((event, data))

        return parse


class FakeClose:
    close_code = 4004


class Receiver:
    """Notes what it is shown, and keeps `KEPT` from discord.py."""

    def __init__(self) -> None:
        self.received: list[tuple[str, Any, int, str]] = []
        self.bad: list[tuple[str, Exception]] = []
        self.waited = 0
        self.is_full = False

    def receive(self, event: str, data: Any, shard_id: int, session: str) -> bool:
        self.received.append((event, data, shard_id, session))
        return event == "KEPT"

    def report_malformed(self, event: str, error: Exception) -> None:
        self.bad.append((event, error))

    def backpressure(self) -> Awaitable[None] | None:
        return self._wait() if self.is_full else None

    async def _wait(self) -> None:
        self.waited += 1

    @property
    def events(self) -> list[str]:
        return [event for event, *_ in self.received]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    original, from_json = DiscordWebSocket.received_message, utils._from_json
    yield Receiver()
    DiscordWebSocket.received_message = original  # type: ignore[method-assign]
    utils._from_json = from_json


@pytest.fixture
def socket(receiver: Receiver) -> Socket:
    client = discord.Client(intents=discord.Intents.none())
    install(client, receiver)
    return Socket(client._connection)


def event(name: str, sequence: int | None, data: Any = None) -> str:
    return orjson.dumps({"op": 0, "t": name, "s": sequence, "d": data}).decode()


def test_discord_py_is_the_one_that_the_hook_was_written_against() -> None:
    assert discord.__version__ == VERSION, "read received_message anew before the pin is moved"
    pinned = Path(__file__).parents[3] / "pyproject.toml"
    assert f'"discord.py[speed]=={VERSION}"' in pinned.read_text()
    assert f"discord.py {VERSION}" in str(tap.__doc__)


def test_the_method_that_is_replaced_has_not_changed_by_a_letter() -> None:
    source = inspect.getsource(tap._original_received_message)
    assert hashlib.sha256(source.encode()).hexdigest() == RECEIVED_MESSAGE
    reconnecting = inspect.getsource(Shard.reidentify) + inspect.getsource(tap._original_reconnect)
    assert hashlib.sha256(reconnecting.encode()).hexdigest() == RECONNECT
    assert tap._original_received_message.__module__ == "discord.gateway"
    assert list(inspect.signature(tap._original_received_message).parameters) == ["self", "msg"]
    assert inspect.iscoroutinefunction(tap._original_received_message)


def test_what_the_hook_leans_on_is_there() -> None:
    connecting = inspect.getsource(DiscordWebSocket.from_client)
    for name in ("session_id", "sequence", "shard_id", "_connection"):
        assert f"ws.{name} = " in connecting
    made = inspect.getsource(DiscordWebSocket.__init__)
    for name in ("_keep_alive", "_decompressor", "sequence", "session_id"):
        assert f"self.{name}" in made
    assert len(inspect.signature(utils._from_json).parameters) == 1
    assert "utils._from_json(" in inspect.getsource(http.json_or_text)
    assert "self.received_message(" in inspect.getsource(DiscordWebSocket.poll_event)
    assert discord.Client(intents=discord.Intents.none())._connection is not None


async def test_a_dispatch_is_shown_first_and_then_goes_its_way(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("GUILD_UPDATE", 1, {"id": "5"}))
    assert receiver.received == [("GUILD_UPDATE", {"id": "5"}, 3, "s")]
    assert socket.heard == [("GUILD_UPDATE", {"id": "5"})]
    assert (socket.sequence, socket.ticks) == (1, 1)


async def test_what_the_receiver_keeps_still_counts_for_the_connection(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("KEPT", 7, {}))
    assert receiver.events == ["KEPT"]
    assert socket.heard == []
    assert (socket.sequence, socket.ticks) == (7, 1)


async def test_a_payload_cut_into_pieces_and_compressed_is_put_together(socket: Socket, receiver: Receiver) -> None:
    packer = zlib.compressobj()
    packed = packer.compress(event("GUILD_UPDATE", 1, {"id": "5"}).encode()) + packer.flush(zlib.Z_SYNC_FLUSH)
    socket._decompressor = ZlibContext()
    await socket.received_message(packed[:9])
    assert receiver.received == []
    await socket.received_message(packed[9:])
    assert receiver.events == ["GUILD_UPDATE"]


class ZlibContext:
    """Zlib-stream, as the gateway's documentation has it: a payload ends with a sync flush."""

    COMPRESSION_TYPE = "zlib-stream"

    def __init__(self) -> None:
        self._context = zlib.decompressobj()
        self._parts = b""

    def decompress(self, data: bytes, /) -> str | None:
        self._parts += data
        if not data.endswith(b"\x00\x00\xff\xff"):
            return None
        parts, self._parts = self._parts, b""
        return self._context.decompress(parts).decode()


async def test_other_opcodes_are_discord_pys_own_affair(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message('{"op": 11, "d": null}')
    assert receiver.received == []
    assert socket.alive.acknowledged == 1
    with pytest.raises(gateway.ReconnectWebSocket):
        await socket.received_message('{"op": 9, "d": true}')
    assert socket.closed == 1


@pytest.mark.parametrize(
    "text", ["", "{", "nothing", "[1]", "7", "null", '"text"', '{"op": 0, "t": "X", "s": 1, "d": "\x00"}', "\ud800"]
)
async def test_what_is_no_payload_costs_itself_alone(socket: Socket, receiver: Receiver, text: str) -> None:
    await socket.received_message(text)
    assert [name for name, _ in receiver.bad] == ["unreadable"]
    await socket.received_message(event("GUILD_UPDATE", 1))
    assert receiver.events == ["GUILD_UPDATE"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"op": 0, "t": "READY", "s": 1, "d": {}}'),
        pytest.param('{"op": 0, "t": "READY", "s": 1, "d": null}'),
        pytest.param('{"op": 0, "t": "X", "s": "one", "d": {}}'),
        pytest.param('{"op": 0, "t": "KEPT", "d": {}}'),
        '{"op": 0, "t": ["X"], "s": 2, "d": {}}',
        '{"op": 0, "t": {}, "s": 2, "d": {}}',
        '{"op": 0}',
    ],
)
async def test_a_dispatch_of_the_wrong_shape_costs_itself_alone(socket: Socket, receiver: Receiver, text: str) -> None:
    await socket.received_message(text)
    await socket.received_message(event("GUILD_UPDATE", 100))
    assert receiver.events[-1] == "GUILD_UPDATE"


async def test_a_parser_that_raises_costs_that_payload_alone(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("BROKEN_MESSAGE_UPDATE", 1, {}))
    assert [(name, type(error)) for name, error in receiver.bad] == [("BROKEN_MESSAGE_UPDATE", KeyError)]
    await socket.received_message(event("GUILD_UPDATE", 2))
    assert [name for name, _ in socket.heard] == ["GUILD_UPDATE"]
    assert socket.sequence == 2


async def test_the_connections_own_errors_pass_through(socket: Socket) -> None:
    with pytest.raises(discord.ConnectionClosed):
        await socket.received_message(event("CLOSING", 1))


async def test_an_event_sent_twice_is_taken_once(socket: Socket, receiver: Receiver) -> None:
    for sequence in (1, 2, 2, 1, 3, 3):
        await socket.received_message(event(f"E{sequence}", sequence))
    assert receiver.events == ["E1", "E2", "E3"] == [name for name, _ in socket.heard]


async def test_a_resumed_session_goes_on_from_its_sequence_on_a_new_connection(receiver: Receiver) -> None:
    client = discord.Client(intents=discord.Intents.none())
    install(client, receiver)
    resumed = Socket(client._connection, session="s", sequence=5)
    for sequence in (4, 5, 6, 7):
        await resumed.received_message(event(f"E{sequence}", sequence))
    await resumed.received_message(event("RESUMED", 8, {}))
    await resumed.received_message(event("E9", 9))
    assert receiver.events == ["E6", "E7", "RESUMED", "E9"]


async def test_a_new_session_counts_from_one_again(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("E40", 40))
    ready = {"session_id": "new", "resume_gateway_url": "wss://gateway.example"}
    await socket.received_message(event("READY", 1, ready))
    await socket.received_message(event("E2", 2))
    assert receiver.events == ["E40", "READY", "E2"]
    assert [session for *_, session in receiver.received] == ["s", "new", "new"]
    assert socket.session_id == "new"


async def test_the_next_message_waits_for_room(socket: Socket, receiver: Receiver) -> None:
    receiver.is_full = True
    await socket.received_message(event("A", 1))
    await socket.received_message(event("KEPT", 2))
    assert receiver.waited == 2


async def test_a_client_without_a_receiver_behaves_as_ever(socket: Socket, receiver: Receiver) -> None:
    other = Socket(discord.Client(intents=discord.Intents.none())._connection)
    await other.received_message(event("GUILD_UPDATE", 1, {"id": "5"}))
    await other.received_message(event("GUILD_UPDATE", 1, {"id": "5"}))
    assert other.heard == [("GUILD_UPDATE", {"id": "5"})] * 2
    with pytest.raises(KeyError):
        await other.received_message(event("BROKEN", 2))
    assert receiver.received == []
    assert receiver.bad == []


def test_a_receiver_dies_with_its_client() -> None:
    assert isinstance(tap._receivers, weakref.WeakKeyDictionary)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": "b\\u0000c"}', {"a": f"b{REPLACED}c"}),
        ('{"a": "\\ud800"}', {"a": REPLACED}),
        ('{"a": "x\\udfff\\ud83e\\udd80"}', {"a": f"x{REPLACED}🦀"}),
        ('{"\\u0000": ["\\ud800", {"k": "\\u0000"}]}', {REPLACED: [REPLACED, {"k": REPLACED}]}),
        ('{"a": "\\\\u0000"}', {"a": "\\u0000"}),
        ('{"a": "\\ud83e\\udd80 漢字"}', {"a": "🦀 漢字"}),
    ],
)
@pytest.mark.parametrize("as_bytes", [True, False])
def test_text_that_postgres_cannot_store_is_made_storable(text: str, value: Any, as_bytes: bool) -> None:
    assert decode(text.encode() if as_bytes else text) == value


def test_what_is_decoded_already_passes_through() -> None:
    value = {"a": 1}
    assert decode(value) is value


@given(st.text(st.characters(), max_size=30))
def test_any_text_of_discords_is_storable_and_otherwise_as_it_was(text: str) -> None:
    (found,) = decode(json.dumps([text]))
    assert found.encode() is not None
    assert "\x00" not in found
    whole = json.loads(json.dumps([text]))[0]
    assert found == "".join(REPLACED if ch == "\x00" or "\ud800" <= ch <= "\udfff" else ch for ch in whole)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_json_are_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        decode(data)


def test_payloads_nested_beyond_all_bounds_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="too deeply"):
        decode("[" * 100_000)

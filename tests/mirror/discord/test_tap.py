"""The gateway tap: what it passes on, drops and reports of everything that a gateway can send."""

from __future__ import annotations

import gc
import json
import weakref
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import discord
import orjson
import pytest
from discord import gateway, utils
from discord.gateway import DiscordWebSocket
from hypothesis import given
from hypothesis import strategies as st

from utils.mirror.discord.tap import decode, install

REPLACED = "\ufffd"


class Socket(DiscordWebSocket):
    """A gateway connection without a network."""

    def __init__(self, connection: object, *, session: str | None = "s", sequence: int | None = None) -> None:
        self._connection = connection  # type: ignore[assignment]
        self._decompressor = utils._ActiveDecompressionContext()
        self.session_id = session
        self.sequence = sequence
        self.shard_id = 3
        self.parsed: list[tuple[str, Any]] = []
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
    """discord.py's parsers: they record their payloads; BROKEN raises, as several of the real ones do."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    def __missing__(self, event: str) -> Callable[[Any], None]:
        def parse(data: Any) -> None:
            if event.startswith("BROKEN"):
                raise KeyError("content")
            if event == "CLOSING":
                raise discord.ConnectionClosed(FakeClose(), shard_id=3)  # type: ignore[arg-type]
            self._socket.parsed.append((event, data))

        return parse


class FakeClose:
    close_code = 4004


class Receiver:
    """Records what it receives, and takes `TAKEN` from discord.py."""

    def __init__(self) -> None:
        self.received: list[tuple[str, Any, int, str]] = []
        self.malformed: list[tuple[str, Exception]] = []
        self.waited = 0
        self.is_full = False

    def receive(self, event: str, data: Any, shard_id: int, session: str) -> bool:
        self.received.append((event, data, shard_id, session))
        return event == "TAKEN"

    def report_unparsed(self, event: str, error: Exception) -> None:
        self.report_malformed(event, error)

    def report_malformed(self, event: str, error: Exception) -> None:
        self.malformed.append((event, error))

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


async def test_passes_a_dispatch_to_the_receiver_and_then_to_discord_py(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("GUILD_UPDATE", 1, {"id": "5"}))
    assert receiver.received == [("GUILD_UPDATE", {"id": "5"}, 3, "s")]
    assert socket.parsed == [("GUILD_UPDATE", {"id": "5"})]
    assert (socket.sequence, socket.ticks) == (1, 1)


async def test_a_taken_dispatch_advances_the_sequence(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("TAKEN", 7, {}))
    assert receiver.events == ["TAKEN"]
    assert socket.parsed == []
    assert (socket.sequence, socket.ticks) == (7, 1)


async def test_decompresses_a_payload_in_several_messages(socket: Socket, receiver: Receiver) -> None:
    packer = zlib.compressobj()
    packed = packer.compress(event("GUILD_UPDATE", 1, {"id": "5"}).encode()) + packer.flush(zlib.Z_SYNC_FLUSH)
    socket._decompressor = ZlibContext()
    await socket.received_message(packed[:9])
    assert receiver.received == []
    await socket.received_message(packed[9:])
    assert receiver.events == ["GUILD_UPDATE"]


class ZlibContext:
    """Zlib-stream (Discord's gateway documentation): a payload ends with a sync flush."""

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


async def test_leaves_other_opcodes_to_discord_py(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message('{"op": 11, "d": null}')
    assert receiver.received == []
    assert socket.alive.acknowledged == 1
    with pytest.raises(gateway.ReconnectWebSocket):
        await socket.received_message('{"op": 9, "d": true}')
    assert socket.closed == 1


@pytest.mark.parametrize(
    "text", ["", "{", "nothing", "[1]", "7", "null", '"text"', '{"op": 0, "t": "X", "s": 1, "d": "\x00"}', "\ud800"]
)
async def test_skips_unreadable_messages(socket: Socket, receiver: Receiver, text: str) -> None:
    await socket.received_message(text)
    assert [name for name, _ in receiver.malformed] == ["unreadable"]
    await socket.received_message(event("GUILD_UPDATE", 1))
    assert receiver.events == ["GUILD_UPDATE"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param('{"op": 0, "t": "READY", "s": 1, "d": {}}'),
        pytest.param('{"op": 0, "t": "READY", "s": 1, "d": null}'),
        pytest.param('{"op": 0, "t": "X", "s": "one", "d": {}}'),
        pytest.param('{"op": 0, "t": "TAKEN", "d": {}}'),
        '{"op": 0, "t": ["X"], "s": 2, "d": {}}',
        '{"op": 0, "t": {}, "s": 2, "d": {}}',
        '{"op": 0}',
    ],
)
async def test_skips_dispatches_without_an_envelope(socket: Socket, receiver: Receiver, text: str) -> None:
    await socket.received_message(text)
    await socket.received_message(event("GUILD_UPDATE", 100))
    assert receiver.events[-1] == "GUILD_UPDATE"


async def test_reports_a_payload_that_breaks_discord_pys_parser(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("BROKEN_MESSAGE_UPDATE", 1, {}))
    assert [(name, type(error)) for name, error in receiver.malformed] == [("BROKEN_MESSAGE_UPDATE", KeyError)]
    await socket.received_message(event("GUILD_UPDATE", 2))
    assert [name for name, _ in socket.parsed] == ["GUILD_UPDATE"]
    assert socket.sequence == 2


async def test_connection_errors_propagate(socket: Socket) -> None:
    with pytest.raises(discord.ConnectionClosed):
        await socket.received_message(event("CLOSING", 1))


async def test_drops_duplicate_dispatches(socket: Socket, receiver: Receiver) -> None:
    for sequence in (1, 2, 2, 1, 3, 3):
        await socket.received_message(event(f"E{sequence}", sequence))
    assert receiver.events == ["E1", "E2", "E3"] == [name for name, _ in socket.parsed]


async def test_a_resumed_session_continues_its_sequence(receiver: Receiver) -> None:
    client = discord.Client(intents=discord.Intents.none())
    install(client, receiver)
    resumed = Socket(client._connection, session="s", sequence=5)
    for sequence in (4, 5, 6, 7):
        await resumed.received_message(event(f"E{sequence}", sequence))
    await resumed.received_message(event("RESUMED", 8, {}))
    await resumed.received_message(event("E9", 9))
    assert receiver.events == ["E6", "E7", "RESUMED", "E9"]


async def test_a_new_session_restarts_the_sequence(socket: Socket, receiver: Receiver) -> None:
    await socket.received_message(event("E40", 40))
    ready = {"session_id": "new", "resume_gateway_url": "wss://gateway.example"}
    await socket.received_message(event("READY", 1, ready))
    await socket.received_message(event("E2", 2))
    assert receiver.events == ["E40", "READY", "E2"]
    assert [session for *_, session in receiver.received] == ["s", "new", "new"]
    assert socket.session_id == "new"


async def test_waits_for_backpressure(socket: Socket, receiver: Receiver) -> None:
    receiver.is_full = True
    await socket.received_message(event("A", 1))
    await socket.received_message(event("TAKEN", 2))
    assert receiver.waited == 2


async def test_ignores_clients_without_a_receiver(socket: Socket, receiver: Receiver) -> None:
    other = Socket(discord.Client(intents=discord.Intents.none())._connection)
    await other.received_message(event("GUILD_UPDATE", 1, {"id": "5"}))
    await other.received_message(event("GUILD_UPDATE", 1, {"id": "5"}))
    assert other.parsed == [("GUILD_UPDATE", {"id": "5"})] * 2
    with pytest.raises(KeyError):
        await other.received_message(event("BROKEN", 2))
    assert receiver.received == []
    assert receiver.malformed == []


def test_does_not_keep_a_closed_client_alive() -> None:
    client = discord.Client(intents=discord.Intents.none())
    receiver = Receiver()
    receiver.client = client  # type: ignore[attr-defined]
    install(client, receiver)
    reference = weakref.ref(receiver)
    del client, receiver
    gc.collect()
    assert reference() is None


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
def test_decode_replaces_text_that_postgres_cannot_store(text: str, value: Any, as_bytes: bool) -> None:
    assert decode(text.encode() if as_bytes else text) == value


def test_decode_passes_decoded_objects_through() -> None:
    value = {"a": 1}
    assert decode(value) is value


@given(st.text(st.characters(), max_size=30))
def test_decode_changes_only_unstorable_characters(text: str) -> None:
    (found,) = decode(json.dumps([text]))
    assert found.encode() is not None
    assert "\x00" not in found
    whole = json.loads(json.dumps([text]))[0]
    assert found == "".join(REPLACED if ch == "\x00" or "\ud800" <= ch <= "\udfff" else ch for ch in whole)


@given(st.binary(max_size=40))
def test_decode_accepts_what_the_standard_parser_accepts(data: bytes) -> None:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        with pytest.raises(ValueError):  # noqa: PT011 - any ValueError is handled as a malformed payload
            decode(data)
    else:
        decode(data)


@pytest.mark.parametrize("text", [b"", b"{", b"nothing", b'{"a": }', b"\xff", '"\ud800', "[1,]"])
def test_decode_rejects_text_that_is_not_json(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any ValueError is handled as a malformed payload
        decode(text)


def test_decode_rejects_excessive_nesting() -> None:
    with pytest.raises(ValueError, match="too deeply"):
        decode("[" * 100_000)

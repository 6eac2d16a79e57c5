"""The one private hook into discord.py: raw gateway payloads, before its own parsers see or choke on them.

Written against discord.py 2.7.1, which is pinned; `tests/mirror/discord/test_tap.py` fails when an upgrade moves
what it leans on: `DiscordWebSocket.received_message`, its `_decompressor`, `sequence`, `session_id` and `_keep_alive`,
`discord.utils._from_json`, `Shard.reconnect`, `reidentify` and `ws`, and `ShardInfo._parent`.
"""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import discord
import orjson
from discord import utils as discord_utils
from discord.gateway import DiscordWebSocket, ReconnectWebSocket
from discord.shard import Shard

from utils.logs import log_once
from utils.text import scrub_payload

_log = logging.getLogger(__name__)

#: Gateway opcode 0, "Dispatch" (Discord API reference, "Gateway Opcodes").
DISPATCH = 0


class Receiver(Protocol):
    """Takes what the gateway sends."""

    def receive(self, event: str, data: Any, shard_id: int, session: str) -> bool | None:
        """Take one dispatch. Never raises.

        True keeps it from discord.py's own parser; None: it was told to `malformed`, so that what discord.py makes of
        it is no news.
        """

    def malformed(self, event: str, error: Exception) -> None:
        """Count and log a payload that could not be understood."""

    def room(self) -> Awaitable[None] | None:
        """None when there is room for more; otherwise what to await before the next message is read."""


class _Tapped:
    """What is kept of a connection: who takes its dispatches, its session, and the highest sequence number seen."""

    __slots__ = ("last", "receiver", "session")

    def __init__(self, receiver: Receiver) -> None:
        self.receiver: Receiver = receiver
        self.session: str | None = None
        self.last: int = 0


_receivers: weakref.WeakKeyDictionary[object, Receiver] = weakref.WeakKeyDictionary()
#: Where a connection keeps its `_Tapped`: looked up for each message, and a weak dictionary costs ten times as much.
_TAPPED = "_guildbook_tapped"

#: Seconds for which a session is tried to be resumed. Its gateway may be gone for good, and Discord keeps what it would
#: send again for a few minutes at most.
RESUME_SECONDS = 90.0
#: By shard that is disconnected: the connection that broke, and when it was tried to be resumed first.
_resuming: weakref.WeakKeyDictionary[Shard, tuple[DiscordWebSocket, float]] = weakref.WeakKeyDictionary()

_original_reconnect: Callable[[Shard], Awaitable[None]] = Shard.reconnect
_original: Callable[[DiscordWebSocket, Any], Awaitable[None]] = DiscordWebSocket.received_message


def decode(text: str | bytes | dict[str, Any]) -> Any:
    """Decode JSON as Discord sends it: NUL and lone surrogates become U+FFFD, what is decoded already passes through.

    orjson refuses lone surrogates, the standard library does not; both together cost such a payload a millisecond
    instead of the bot its life. Raises `ValueError` for what is not JSON.
    """
    if isinstance(text, dict):
        return text
    try:
        decoded = orjson.loads(text)
    except ValueError:
        try:
            return scrub_payload(json.loads(text))
        except RecursionError as error:
            raise ValueError("it is nested to a depth that no payload has") from error
    escaped_nul = b"\\u0000" if isinstance(text, bytes) else "\\u0000"
    return scrub_payload(decoded) if escaped_nul in text else decoded  # type: ignore[operator]


def install(client: discord.Client, receiver: Receiver) -> None:
    """Show every raw dispatch of this client's gateway connections to `receiver`."""
    _receivers[client._connection] = receiver
    discord_utils._from_json = decode  # type: ignore[assignment]
    DiscordWebSocket.received_message = _received_message  # type: ignore[method-assign]
    Shard.reconnect = _reconnect  # type: ignore[method-assign, assignment]


async def _reconnect(shard: Shard) -> None:
    """Resume the session also when the first try to do so has failed.

    discord.py begins a new one then, and all that Discord would have sent again is lost.
    """
    ws, now = shard.ws, time.monotonic()
    broken, since = _resuming.get(shard, (ws, now))
    if broken is not ws:
        since = now
    _resuming[shard] = ws, since
    if ws._connection in _receivers and ws.session_id is not None and now - since < RESUME_SECONDS:
        await shard.reidentify(ReconnectWebSocket(shard.id))
    else:
        await _original_reconnect(shard)


async def begin_new_sessions(client: discord.AutoShardedClient) -> None:
    """End every gateway session and begin a new one, so that Discord tells everything again from READY on.

    Raises what discord.py raises when the gateway cannot be reached; it then goes on trying by itself.
    """
    for shard in client.shards.values():
        shard._parent.ws.session_id = None  # not to be resumed
        await shard.reconnect()


def _has_envelope(message: dict[str, Any]) -> bool:
    """Return whether a dispatch has what discord.py and the code below read of it without asking."""
    sequence, event = message.get("s"), message.get("t")
    if type(event) is not str or not (type(sequence) is int or sequence is None):
        return False
    if event == "READY":
        data = message.get("d")
        return isinstance(data, dict) and isinstance(data.get("session_id"), str)
    return True


def _is_duplicate(ws: DiscordWebSocket, tapped: _Tapped, message: dict[str, Any]) -> bool:
    """Return whether a number was seen already: a duplicate has one that is not higher."""
    sequence = message.get("s")
    if message["t"] == "READY":
        tapped.session, tapped.last = message["d"]["session_id"], sequence or 0
        return False
    if sequence is None:
        return False
    if tapped.session != ws.session_id:  # a resumed session, on a new connection
        tapped.session, tapped.last = ws.session_id, ws.sequence or 0
    if sequence <= tapped.last:
        return True
    tapped.last = sequence
    return False


def _tap(ws: DiscordWebSocket) -> _Tapped | None:
    receiver = _receivers.get(ws._connection)
    if receiver is None:
        return None
    tapped = _Tapped(receiver)
    setattr(ws, _TAPPED, tapped)
    return tapped


async def _received_message(ws: DiscordWebSocket, message: Any, /) -> None:
    tapped: _Tapped | None = getattr(ws, _TAPPED, None) or _tap(ws)
    if tapped is None:
        return await _original(ws, message)
    receiver = tapped.receiver
    if type(message) is bytes:
        message = ws._decompressor.decompress(message)
        if message is None:  # the rest of the payload is still to come
            return None
    try:
        decoded = decode(message)
    except ValueError as error:
        receiver.malformed("unreadable", error)
        return None
    if not isinstance(decoded, dict):
        receiver.malformed("unreadable", TypeError(f"a payload is an object, not {type(decoded).__name__}"))
        return None
    if decoded.get("op") != DISPATCH:
        return await _original(ws, decoded)
    event: Any = decoded.get("t")
    sequence: Any = decoded.get("s")
    if (
        type(sequence) is int
        and sequence > tapped.last
        and tapped.session == ws.session_id
        and type(event) is str
        and event != "READY"
    ):  # nearly always: what follows would come to the same, and costs two calls
        tapped.last = sequence
    elif not _has_envelope(decoded):
        receiver.malformed("unreadable", ValueError("a dispatch has a name, a number and, if it is READY, a session"))
        return None
    elif _is_duplicate(ws, tapped, decoded):
        log_once(_log, "duplicate", "the gateway sent an event twice: the second one is dropped")
        return None
    session = decoded["d"]["session_id"] if event == "READY" else ws.session_id or ""
    taken = receiver.receive(event, decoded.get("d"), ws.shard_id or 0, session)
    if taken:
        ws.sequence = ws.sequence if sequence is None else sequence
        if ws._keep_alive:
            ws._keep_alive.tick()
    else:
        try:
            await _original(ws, decoded)
        except (discord.DiscordException, ConnectionError):
            raise  # the connection's own affairs
        except Exception as error:
            if taken is not None:  # or it is known already
                receiver.malformed(event, error)
    waiting = receiver.room()
    if waiting is not None:
        await waiting
    return None

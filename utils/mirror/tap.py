"""The one private hook into discord.py: raw gateway payloads, before its own parsers see or choke on them.

Written against discord.py 2.7.1, which is pinned; `tests/mirror/test_tap.py` fails when an upgrade moves what it leans
on: `DiscordWebSocket.received_message`, its `_decompressor`, `sequence`, `session_id` and `_keep_alive`, and
`discord.utils._from_json`.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import discord
import orjson
from discord import utils as discord_utils
from discord.gateway import DiscordWebSocket

from utils.logs import once
from utils.mirror.text import scrubbed

_log = logging.getLogger(__name__)

#: Gateway opcode 0, "Dispatch" (Discord API reference, "Gateway Opcodes").
DISPATCH = 0


class Receiver(Protocol):
    """Takes what the gateway sends."""

    def receive(self, event: str, data: Any, shard_id: int, session: str) -> bool:
        """Take one dispatch; True keeps it from discord.py's own parser. Never raises."""

    def malformed(self, event: str, error: Exception) -> None:
        """Count and log a payload that could not be understood."""

    def room(self) -> Awaitable[None] | None:
        """None when there is room for more; otherwise what to await before the next message is read."""


_receivers: weakref.WeakKeyDictionary[object, Receiver] = weakref.WeakKeyDictionary()
#: Highest sequence number seen, by connection: a duplicate has one that is not higher.
_sequences: weakref.WeakKeyDictionary[DiscordWebSocket, tuple[str | None, int]] = weakref.WeakKeyDictionary()

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
        return scrubbed(json.loads(text))
    escaped_nul = b"\\u0000" if isinstance(text, bytes) else "\\u0000"
    return scrubbed(decoded) if escaped_nul in text else decoded  # type: ignore[operator]


def install(client: discord.Client, receiver: Receiver) -> None:
    """Show every raw dispatch of this client's gateway connections to `receiver`."""
    _receivers[client._connection] = receiver
    discord_utils._from_json = decode  # type: ignore[assignment]
    DiscordWebSocket.received_message = _received_message  # type: ignore[method-assign]


def _is_duplicate(ws: DiscordWebSocket, message: dict[str, Any]) -> bool:
    sequence = message.get("s")
    if sequence is None or message.get("t") == "READY":
        if message.get("t") == "READY":
            _sequences[ws] = (message["d"]["session_id"], sequence or 0)
        return False
    session, last = _sequences.get(ws, (None, 0))
    if session != ws.session_id:  # a resumed session, on a new connection
        session, last = ws.session_id, ws.sequence or 0
    if sequence <= last:
        return True
    _sequences[ws] = (session, sequence)
    return False


async def _received_message(ws: DiscordWebSocket, message: Any, /) -> None:
    receiver = _receivers.get(ws._connection)
    if receiver is None:
        return await _original(ws, message)
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
    if _is_duplicate(ws, decoded):
        once(_log, "duplicate", "the gateway sent an event twice: the second one is dropped")
        return None
    event = decoded.get("t") or ""
    session = decoded["d"]["session_id"] if event == "READY" else ws.session_id or ""
    if receiver.receive(event, decoded.get("d"), ws.shard_id or 0, session):
        ws.sequence = decoded["s"]
        if ws._keep_alive:
            ws._keep_alive.tick()
    else:
        try:
            await _original(ws, decoded)
        except (discord.DiscordException, ConnectionError):
            raise  # the connection's own affairs
        except Exception as error:
            receiver.malformed(event, error)
    waiting = receiver.room()
    if waiting is not None:
        await waiting
    return None

"""Hooks into discord.py's gateway: raw payloads for the mirror, and sessions that are resumed whenever possible.

Written against discord.py 2.7.1; docs/explanation/architecture.md lists the private names used here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import discord
import orjson
import yarl
from discord import utils as discord_utils
from discord.gateway import DiscordWebSocket, ReconnectWebSocket
from discord.http import Route
from discord.shard import Shard

from utils.logs import log_once
from utils.text import scrub_payload

_log = logging.getLogger(__name__)

#: Gateway opcode 0, "Dispatch" (Discord API reference, "Gateway Opcodes").
DISPATCH = 0
#: How long to retry RESUME, in seconds. The session's gateway may never come back, and Discord keeps missed dispatches
#: for a few minutes only.
RESUME_SECONDS = 90.0


class Receiver(Protocol):
    """Receives every dispatch of a client's gateway connections."""

    def receive(self, name: str, data: Any, shard_id: int, session: str) -> bool | None:
        """Process one dispatch by its name, such as GUILD_UPDATE. Never raises.

        Returns True to keep it from discord.py's own parser, None if it was malformed and already reported, so that an
        error of discord.py's parser is not reported again.
        """

    def report_malformed(self, name: str, error: Exception) -> None:
        """Count and log a payload that could not be parsed."""

    def report_unparsed(self, name: str, error: Exception) -> None:
        """Count and log a payload that only discord.py's parser refused."""

    def backpressure(self) -> Awaitable[None] | None:
        """Return what to await before the next message is read; None if there is room for more."""


class _Connection:
    """Our state of a gateway connection: its receiver, its session, and the highest sequence number seen."""

    __slots__ = ("last_sequence", "receiver", "session")

    def __init__(self, receiver: Receiver) -> None:
        self.receiver: Receiver = receiver
        self.session: str | None = None
        self.last_sequence: int = 0


#: Attribute of a client's connection state that holds its receiver. A weak dictionary would keep both alive, because
#: the receiver refers to the client.
_RECEIVER = "_guildbook_receiver"
#: Attribute of a websocket that holds its `_Connection`.
_CONNECTION = "_guildbook_connection"
#: Attribute of a disconnected shard: the connection that broke, and the time of the first attempt to resume it.
_RESUMING = "_guildbook_resuming"

_original_received_message: Callable[[DiscordWebSocket, Any], Awaitable[None]] = DiscordWebSocket.received_message
_original_reconnect: Callable[[Shard], Awaitable[None]] = Shard.reconnect


def install(client: discord.Client, receiver: Receiver) -> None:
    """Pass every raw dispatch of this client's gateway connections to `receiver`."""
    setattr(client._connection, _RECEIVER, receiver)
    discord_utils._from_json = decode  # type: ignore[assignment]
    DiscordWebSocket.received_message = _received_message  # type: ignore[method-assign]
    Shard.reconnect = _reconnect  # type: ignore[method-assign, assignment]


def set_api_base(url: str) -> None:
    """Send REST requests to this address instead of Discord's, from every client of the process."""
    Route.BASE = url


def set_gateway(url: str) -> None:
    """Open new sessions at this address, in every client of the process."""
    DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(url)


def decode(text: str | bytes | dict[str, Any]) -> Any:
    """Decode JSON from Discord, with NUL and lone surrogates replaced by U+FFFD; a decoded object passes through.

    orjson rejects lone surrogates and the standard library does not, so a payload with one is parsed again by the
    latter. Raises `ValueError` for text that is not JSON.
    """
    if isinstance(text, dict):
        return text
    try:
        decoded = orjson.loads(text)
    except ValueError:
        try:
            return scrub_payload(json.loads(text))
        except RecursionError as error:
            raise ValueError("the JSON is nested too deeply") from error
    escaped_nul = b"\\u0000" if isinstance(text, bytes) else "\\u0000"
    return scrub_payload(decoded) if escaped_nul in text else decoded  # type: ignore[operator]


async def _received_message(ws: DiscordWebSocket, message: Any, /) -> None:
    connection: _Connection | None = getattr(ws, _CONNECTION, None) or _connect(ws)
    if connection is None:
        return await _original_received_message(ws, message)
    receiver = connection.receiver
    if type(message) is bytes:
        message = ws._decompressor.decompress(message)
        if message is None:  # the payload continues in the next message
            return None
    try:
        decoded = decode(message)
    except ValueError as error:
        receiver.report_malformed("unreadable", error)
        return None
    if not isinstance(decoded, dict):
        receiver.report_malformed("unreadable", TypeError(f"not a JSON object but {type(decoded).__name__}"))
        return None
    if decoded.get("op") != DISPATCH:
        return await _original_received_message(ws, decoded)
    name: Any = decoded.get("t")
    sequence: Any = decoded.get("s")
    if (
        type(sequence) is int
        and sequence > connection.last_sequence
        and connection.session == ws.session_id
        and type(name) is str
        and name != "READY"
    ):  # the usual case, without the two calls below, which would come to the same result
        connection.last_sequence = sequence
    elif not _has_envelope(decoded):
        receiver.report_malformed("unreadable", ValueError("the dispatch lacks a name, a sequence number or a session"))
        return None
    elif _is_duplicate(ws, connection, decoded):
        log_once(_log, "duplicate", "duplicate dispatch dropped; further ones are dropped silently")
        return None
    session = decoded["d"]["session_id"] if name == "READY" else ws.session_id or ""
    taken = receiver.receive(name, decoded.get("d"), ws.shard_id or 0, session)
    if taken:
        ws.sequence = ws.sequence if sequence is None else sequence
        if ws._keep_alive:
            ws._keep_alive.tick()
    else:
        try:
            await _original_received_message(ws, decoded)
        except (discord.DiscordException, ConnectionError):
            raise  # about the connection, not about this payload
        except Exception as error:
            if taken is not None:
                receiver.report_unparsed(name, error)
    waiting = receiver.backpressure()
    if waiting is not None:
        await waiting
    return None


def _connect(ws: DiscordWebSocket) -> _Connection | None:
    receiver: Receiver | None = getattr(ws._connection, _RECEIVER, None)
    if receiver is None:
        return None
    connection = _Connection(receiver)
    setattr(ws, _CONNECTION, connection)
    return connection


def _has_envelope(message: dict[str, Any]) -> bool:
    """Return whether a dispatch has the fields that discord.py and the code below use without checking."""
    sequence, name = message.get("s"), message.get("t")
    if type(name) is not str or not (type(sequence) is int or sequence is None):
        return False
    if name == "READY":
        data = message.get("d")
        return isinstance(data, dict) and isinstance(data.get("session_id"), str)
    return True


def _is_duplicate(ws: DiscordWebSocket, connection: _Connection, message: dict[str, Any]) -> bool:
    """Return whether a dispatch repeats an earlier one: its sequence number is not higher than the last."""
    sequence = message.get("s")
    if message["t"] == "READY":
        connection.session, connection.last_sequence = message["d"]["session_id"], sequence or 0
        return False
    if sequence is None:
        return False
    if connection.session != ws.session_id:  # a session resumed on a new connection
        connection.session, connection.last_sequence = ws.session_id, ws.sequence or 0
    if sequence <= connection.last_sequence:
        return True
    connection.last_sequence = sequence
    return False


# --- sessions


async def _reconnect(shard: Shard) -> None:
    """Keep trying to resume the session.

    discord.py starts a new one after the first failed attempt, and the dispatches missed in between are lost.
    """
    ws, now = shard.ws, time.monotonic()
    broken, since = getattr(shard, _RESUMING, (ws, now))
    if broken is not ws:
        since = now
    setattr(shard, _RESUMING, (ws, since))
    if hasattr(ws._connection, _RECEIVER) and ws.session_id is not None and now - since < RESUME_SECONDS:
        await shard.reidentify(ReconnectWebSocket(shard.id))
    else:
        await _original_reconnect(shard)


async def begin_new_sessions(client: discord.AutoShardedClient) -> None:
    """Start a new session on every shard, so that Discord sends its full state again, from READY on.

    Raises discord.py's errors if the gateway is unreachable; discord.py then keeps reconnecting by itself.
    """
    for shard in client.shards.values():
        shard._parent.ws.session_id = None  # prevents RESUME
        await shard.reconnect()

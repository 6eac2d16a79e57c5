"""The ledger: every message and membership change that the world emitted, and which sessions were sent it."""

from __future__ import annotations

import json
import time
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

from .ids import to_micros

#: An acknowledgement counts as safe only if it is this many seconds older than the end of the connection: what a client
#: acknowledged later may have been only in its memory when it was killed.
ACK_MARGIN_S = 1.0
_KINDS = {
    "GUILD_MEMBER_ADD": "join",
    "GUILD_MEMBER_REMOVE": "leave",
    "GUILD_BAN_ADD": "ban",
    "GUILD_BAN_REMOVE": "unban",
}
_ID_FIRST = b'{"id":"'


class SentMessage(NamedTuple):
    """A message that was emitted: its id, guild and author."""

    id: int
    guild_id: int
    user_id: int


class MemberEvent(NamedTuple):
    """A user joined, left, was banned or was unbanned."""

    guild_id: int
    user_id: int
    #: join, leave, ban or unban.
    kind: str
    #: Time of a join in microseconds of Unix time; None for the other kinds.
    joined_us: int | None = None


class Delivery:
    """What one gateway session was sent (replays counted once) and what its client acknowledged.

    A client acknowledges in each heartbeat and in RESUME, with the sequence number of the last dispatch it received.
    """

    def __init__(self) -> None:
        self.message_ids: array[int] = array("q")
        self.member_events: list[MemberEvent] = []
        #: Sequence number of the last dispatch that the client acknowledged.
        self.acknowledged = 0
        #: `time.monotonic()` when the client disconnected; None while it is connected.
        self.disconnected_at: float | None = None
        self._message_sequences: array[int] = array("q")
        self._member_event_sequences: array[int] = array("q")
        self._acknowledgements: list[tuple[float, int]] = []

    def record(self, name: str, sequence: int, body: bytes) -> None:
        """Record a dispatch just before it is sent."""
        if name != "MESSAGE_CREATE" and name not in _KINDS:
            return
        try:
            if name == "MESSAGE_CREATE":
                if b'"guild_id"' not in body:  # a direct message
                    return
                end = body.find(b'"', len(_ID_FIRST)) if body.startswith(_ID_FIRST) else -1
                self.message_ids.append(int(body[len(_ID_FIRST) : end] if end > 0 else json.loads(body)["id"]))
                self._message_sequences.append(sequence)
            else:
                data = json.loads(body)
                joined = to_micros(datetime.fromisoformat(data["joined_at"])) if "joined_at" in data else None
                event = MemberEvent(int(data["guild_id"]), int(data["user"]["id"]), _KINDS[name], joined)
                self.member_events.append(event)
                self._member_event_sequences.append(sequence)
        except (ValueError, TypeError, KeyError, OverflowError):
            return  # an injected malformed event, which did not happen in the world

    def acknowledge(self, sequence: object) -> None:
        """Record the sequence number that a client sent in a heartbeat or RESUME."""
        if isinstance(sequence, int) and sequence > self.acknowledged:
            self.acknowledged = sequence
            self._acknowledgements.append((time.monotonic(), sequence))

    def last_safe_sequence(self, margin: float = ACK_MARGIN_S) -> int:
        """Return the last sequence number acknowledged `margin` seconds before the disconnect, or before now."""
        end = (time.monotonic() if self.disconnected_at is None else self.disconnected_at) - margin
        return next((sequence for at, sequence in reversed(self._acknowledgements) if at <= end), 0)

    def report(self, messages: int = 0, member_events: int = 0, *, margin: float = ACK_MARGIN_S) -> dict[str, Any]:
        """List what was sent after the first so many messages and member events, and count what was safely received."""
        safe = self.last_safe_sequence(margin)
        return {
            "messages": self.message_ids[messages:].tolist(),
            "member_events": [[*event] for event in self.member_events[member_events:]],
            "safe_messages": bisect_right(self._message_sequences, safe),
            "safe_member_events": bisect_right(self._member_event_sequences, safe),
        }


class Ledger:
    """Records emitted messages and member events in order, for tests that check that each was stored exactly once."""

    def __init__(self) -> None:
        self.member_events: list[MemberEvent] = []
        #: By session id.
        self.deliveries: dict[str, Delivery] = {}
        self._ids: array[int] = array("q")
        self._guilds: array[int] = array("q")
        self._users: array[int] = array("q")

    @property
    def messages(self) -> list[SentMessage]:
        """Every message, oldest first."""
        return list(self._iter_messages(0))

    @property
    def counts(self) -> Counter[tuple[int, int]]:
        """The number of messages, by guild and author."""
        return Counter(zip(self._guilds, self._users, strict=True))

    @property
    def newest(self) -> dict[tuple[int, int], int]:
        """The largest message id, by guild and author."""
        newest: dict[tuple[int, int], int] = {}
        for message in self._iter_messages(0):
            newest[message[1:]] = max(message.id, newest.get(message[1:], 0))
        return newest

    def sizes(self) -> tuple[int, int]:
        """Return the number of messages and of member events."""
        return len(self._ids), len(self.member_events)

    def since(self, messages: int = 0, member_events: int = 0) -> dict[str, list[list[Any]]]:
        """List, as plain lists, all but the first so many messages and member events."""
        return {
            "messages": [[*message] for message in self._iter_messages(messages)],
            "member_events": [[*event] for event in self.member_events[member_events:]],
        }

    def delivered(self, known: dict[str, list[int]] | None = None) -> dict[str, dict[str, Any]]:
        """Report every session's delivery.

        `known` gives, by session id, how many messages and member events the caller already has.
        """
        known = known or {}
        return {id: delivery.report(*known.get(id, (0, 0))) for id, delivery in self.deliveries.items()}

    def record_message(self, id: int, guild_id: int, user_id: int) -> None:
        """Record a message."""
        self._ids.append(id)
        self._guilds.append(guild_id)
        self._users.append(user_id)

    def record_member_event(self, guild_id: int, user_id: int, kind: str, joined_us: int | None = None) -> None:
        """Record a join, leave, ban or unban."""
        self.member_events.append(MemberEvent(guild_id, user_id, kind, joined_us))

    def _iter_messages(self, start: int) -> Iterator[SentMessage]:
        return map(SentMessage, self._ids[start:], self._guilds[start:], self._users[start:])

"""The ledger: what the world told that no listing shows afterwards, and what of it went out to whom."""

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

#: Seconds by which an acknowledgement has to be older than the end of its client's connection to count: what was
#: acknowledged later than that may have been in the client's memory alone when the client was killed.
SAFE_AFTER_S = 1.0
_KINDS = {
    "GUILD_MEMBER_ADD": "join",
    "GUILD_MEMBER_REMOVE": "leave",
    "GUILD_BAN_ADD": "ban",
    "GUILD_BAN_REMOVE": "unban",
}
_ID_FIRST = b'{"id":"'


class ToldMessage(NamedTuple):
    """A message that was told: its id, guild and author."""

    id: int
    guild_id: int
    user_id: int


class ToldMove(NamedTuple):
    """Somebody joined, left, was banned or unbanned."""

    guild_id: int
    user_id: int
    #: join, leave, ban or unban.
    kind: str
    #: Of a join, when, in microseconds of Unix time.
    joined_us: int | None = None


class Delivery:
    """What was sent to the sockets of one gateway session, once whatever is replayed, and what its client says it has.

    A client says it in every heartbeat and in RESUME: the number of the last dispatch that it has taken.
    """

    def __init__(self) -> None:
        self.message_ids: array[int] = array("q")
        self.moves: list[ToldMove] = []
        #: The number of the last dispatch that the client has taken.
        self.acknowledged = 0
        #: `time.monotonic()` of when its client went away; None while it is there.
        self.left_at: float | None = None
        self._message_numbers: array[int] = array("q")
        self._move_numbers: array[int] = array("q")
        self._acknowledgements: list[tuple[float, int]] = []

    def sent(self, name: str, number: int, body: bytes) -> None:
        """Note a dispatch just before it is sent."""
        if name != "MESSAGE_CREATE" and name not in _KINDS:
            return
        try:
            if name == "MESSAGE_CREATE":
                end = body.find(b'"', len(_ID_FIRST)) if body.startswith(_ID_FIRST) else -1
                self.message_ids.append(int(body[len(_ID_FIRST) : end] if end > 0 else json.loads(body)["id"]))
                self._message_numbers.append(number)
            else:
                told = json.loads(body)
                joined = to_micros(datetime.fromisoformat(told["joined_at"])) if "joined_at" in told else None
                self.moves.append(ToldMove(int(told["guild_id"]), int(told["user"]["id"]), _KINDS[name], joined))
                self._move_numbers.append(number)
        except (ValueError, TypeError, KeyError, OverflowError):
            return  # a lie, which the world never told

    def acknowledge(self, number: object) -> None:
        """Note what the client says it has taken."""
        if isinstance(number, int) and number > self.acknowledged:
            self.acknowledged = number
            self._acknowledgements.append((time.monotonic(), number))

    def safe_until(self) -> int:
        """Give the number of the last dispatch that its client had taken a while before it went away, or before now."""
        end = (time.monotonic() if self.left_at is None else self.left_at) - SAFE_AFTER_S
        return next((number for at, number in reversed(self._acknowledgements) if at <= end), 0)

    def report(self, messages: int = 0, moves: int = 0) -> dict[str, Any]:
        """List what was sent after so many messages and moves, and how many of all of them were safely taken."""
        safe = self.safe_until()
        return {
            "messages": self.message_ids[messages:].tolist(),
            "moves": [[*move] for move in self.moves[moves:]],
            "safe_messages": bisect_right(self._message_numbers, safe),
            "safe_moves": bisect_right(self._move_numbers, safe),
        }


class Ledger:
    """Keeps what was told, in order; for whoever wants to know whether it was all written down, and once."""

    def __init__(self) -> None:
        self.moves: list[ToldMove] = []
        #: By session.
        self.deliveries: dict[str, Delivery] = {}
        self._ids: array[int] = array("q")
        self._guilds: array[int] = array("q")
        self._users: array[int] = array("q")

    @property
    def messages(self) -> list[ToldMessage]:
        """Every message, oldest first."""
        return list(self._messages(0))

    @property
    def counts(self) -> Counter[tuple[int, int]]:
        """How many messages were told, by guild and author."""
        return Counter(zip(self._guilds, self._users, strict=True))

    @property
    def newest(self) -> dict[tuple[int, int], int]:
        """The largest message id told, by guild and author."""
        found: dict[tuple[int, int], int] = {}
        for message in self._messages(0):
            found[message[1:]] = max(message.id, found.get(message[1:], 0))
        return found

    def sizes(self) -> tuple[int, int]:
        """Give how many messages and how many moves were told."""
        return len(self._ids), len(self.moves)

    def since(self, messages: int = 0, moves: int = 0) -> dict[str, list[list[Any]]]:
        """List what was told after so many messages and moves, as plain lists."""
        return {"messages": [[*it] for it in self._messages(messages)], "moves": [[*it] for it in self.moves[moves:]]}

    def delivered(self, known: dict[str, list[int]] | None = None) -> dict[str, dict[str, Any]]:
        """Report every session's delivery; `known` says by session how many messages and moves the caller has."""
        known = known or {}
        return {id: delivery.report(*known.get(id, (0, 0))) for id, delivery in self.deliveries.items()}

    def message(self, id: int, guild_id: int, user_id: int) -> None:
        """Note a message."""
        self._ids.append(id)
        self._guilds.append(guild_id)
        self._users.append(user_id)

    def move(self, guild_id: int, user_id: int, kind: str, joined_us: int | None = None) -> None:
        """Note that somebody came or went."""
        self.moves.append(ToldMove(guild_id, user_id, kind, joined_us))

    def _messages(self, after: int) -> Iterator[ToldMessage]:
        return map(ToldMessage, self._ids[after:], self._guilds[after:], self._users[after:])

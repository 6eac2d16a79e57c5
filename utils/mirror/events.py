"""What Discord tells once and never again: joins, leaves, bans, and messages to be counted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import orjson

from utils.errors import ValidationError
from utils.mirror.translate import Payload, moment

#: Half the cost of calling the class, which counts with every message.
_make = tuple.__new__
#: Largest id that a bigint holds.
_LARGEST = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Message(NamedTuple):
    """A message to be counted for its author, once."""

    stamp: int
    guild_id: int
    user_id: int
    id: int


class Membership(NamedTuple):
    """Somebody joined, left, was banned or unbanned."""

    stamp: int
    guild_id: int
    user_id: int
    #: join, leave, ban or unban.
    kind: str
    #: Of a join what Discord says, of the others when it was heard of.
    at: datetime
    #: When it was heard of, on the database's clock: Discord's may differ.
    heard: datetime


Event = Message | Membership


def packed(event: Event) -> bytes:
    """Return an event as it stands in a journal; the stamp is kept beside it."""
    if isinstance(event, Message):
        return orjson.dumps(event[1:])
    times = ((time - _EPOCH) // _MICROSECOND for time in (event.at, event.heard))
    return orjson.dumps((*event[1:4], *times))


def unpacked(stamp: int, payload: bytes) -> Event:
    """Return the event that `packed` made these bytes of. Raises `ValidationError` for others."""
    try:
        guild_id, user_id, *rest = orjson.loads(payload)
        if len(rest) == 1:
            return Message(stamp, guild_id, user_id, *rest)
        kind, *times = rest
        at, heard = (_EPOCH + time * _MICROSECOND for time in times)
        return Membership(stamp, guild_id, user_id, kind, at, heard)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValidationError(f"a journal holds {payload[:80]!r}, which is no event: {error}") from error


def _id(value: Any) -> int:
    number = int(value)
    if not 0 < number <= _LARGEST:
        raise ValidationError(f"{value!r} is no id of Discord's")
    return number


def message(payload: Payload, stamp: int) -> Message | None:
    """Return the message to be counted; None for direct messages and webhooks, whose authors are no members."""
    guild_id = payload.get("guild_id")
    if guild_id is None or "webhook_id" in payload:
        return None
    guild, author, id = int(guild_id), int(payload["author"]["id"]), int(payload["id"])
    if not (0 < guild <= _LARGEST and 0 < author <= _LARGEST and 0 < id <= _LARGEST):
        raise ValidationError(f"message {payload['id']!r:.40}: an id of Discord's is positive and below 2^63")
    return _make(Message, (stamp, guild, author, id))


def _membership(kind: str) -> Callable[[Payload, int, datetime], Membership]:
    def read(payload: Payload, stamp: int, now: datetime) -> Membership:
        joined = moment(payload.get("joined_at")) if kind == "join" else None
        return Membership(stamp, _id(payload["guild_id"]), _id(payload["user"]["id"]), kind, joined or now, now)

    return read


#: Gateway events that say who came and went.
MEMBERSHIPS: dict[str, Callable[[Payload, int, datetime], Membership]] = {
    "GUILD_MEMBER_ADD": _membership("join"),
    "GUILD_MEMBER_REMOVE": _membership("leave"),
    "GUILD_BAN_ADD": _membership("ban"),
    "GUILD_BAN_REMOVE": _membership("unban"),
}

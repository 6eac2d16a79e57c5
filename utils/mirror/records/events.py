"""What Discord tells once and never again: joins, leaves, bans, and messages to be counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import orjson

from utils.exceptions import ValidationError

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

"""Events that the gateway sends once: joins, leaves, bans, and messages to be counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import orjson

from utils.exceptions import ValidationError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Message(NamedTuple):
    """A message to be counted once for its author."""

    stamp: int
    guild_id: int
    user_id: int
    id: int


class Membership(NamedTuple):
    """A user joined, left, was banned or unbanned."""

    stamp: int
    guild_id: int
    user_id: int
    #: join, leave, ban or unban.
    kind: str
    #: Discord's timestamp for a join; for the other kinds the same as `received_at`.
    at: datetime
    #: When this process received the event, on the database's clock, which may differ from Discord's.
    received_at: datetime


Event = Message | Membership


def encode_event(event: Event) -> bytes:
    """Serialize an event for the journal, which stores the stamp separately."""
    if isinstance(event, Message):
        return orjson.dumps(event[1:])
    times = ((time - _EPOCH) // _MICROSECOND for time in (event.at, event.received_at))
    return orjson.dumps((*event[1:4], *times))


def decode_event(stamp: int, payload: bytes) -> Event:
    """Parse the output of `encode_event`. Raises `ValidationError` for anything else."""
    try:
        guild_id, user_id, *rest = orjson.loads(payload)
        if len(rest) == 1:
            return Message(stamp, guild_id, user_id, *rest)
        kind, *times = rest
        at, received_at = (_EPOCH + time * _MICROSECOND for time in times)
        return Membership(stamp, guild_id, user_id, kind, at, received_at)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValidationError(f"invalid event in the journal: {payload[:80]!r}: {error}") from error

"""Snowflakes and times in the forms Discord writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

# https://docs.discord.com/developers/reference#snowflakes
DISCORD_EPOCH_MS: Final = 1_420_070_400_000
_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# The world's own clock starts here, so that two worlds of one seed agree to the microsecond.
WORLD_START_US: Final = 1_780_272_000_000_000  # 2026-06-01T00:00:00Z


def to_datetime(micros: int) -> datetime:
    """Turn microseconds since 1970 into an aware datetime."""
    return _UNIX_EPOCH + timedelta(microseconds=micros)


def to_micros(moment: datetime) -> int:
    """Turn an aware datetime into microseconds since 1970."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment!r} has no time zone: Discord's times are absolute, pass an aware datetime")
    return (moment - _UNIX_EPOCH) // timedelta(microseconds=1)


def iso(micros: int | None) -> str | None:
    """Write a time the way Discord does: microseconds always present, offset +00:00."""
    return None if micros is None else to_datetime(micros).isoformat(timespec="microseconds")


def snowflake_at(micros: int, increment: int = 0) -> int:
    """Make the snowflake of a moment; `increment` tells apart those of one millisecond."""
    return ((micros // 1000 - DISCORD_EPOCH_MS) << 22) + increment

"""Snowflakes and times in Discord's formats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

# https://docs.discord.com/developers/reference#snowflakes
DISCORD_EPOCH_MS: Final = 1_420_070_400_000
_UNIX_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

# The start of the world's clock, so that two worlds with the same seed agree to the microsecond.
WORLD_START_US: Final = 1_780_272_000_000_000  # 2026-06-01T00:00:00Z


def to_datetime(micros: int) -> datetime:
    """Convert microseconds since 1970 to an aware datetime."""
    return _UNIX_EPOCH + timedelta(microseconds=micros)


def to_micros(moment: datetime) -> int:
    """Convert an aware datetime to microseconds since 1970."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment!r} has no time zone: pass an aware datetime")
    return (moment - _UNIX_EPOCH) // timedelta(microseconds=1)


def iso(micros: int | None) -> str | None:
    """Format a time like Discord: with microseconds and offset +00:00."""
    return None if micros is None else to_datetime(micros).isoformat(timespec="microseconds")


def snowflake_at(micros: int, increment: int = 0) -> int:
    """Return the snowflake of a time; `increment` distinguishes those of the same millisecond."""
    return ((micros // 1000 - DISCORD_EPOCH_MS) << 22) + increment

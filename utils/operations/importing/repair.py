"""Validates single values and repairs those whose meaning is unambiguous."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from models import DISCORD_EPOCH_MS
from utils.documents import preferences
from utils.exceptions import ValidationError

#: More messages than a member can have written: two per millisecond since Discord was founded.
MAX_COUNT = 10**12
#: Larger Unix times are milliseconds: as seconds they would be after the year 5000.
_MILLISECONDS = 10**11
_EARLIEST = datetime.fromtimestamp(DISCORD_EPOCH_MS / 1000, UTC)
_ID = r"[0-9]{1,20}"
_DIGITS = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]+)?")
_TRUE = frozenset(("true", "on", "yes", "y", "1", "enabled"))
_FALSE = frozenset(("false", "off", "no", "n", "0", "disabled"))


class UnusableValue(ValueError):
    """A value cannot be repaired. The message is the same for all values of a kind, and contains no data."""


def snowflake(value: Any) -> int:
    """Return an id given as a number or as text. Raises `UnusableValue`."""
    if isinstance(value, str) and re.fullmatch(rf"\s*{_ID}\s*", value, re.ASCII):
        return _id(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _id(value)
    raise UnusableValue("the id is not an integer")


def _id(value: str | int) -> int:
    number = int(value)
    if not 0 < number < 2**63:
        raise UnusableValue("the id is not a Discord id")
    return number


def count(value: Any) -> tuple[int, str | None]:
    """Return a count and the repair (None if none was needed). Raises `UnusableValue`."""
    repaired = None
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        value, repaired = float(value) if "." in value else int(value), "count as text"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnusableValue("the count is not a number")
    if value < 0:
        return 0, "negative count set to 0"
    if value > MAX_COUNT:
        raise UnusableValue("the count is above 10^12")
    if isinstance(value, float):
        return int(value), repaired if value.is_integer() and repaired else "count with a fraction, truncated"
    return value, repaired


def moment(value: Any, now: datetime) -> tuple[datetime, str | None]:
    """Return a time given as ISO 8601 or Unix time (seconds or milliseconds), and the repair (None if none was needed).

    A time without a zone is UTC. Raises `UnusableValue`, also for times more than a day after `now`.
    """
    repaired: str | None = None
    if isinstance(value, str):
        text = value.strip()
        if _DIGITS.fullmatch(text) and len(text) > 8:  # 20240131 is a date
            at, repaired = _unix(float(text)), "Unix time as text"
        else:
            try:
                at = datetime.fromisoformat(text)
            except ValueError:
                raise UnusableValue("the time is neither ISO 8601 nor Unix seconds") from None
            if at.tzinfo is None:
                at, repaired = at.replace(tzinfo=UTC), "time without a zone, assumed UTC"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        at = _unix(value)
        repaired = "time in Unix milliseconds" if abs(value) > _MILLISECONDS else "time in Unix seconds"
    else:
        raise UnusableValue("the time is neither ISO 8601 nor Unix seconds")
    try:
        at = at.astimezone(UTC)
    except OverflowError:
        raise UnusableValue("the time is out of range") from None
    if at < _EARLIEST or at > now + timedelta(days=1):
        raise UnusableValue("the time is before 2015" if at < _EARLIEST else "the time is in the future")
    return at, repaired


def _unix(value: float) -> datetime:
    try:
        return datetime.fromtimestamp(value / 1000 if abs(value) > _MILLISECONDS else value, UTC)
    except (ValueError, OverflowError, OSError):
        raise UnusableValue("the time is out of range") from None


def flag(value: Any) -> tuple[bool, str | None]:
    """Return a boolean and the repair (None if none was needed). Raises `UnusableValue`."""
    if isinstance(value, bool):
        return value, None
    if isinstance(value, int | float | str):
        text = str(value).strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE, "boolean spelled differently"
    raise UnusableValue("the value is not a boolean")


def language(value: Any) -> tuple[str, str | None]:
    """Return a language tag and the repair (None if none was needed). Raises `UnusableValue`."""
    if not isinstance(value, str):
        raise UnusableValue("the language is not text")
    try:
        tag = preferences.language_tag(value)
    except ValidationError:
        raise UnusableValue("the language is not a tag like en, de or pt-BR") from None
    return tag, None if tag == value else "language tag normalized"

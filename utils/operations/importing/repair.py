"""Values that are not quite what they should be: repaired where there is no doubt about what was meant."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from models import DISCORD_EPOCH_MS
from utils.documents import preferences
from utils.exceptions import ValidationError

#: More messages than a member can have written: one a millisecond since Discord began.
ABSURD_COUNT = 10**12
#: Unix times above it are milliseconds: as seconds they would be beyond the year 5000.
_MILLISECONDS = 10**11
_EARLIEST = datetime.fromtimestamp(DISCORD_EPOCH_MS / 1000, UTC)
_ID = r"[0-9]{1,20}"
_MEMBER = re.compile(rf"({_ID})_({_ID})")
_MEMBER_LOOSELY = re.compile(rf"\s*({_ID})\s*[-_:;/.,| ]\s*({_ID})\s*")
_DIGITS = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]+)?")
_TRUE = frozenset(("true", "on", "yes", "y", "1", "enabled"))
_FALSE = frozenset(("false", "off", "no", "n", "0", "disabled"))


class Unusable(ValueError):
    """A value that cannot be repaired; the message says of which kind it is, the same for all of its kind."""


def member_key(key: str) -> tuple[int, int, str | None]:
    """Return guild, user and how the key was repaired, None: it was not. Raises `Unusable`."""
    repaired = None
    match = _MEMBER.fullmatch(key)
    if match is None:
        match, repaired = _MEMBER_LOOSELY.fullmatch(key), "key spelled otherwise than guild_user"
    if match is None:
        raise Unusable("the key is not guild_user")
    return _id(match[1]), _id(match[2]), repaired


def snowflake(value: Any) -> int:
    """Return an id that is a number or text. Raises `Unusable`."""
    if isinstance(value, str) and re.fullmatch(rf"\s*{_ID}\s*", value, re.ASCII):
        return _id(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return _id(value)
    raise Unusable("the id is no whole number")


def _id(value: str | int) -> int:
    number = int(value)
    if not 0 < number < 2**63:
        raise Unusable("the id is no Discord id")
    return number


def count(value: Any) -> tuple[int, str | None]:
    """Return a number of things, and how it was repaired. Raises `Unusable`."""
    repaired = None
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        value, repaired = float(value) if "." in value else int(value), "count as text"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unusable("the count is no number")
    if value < 0:
        return 0, "count below 0 taken as 0"
    if value > ABSURD_COUNT:
        raise Unusable("the count is absurd")
    if isinstance(value, float):
        return int(value), repaired if value.is_integer() and repaired else "count with a fraction cut off"
    return value, repaired


def moment(value: Any, now: datetime) -> tuple[datetime, str | None]:
    """Return a moment given as ISO 8601 (without a zone: UTC) or Unix seconds or milliseconds, and how it was repaired.

    `now`: moments more than a day later are no good. Raises `Unusable`.
    """
    repaired: str | None = None
    if isinstance(value, str):
        text = value.strip()
        if _DIGITS.fullmatch(text) and len(text) > 8:  # 20240131 is a date
            at, repaired = _unix(float(text)), "time as text of digits"
        else:
            try:
                at = datetime.fromisoformat(text)
            except ValueError:
                raise Unusable("the time is neither ISO 8601 nor Unix seconds") from None
            if at.tzinfo is None:
                at, repaired = at.replace(tzinfo=UTC), "time without a zone taken as UTC"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        at = _unix(value)
        repaired = "time as Unix milliseconds" if abs(value) > _MILLISECONDS else "time as Unix seconds"
    else:
        raise Unusable("the time is neither ISO 8601 nor Unix seconds")
    try:
        at = at.astimezone(UTC)
    except OverflowError:
        raise Unusable("the time is none of Discord's") from None
    if at < _EARLIEST or at > now + timedelta(days=1):
        raise Unusable("the time is before Discord began" if at < _EARLIEST else "the time has not come yet")
    return at, repaired


def _unix(value: float) -> datetime:
    try:
        return datetime.fromtimestamp(value / 1000 if abs(value) > _MILLISECONDS else value, UTC)
    except (ValueError, OverflowError, OSError):
        raise Unusable("the time is none of Discord's") from None


def flag(value: Any) -> tuple[bool, str | None]:
    """Return a yes or no, and how it was repaired. Raises `Unusable`."""
    if isinstance(value, bool):
        return value, None
    if isinstance(value, int | float | str):
        text = str(value).strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE, "yes or no written otherwise"
    raise Unusable("the value is neither yes nor no")


def language(value: Any) -> tuple[str, str | None]:
    """Return a language tag, and how it was repaired. Raises `Unusable`."""
    if not isinstance(value, str):
        raise Unusable("the language is no text")
    try:
        tag = preferences.language_tag(value)
    except ValidationError:
        raise Unusable("the language is no tag like en, de or pt-BR") from None
    return tag, None if tag == value else "language spelled otherwise"

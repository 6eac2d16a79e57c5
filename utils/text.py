"""Text helpers: strings that PostgreSQL can store, and sizes and durations for people."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

#: What a PostgreSQL `text` value cannot hold: NUL, and surrogates, which UTF-8 cannot encode.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def storable(text: str) -> str:
    """Replace NUL and lone surrogates with U+FFFD."""
    return _UNSTORABLE.sub(REPLACEMENT, text)


def scrub_payload(value: Any) -> Any:
    """Return a copy of decoded JSON in which every string, keys included, is `storable`."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [scrub_payload(item) for item in value]
    if isinstance(value, dict):
        return {storable(key): scrub_payload(item) for key, item in value.items()}
    return value


def format_duration(duration: timedelta) -> str:
    """Format a duration in its largest unit: `40 s`, `1 minute`, `5 hours`, `12 days`."""
    seconds = int(duration.total_seconds())
    for name, size, limit in (("minute", 60, 3_600), ("hour", 3_600, 2 * 86_400), ("day", 86_400, None)):
        if seconds < 60:
            break
        if limit is None or seconds < limit:
            return format_count(seconds // size, name)
    return f"{seconds} s"


def format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units: `999 B`, `1.5 kB`, `15.0 MB`."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if abs(count) < 999.95:  # 999.95 would be rounded up to 1000.0
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Format a number of things: `1 guild`, `2,500 guilds`, `0 entries`, `1 index`.

    `plural`: for nouns whose plural does not follow the rules of English spelling.
    """
    return f"{count:,} {noun if count == 1 else plural or _pluralize(noun)}"


def _pluralize(noun: str) -> str:
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "z", "ch", "sh")) else f"{noun}s"

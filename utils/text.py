"""Discord's text is data: made storable where it enters."""

from __future__ import annotations

import re
from typing import Any

#: What Postgres cannot store in `text`: NUL, and surrogates, which UTF-8 does not have.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def storable(text: str) -> str:
    """Return the text with NUL and lone surrogates replaced by U+FFFD."""
    return _UNSTORABLE.sub(REPLACEMENT, text)


def scrubbed(value: Any) -> Any:
    """Return a decoded payload with every string in it made storable."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, list):
        return [scrubbed(item) for item in value]
    if isinstance(value, dict):
        return {storable(key): scrubbed(item) for key, item in value.items()}
    return value

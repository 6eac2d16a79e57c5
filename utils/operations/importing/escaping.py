"""Escapes JSON text so that `jsonb` stores it without loss.

PostgreSQL's `jsonb` can store neither NUL nor lone surrogates, and does not preserve that 1e23 is a float. Strings are
therefore escaped with `MARK`, the last private-use character, and numbers with an exponent are written out.
"""

from __future__ import annotations

import re

MARK = "\U0010fffd"
#: Maximum number of digits on either side of the decimal point; `numeric` has 131,072 before and 16,383 after it
#: (PostgreSQL manual, 8.1.2).
DIGITS = 16_000

#: Text that may need escaping: an escaped NUL or surrogate, the mark, an exponent, or a very long number.
_NEEDS_ESCAPING = re.compile(rf"\\u0000|\\u[dD][89a-fA-F]|{MARK}|[0-9][eE]|(?<![0-9])[0-9]{{{DIGITS // 4}}}")
_TOKEN = re.compile(
    r'"[^"\\]*(?:\\.[^"\\]*)*"'
    r"|(?P<sign>-?)(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))?(?:[eE](?P<exponent>[+-]?[0-9]+))?",
    re.DOTALL,
)
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"{MARK}|(?P<pair>\\u[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}})"
    rf"|\\u(?P<single>0000|[dD][89a-fA-F]{_HEX}{{2}})|\\."
)
_PAIRED_MARK = r"\udbff\udffd"
_MARKED = re.compile(rf"{MARK}(?:{MARK}|(?P<code>0000|d[89a-f][0-9a-f]{{2}}))")
_UNSTORABLE = re.compile(f"[\x00\ud800-\udfff{MARK}]")


class UnstorableValue(ValueError):
    """A value cannot be stored without loss. The message says why."""


def storable_json(text: str) -> str:
    """Return JSON text that `jsonb` can store; `original_json` undoes it. The argument must be valid JSON.

    Raises `UnstorableValue` for a number with more than 16,000 digits.
    """
    return _TOKEN.sub(_storable_token, text) if _NEEDS_ESCAPING.search(text) else text


def original_json(text: str) -> str:
    """Undo `storable_json`, given the text that PostgreSQL returns."""
    return _MARKED.sub(lambda match: f"\\u{match['code']}" if match["code"] else MARK, text) if MARK in text else text


def storable_key(key: str) -> str:
    """Return a key that `text` can store; `original_key` undoes it."""
    if not _UNSTORABLE.search(key):
        return key
    return _UNSTORABLE.sub(lambda match: MARK + (MARK if match[0] == MARK else f"{ord(match[0]):04x}"), key)


def original_key(key: str) -> str:
    """Undo `storable_key`."""
    if MARK not in key:
        return key
    return _MARKED.sub(lambda match: chr(int(match["code"], 16)) if match["code"] else MARK, key)


def _storable_token(token: re.Match[str]) -> str:
    if token["whole"] is None:
        return _ESCAPE.sub(_storable_escape, token[0])
    whole, fraction, exponent = token["whole"], token["fraction"] or "", token["exponent"]
    shift = 0
    if exponent is not None:
        shift = int(exponent) if len(exponent) < 10 else DIGITS * (-10 if exponent[0] == "-" else 10)
        if not (whole + fraction).strip("0"):
            shift = 0
    before, after = len(whole) + shift, len(fraction) - shift
    if max(before, after, len(whole), len(fraction)) > DIGITS:
        raise UnstorableValue(f"a number has more than {DIGITS:,} digits")
    if exponent is None:
        return token[0]
    digits = whole + fraction
    if before <= 0:
        digits, before = "0" * (1 - before) + digits, 1
    digits = digits.ljust(before, "0")
    # Always with a decimal point: 1e23 is a float, and is not equal to the integer 10**23.
    return f"{token['sign']}{digits[:before].lstrip('0') or '0'}.{digits[before:] or '0'}"


def _storable_escape(escape: re.Match[str]) -> str:
    if escape[0] == MARK:
        return MARK + MARK
    if escape["pair"]:
        return MARK + MARK if escape["pair"].lower() == _PAIRED_MARK else escape[0]
    return f"{MARK}{escape['single'].lower()}" if escape["single"] else escape[0]

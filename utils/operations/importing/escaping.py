"""JSON text that `jsonb` takes and gives back without loss.

PostgreSQL's `jsonb` has neither NUL nor lone surrogates, and forgets that 1e23 was written as a float. So strings are
escaped by `MARK`, a character that nobody uses (the last one for private use), and numbers with an exponent are written
out.
"""

from __future__ import annotations

import re

MARK = "\U0010fffd"
#: Digits of a number on either side of the point; `numeric` has 131,072 before and 16,383 behind it (PostgreSQL manual,
#: 8.1.2).
DIGITS = 16_000

#: What has to be looked at closely: an escape of NUL or of a surrogate, the mark, an exponent, a very long number.
_ODD = re.compile(rf"\\u0000|\\u[dD][89a-fA-F]|{MARK}|[0-9][eE]|(?<![0-9])[0-9]{{{DIGITS // 4}}}")
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


class Unstorable(ValueError):
    """It cannot be kept as it is; the message says why."""


def storable_json(text: str) -> str:
    """Return JSON that `jsonb` takes; `original_json` undoes it. The text must be valid JSON.

    Raises `Unstorable` for a number of more than 16,000 digits.
    """
    return _TOKEN.sub(_storable_token, text) if _ODD.search(text) else text


def original_json(text: str) -> str:
    """Return what was given to `storable_json`, as PostgreSQL writes it."""
    return _MARKED.sub(lambda found: f"\\u{found['code']}" if found["code"] else MARK, text) if MARK in text else text


def storable_key(key: str) -> str:
    """Return a key that `text` takes; `original_key` undoes it."""
    if not _UNSTORABLE.search(key):
        return key
    return _UNSTORABLE.sub(lambda found: MARK + (MARK if found[0] == MARK else f"{ord(found[0]):04x}"), key)


def original_key(key: str) -> str:
    """Return what was given to `storable_key`."""
    if MARK not in key:
        return key
    return _MARKED.sub(lambda found: chr(int(found["code"], 16)) if found["code"] else MARK, key)


def _storable_token(token: re.Match[str]) -> str:
    if token["whole"] is None:
        return _ESCAPE.sub(_storable_escape, token[0])
    whole, fraction, exponent = token["whole"], token["fraction"] or "", token["exponent"]
    shift = 0
    if exponent is not None:
        shift = int(exponent) if len(exponent) < 10 else DIGITS * (-10 if exponent[0] == "-" else 10)
        if not (whole + fraction).strip("0"):
            shift = 0
    before, behind = len(whole) + shift, len(fraction) - shift
    if max(before, behind, len(whole), len(fraction)) > DIGITS:
        raise Unstorable(f"there is a number in it of more than {DIGITS:,} digits")
    if exponent is None:
        return token[0]
    digits = whole + fraction
    if before <= 0:
        digits, before = "0" * (1 - before) + digits, 1
    digits = digits.ljust(before, "0")
    # The point stays, also where nothing is behind it: who wrote 1e23 reads a float, and 10^23 is another number.
    return f"{token['sign']}{digits[:before].lstrip('0') or '0'}.{digits[before:] or '0'}"


def _storable_escape(escape: re.Match[str]) -> str:
    if escape[0] == MARK:
        return MARK + MARK
    if escape["pair"]:
        return MARK + MARK if escape["pair"].lower() == _PAIRED_MARK else escape[0]
    return f"{MARK}{escape['single'].lower()}" if escape["single"] else escape[0]

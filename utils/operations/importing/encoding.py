"""Recognizes the encoding of a JSON file by its first bytes, and refuses one that cannot be recognized."""

from __future__ import annotations

import codecs
import re
from typing import BinaryIO

from utils.exceptions import ValidationError

#: Error handler of decoders: a lone surrogate stands for what is invalid, so that it costs one entry.
MARK_INVALID = "guildbook.mark_invalid"
#: Lone surrogates in a file's text; JSON's own escapes are still ASCII there.
INVALID = re.compile("[\ud800-\udfff]")
#: Byte order marks; those of UTF-32 first, because one begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
#: Which of the first bytes are NUL without a mark: JSON begins with an ASCII character (RFC 4627, section 3).
_NULS = (
    (re.compile(rb"\0\0\0[^\0]", re.DOTALL), "utf-32-be"), (re.compile(rb"[^\0]\0\0\0", re.DOTALL), "utf-32-le"),
    (re.compile(rb"\0[^\0]", re.DOTALL), "utf-16-be"), (re.compile(rb"[^\0]\0", re.DOTALL), "utf-16-le"),
)  # fmt: skip
#: Encodings that need a byte order mark, or to be recognized, to know the order of bytes.
_WITHOUT_ORDER = ("utf-16", "utf-32")
_OTHER_LETTERS = re.compile("[^\x00-\x7f\ud800-\udfff]")
_BLOCK = 2**20

codecs.register_error(MARK_INVALID, lambda exc: ("\udcff", exc.end))  # type: ignore[attr-defined]


def recognize(beginning: bytes) -> tuple[str, int]:
    """Return the encoding of a file, given its first four bytes, and the length of its byte order mark."""
    for mark, name in _MARKS:
        if beginning.startswith(mark):
            return name, len(mark)
    return next((name for pattern, name in _NULS if pattern.match(beginning)), "utf-8"), 0


def resolve(encoding: str | None, beginning: bytes) -> tuple[str, int]:
    """Return the encoding to read a file with, and the length of its byte order mark.

    encoding: the one that the operator named; None: to be recognized. beginning: the first four bytes. Raises
    `ValidationError` if the file cannot be in that encoding.
    """
    recognized, mark = recognize(beginning)
    if encoding is None:
        return recognized, mark
    name = codecs.lookup(encoding).name
    if name in _WITHOUT_ORDER and beginning:
        if not recognized.startswith(name):
            raise ValidationError(
                f"it is not {encoding}: it begins neither with a byte order mark of {name.upper()} nor with an ASCII"
                " character in it; leave --encoding out to have it recognized"
            )
        return recognized, mark
    return encoding, mark if name == recognized else 0


def check_name(encoding: str) -> None:
    """Raise `ValidationError` if there is no such encoding of text."""
    try:
        codecs.getincrementaldecoder(encoding)(MARK_INVALID).decode("{}".encode(encoding), final=True)
    except (LookupError, ValueError):
        raise ValidationError(
            f"{encoding[:50]!r} is not an encoding: choose one that Python knows, such as utf-8, utf-16, windows-1252"
            " or shift_jis"
        ) from None


def refuse_8_bit(file: BinaryIO) -> None:
    """Raise `ValidationError` if an open file has more invalid than valid UTF-8 beyond ASCII; its position moves.

    It is then in one of many 8-bit encodings, which only its author knows. Otherwise its few invalid bytes are damage.
    """
    if recognize(file.read(4))[0] != "utf-8":
        return
    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    line, valid, invalid = 1, 0, 0
    first: tuple[int, int] | None = None
    while True:
        block = file.read(_BLOCK)
        text = decoder.decode(block, final=not block)
        if not text.isascii():
            valid += len(_OTHER_LETTERS.findall(text))
            invalid += len(INVALID.findall(text))
            if first is None and (found := INVALID.search(text)):
                first = line + text.count("\n", 0, found.start()), ord(found[0]) & 0xFF
        line += text.count("\n")
        if not block:
            break
    if first is not None and invalid > valid:
        raise ValidationError(
            f"it is not UTF-8 but has an 8-bit encoding, such as windows-1252 or ISO-8859-1 (line {first[0]} has byte"
            f" 0x{first[1]:02X}): import it from the command line with --encoding and its name, or convert it first"
        )

"""Large JSON files read entry by entry: an object of entries, an array of them, or JSON lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from utils.exceptions import ValidationError

#: Bytes that are read at once.
WINDOW = 2**18
#: Characters from which an entry is passed over: it is decoded in one piece, and nothing else in the process runs
#: meanwhile (measured: a million of empty lists, the slowest, 40 ms). Documents hold no more either.
ENTRY_CHARACTERS = 2**20
#: Characters that are kept of an entry that was passed over.
_KEPT = 1_000
#: Characters in front of the window's end within which an error may only mean that the rest was not read yet: more than
#: `-Infinity` and a pair of \uXXXX escapes, the longest tokens beside strings and numbers.
_CUT = 16
_SPACE = re.compile(r"[ \t\n\r]*")
#: What `surrogateescape` makes of bytes that are not UTF-8; JSON's own escapes are still ASCII in the file's text.
_FOREIGN = re.compile("[\ud800-\udfff]")
_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_BETWEEN = re.compile(r'[^"{}\[\],]*')
NO_JSON = "NaN and Infinity are no JSON"
NO_UTF8 = "there are bytes in it that are not UTF-8"
TOO_LONG = f"it is longer than {ENTRY_CHARACTERS:,} characters: split it"
TOO_DEEP = "it is nested too deep"
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, and where its value begins in the file (both from 1)."""

    #: None: it comes from an array or a line, and has only what is in it.
    key: str | None
    value: Any
    #: The value as the file has it.
    text: str
    line: int
    column: int
    #: Why it cannot be used; None: it can.
    problem: str | None = None


class Reader:
    """Reads the entries of one file, with one window and one entry in memory.

    Iterating raises `ValidationError` with line and column for what is no JSON; a wrong one of JSON lines is an entry
    with a problem, and the next is read.
    """

    def __init__(self, file: BinaryIO, *, lines: bool = False, window: int = WINDOW) -> None:
        """`lines`: JSON lines; `window`: bytes that are read at once."""
        self._file = file
        self._lines = lines
        self._size = window
        self._text = ""
        self._pos = 0
        self._ended = False
        self._constants = 0
        # The line of `_counted`, a position in the window, and how many characters of that line are in front of it.
        self._line, self._counted, self._column = 1, 0, 0
        #: Whether the file began with a byte order mark.
        self.marked: bool = False
        #: Bytes read so far.
        self.read: int = 0
        self._bytes: codecs.IncrementalDecoder | None = None
        self._decoder = json.JSONDecoder(parse_constant=self._constant)
        # Python makes no int of more than 4,300 digits; nobody here needs it as a number.
        self._lenient = json.JSONDecoder(parse_constant=self._constant, parse_int=float)

    def __iter__(self) -> Iterator[Entry]:
        opening = self._peek()
        if self._lines:
            yield from self._each_line()
            return
        if opening == "{":
            yield from self._inside("}")
        elif opening == "[":
            yield from self._inside("]")
        else:
            self._fail("an object {…} or an array […] of entries was expected" + ("" if opening else ", it is empty"))
        if self._peek():
            self._fail("there is more behind the end of the JSON; a file of JSON lines must be called .jsonl")

    def _inside(self, closing: str) -> Iterator[Entry]:
        self._pos += 1
        if self._peek() == closing:
            self._pos += 1
            return
        while True:
            key, wrong_key = None, None
            if closing == "}":
                if self._peek() != '"':
                    self._fail('a key in "…" was expected')
                key, _, wrong_key = self._value()
                if self._peek() != ":":
                    self._fail("a colon was expected behind the key")
                self._pos += 1
            self._peek()
            line, column = self._place(self._pos)
            value, text, problem = self._value()
            yield Entry(key, value, text, line, column, wrong_key or problem)
            following = self._peek()
            if following == closing:
                self._pos += 1
                return
            if following != ",":
                self._fail(f"a comma or the closing {closing} was expected")
            comma = self._place(self._pos)
            self._pos += 1
            if self._peek() == closing:
                self._fail(f"a comma stands in front of the closing {closing}: take it out", comma)

    def _each_line(self) -> Iterator[Entry]:
        while self._peek():
            while (end := self._text.find("\n", self._pos)) < 0 and not self._is_long() and self._fill():
                pass
            line, column = self._place(self._pos)
            if end < 0 and self._is_long():
                yield Entry(None, None, self._beginning(), line, column, TOO_LONG)
                while (end := self._text.find("\n", self._pos)) < 0:
                    self._pos = len(self._text)
                    if not self._fill():
                        return
                self._pos = end
                continue
            end = len(self._text) if end < 0 else end
            text = self._text[self._pos : end].strip(" \t\r")
            self._pos = end
            problem, before = None, self._constants
            value = None
            try:
                value = self._decode(text, 0)[0] if not self._rest(text) else None
            except json.JSONDecodeError as exc:
                problem = f"{exc.msg} (column {column + exc.pos})"
            except RecursionError:
                problem = TOO_DEEP
            if problem is None and self._constants > before:
                problem = NO_JSON
            yield Entry(None, value, text, line, column, NO_UTF8 if _FOREIGN.search(text) else problem)

    def _rest(self, text: str) -> bool:
        """Raise `JSONDecodeError` when there is more than one value in a text."""
        _, end = self._decode(text, 0)
        if end != len(text):
            raise json.JSONDecodeError("there is more behind the value", text, end)
        return False

    def _value(self) -> tuple[Any, str, str | None]:
        """Read one value and return it, its text, and what is wrong with it."""
        while True:
            before = self._constants
            try:
                value, end = self._decode(self._text, self._pos)
            except json.JSONDecodeError as exc:
                cut = exc.msg.startswith("Unterminated string") or exc.pos >= len(self._text) - _CUT
                if cut and self._is_long():
                    return self._passed_over(TOO_LONG)
                if not (cut and self._fill()):
                    self._fail(_plain(exc.msg), self._place(exc.pos))
                continue
            except RecursionError:
                return self._passed_over(TOO_DEEP)
            if end >= len(self._text) - 2 and self._text[end - 1] not in '"}]' and self._fill():
                continue  # a number may go on: 1 as 1.5, or as 1e+5
            text = self._text[self._pos : end]
            problem = NO_JSON if self._constants > before else None
            self._pos = end
            return value, text, NO_UTF8 if _FOREIGN.search(text) else problem

    def _is_long(self) -> bool:
        return len(self._text) - self._pos > ENTRY_CHARACTERS

    def _beginning(self) -> str:
        return self._text[self._pos : self._pos + _KEPT] + "…"

    def _passed_over(self, problem: str) -> tuple[None, str, str]:
        """Go behind a value without decoding it; only its brackets and strings are looked at."""
        kept, depth, is_string = self._beginning(), 0, False
        while True:
            match = (_IN_STRING if is_string else _BETWEEN).match(self._text, self._pos)
            assert match is not None, "it matches nothing, too"
            self._pos = match.end()
            rest = self._text[self._pos : self._pos + 1]
            if not rest or (is_string and rest == "\\"):  # an escape is cut in two
                if not self._fill():
                    self._fail("the file ends within a value")
                continue
            if not is_string and depth == 0 and rest in ",}]":  # a number
                return None, kept, problem
            self._pos += 1
            if rest == '"':
                is_string = not is_string
            else:
                depth += (rest in "{[") - (rest in "}]")
            if depth == 0 and not is_string and rest != ",":
                return None, kept, problem

    def _decode(self, text: str, pos: int) -> tuple[Any, int]:
        try:
            return self._decoder.raw_decode(text, pos)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self._lenient.raw_decode(text, pos)

    def _constant(self, name: str) -> None:
        self._constants += 1

    def _peek(self) -> str:
        """Skip white space and return the next character, '' at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._pos)
            assert match is not None, "it matches nothing, too"
            self._pos = match.end()
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._fill():
                return ""

    def _fill(self) -> bool:
        """Read more behind what is left of the window; return False, and leave it as it is, when there is no more."""
        if self._ended:
            return False
        left = len(self._text) - self._pos
        # Doubled each time, so that a long entry is not decoded again and again, but hardly beyond what is decoded.
        data = self._file.read(max(self._size, min(left, ENTRY_CHARACTERS + 1 - left)))
        self.read += len(data)
        self._ended = not data
        if self._bytes is None:
            while len(data) < 3 and (more := self._file.read(3 - len(data))):
                data += more
                self.read += len(more)
            mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))
            self.marked = bool(mark)
            data = data[len(mark) :]
            errors = "surrogateescape" if encoding == "utf-8" else "replace"
            self._bytes = codecs.getincrementaldecoder(encoding)(errors)
        text = self._bytes.decode(data, final=self._ended)
        if self._ended and not text:
            return False
        self._place(self._pos)
        self._text = self._text[self._pos :] + text
        self._pos = self._counted = 0
        return True

    def _place(self, pos: int) -> tuple[int, int]:
        """Return line and column of a position in the window; what is in front of it is not asked for again."""
        newlines = self._text.count("\n", self._counted, pos)
        if newlines:
            self._column = pos - self._text.rfind("\n", self._counted, pos) - 1
        else:
            self._column += pos - self._counted
        self._line += newlines
        self._counted = pos
        return self._line, self._column + 1

    def _fail(self, reason: str, place: tuple[int, int] | None = None) -> NoReturn:
        line, column = place or self._place(self._pos)
        raise ValidationError(f"line {line}, column {column}: {reason}")


def _plain(message: str) -> str:
    """Return what Python's decoder says, in our words where its own say little."""
    return {
        "Expecting value": "a value was expected",
        "Expecting ',' delimiter": "a comma or a closing bracket was expected",
        "Expecting ':' delimiter": "a colon was expected behind the key",
        "Expecting property name enclosed in double quotes": 'a key in "…" was expected (is there a comma too many?)',
        "Illegal trailing comma before end of object": "a comma stands in front of the closing }: take it out",
        "Illegal trailing comma before end of array": "a comma stands in front of the closing ]: take it out",
    }.get(message, message)

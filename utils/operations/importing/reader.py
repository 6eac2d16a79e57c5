"""Reads large JSON files entry by entry: an object of entries, an array of entries, or JSON lines; also nested ones."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, NoReturn, Protocol

from utils.exceptions import ValidationError
from utils.operations.importing.encoding import INVALID, MARK_INVALID, resolve

#: Number of bytes to read at once.
WINDOW = 2**18
#: Maximum length of an entry in characters; longer ones are skipped. An entry is decoded in one piece while holding the
#: GIL (in the worst case, a million empty lists, for 40 ms). Documents are limited to the same size.
ENTRY_CHARACTERS = 2**20
#: Number of characters kept of a skipped entry.
_EXCERPT = 1_000
#: An error within so many characters of the window's end may only mean that the rest has not been read yet: longer than
#: `-Infinity` and a pair of \uXXXX escapes, the longest tokens except strings and numbers.
_TAIL = 16
_SPACE = re.compile(r"[ \t\n\r]*")
_IN_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_BETWEEN = re.compile(r'[^"{}\[\],]*')
_FIRST_KEY = re.compile(r'[ \t\n\r]*([{\[])(?:[ \t\n\r]*("(?:[^"\\]|\\.){0,300}")[ \t\n\r]*:)?', re.DOTALL)
#: How far into a long value its outline is read.
_OUTLINE_DEPTH = 8
_OPENING = re.compile(r"[ \t\n\r]*\{")
_MEMBER = re.compile(r'[ \t\n\r]*("(?:[^"\\]|\\.){0,300}")[ \t\n\r]*:[ \t\n\r]*([{\[])?', re.DOTALL)
_COMMA = re.compile(r"[ \t\n\r]*,")
_SCALARS = json.JSONDecoder(parse_int=str)
NOT_JSON = "NaN and Infinity are not valid JSON"
INVALID_BYTES = "it contains bytes that are invalid in the file's encoding"
TOO_LONG = f"it is longer than {ENTRY_CHARACTERS:,} characters: split it"
TOO_DEEP = "it is nested too deeply"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, with the line and column (from 1) where its value begins."""

    #: None for an entry of an array or a line.
    key: str | None
    value: Any
    #: The value's text in the file.
    text: str
    line: int
    column: int
    #: Why the entry cannot be used; None if it can.
    problem: str | None = None
    #: The container that the entry is in, as the outline named it; None without an outline.
    scope: Any = None
    #: Number of values in it that are lost, because a later one in the same object has their key.
    replaced: int = 0


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that was not decoded, because it is too long: its brackets and keys up to the first value in it."""

    #: "{" or "[" for each level.
    brackets: str
    #: The first key of each object.
    keys: tuple[str, ...]
    #: The members of an object before the first that is itself an object or an array.
    fields: Mapping[str, Any] = field(default_factory=dict)
    #: The name and the beginning of that one; None if it was not found.
    inner: tuple[str, Unread] | None = None

    @property
    def has_entries(self) -> bool:
        """Whether it is an object, or an array of objects: what can be split into entries."""
        return self.brackets.startswith(("{", "[{"))


class Outline(Protocol):
    """Decides which values are read entry by entry, at any depth, instead of being one entry each."""

    def root(self, value: Any) -> Any | None:
        """Return the scope of the file, given its whole value or `Unread`; None if the file is one entry."""

    def descend(self, scope: Any, key: str | None, value: Any) -> Any | None:
        """Return the scope of a value's entries; None if the value, or `Unread`, is one entry."""

    def absorbs(self, entry: Entry) -> bool:
        """Return whether the outline combines this entry with others, to return it from `close`."""

    def close(self, scope: Any) -> Iterator[Entry]:
        """Return the combined entries of a scope when it ends."""


class Reader:
    """Iterates over the entries of one file, holding one window and one entry in memory.

    Raises `ValidationError` with line and column for invalid JSON. In JSON lines, an invalid line becomes an entry with
    a problem, and reading continues with the next line.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        lines: bool = False,
        window: int = WINDOW,
        outline: Outline | None = None,
        encoding: str | None = None,
        longest: int = ENTRY_CHARACTERS,
    ) -> None:
        """
        lines: the file contains JSON lines.
        window: number of bytes to read at once.
        outline: decides which values are read entry by entry; None: only the file itself.
        encoding: of the file; None: recognized by its first bytes.
        longest: maximum length of an entry in characters.
        """
        self._file = file
        self._outline = outline
        self._lines = lines
        self._size = window
        self._longest = longest
        self._text = ""
        self._pos = 0
        self._ended = False
        self._constants = 0
        self._replaced = 0
        # The line of `_counted`, a position in the window, and the number of characters before it in that line.
        self._line, self._counted, self._column = 1, 0, 0
        #: Whether the file begins with a byte order mark.
        self.has_bom: bool = False
        #: Of the file; None before anything was read, unless it was given.
        self.encoding: str | None = encoding
        #: Number of bytes read so far.
        self.read: int = 0
        self._bytes: codecs.IncrementalDecoder | None = None
        self._decoder = json.JSONDecoder(parse_constant=self._constant, object_pairs_hook=self._object)
        # Python refuses to parse integers of more than 4,300 digits. Floats do: only the text is stored.
        self._lenient = json.JSONDecoder(parse_constant=self._constant, parse_int=float, object_pairs_hook=self._object)

    def __iter__(self) -> Iterator[Entry]:
        opening = self._peek()
        if self._lines:
            yield from self._json_lines()
            return
        if opening and opening in "{[":
            scope = None
            if self._outline is not None:
                root = self._whole()
                scope = self._outline.root(root)
                if scope is None:
                    line, column = self._position(self._pos)
                    value, text, problem = self._value()
                    yield Entry(None, value, text, line, column, problem, replaced=self._replaced)
            if scope is not None or self._outline is None:
                yield from self._container(scope)
        else:
            self._fail("expected an object {…} or an array […] of entries" + ("" if opening else ", the file is empty"))
        if self._peek():
            self._fail("there is more text after the end of the JSON; a file of JSON lines must be named .jsonl")

    def _whole(self) -> Any:
        """Return the value of the whole file; `Unread` if it is too long, or not valid JSON."""
        while not self._is_long() and self._fill():
            pass
        if self._ended and not self._is_long():
            try:
                value, end = self._decode(self._text, self._pos)
            except (json.JSONDecodeError, RecursionError):
                return self._unread()
            if not self._text[end:].strip(" \t\n\r"):
                return value
        return self._unread()

    def _unread(self, start: int | None = None, depth: int = 0) -> Unread:
        start = self._pos if start is None else start
        pos, brackets, keys = start, "", list[str]()
        while len(brackets) < 8 and (match := _FIRST_KEY.match(self._text, pos)):
            brackets += match[1]
            if match[1] == "{":
                if not match[2]:
                    break
                try:
                    keys.append(json.loads(match[2], strict=False))
                except ValueError:
                    break
            pos = match.end()
        fields: dict[str, Any] = {}
        inner: tuple[str, Unread] | None = None
        opening = _OPENING.match(self._text, start)
        pos = -1 if opening is None or depth == _OUTLINE_DEPTH else opening.end()
        while pos >= 0 and inner is None and (member := _MEMBER.match(self._text, pos)):
            try:
                name = json.loads(member[1], strict=False)
                if member[2]:
                    inner = name, self._unread(member.start(2), depth + 1)
                    break
                fields[name], pos = _SCALARS.raw_decode(self._text, member.end())
            except (ValueError, RecursionError):
                break
            comma = _COMMA.match(self._text, pos)
            pos = -1 if comma is None else comma.end()
        return Unread(brackets, tuple(keys), fields, inner)

    def _container(self, scope: Any) -> Iterator[Entry]:
        closing = "}" if self._text[self._pos] == "{" else "]"
        self._pos += 1
        if self._peek() == closing:
            self._pos += 1
            return
        yield from self._entries_until(closing, scope)
        if self._outline is not None:
            yield from self._outline.close(scope)

    def _entries_until(self, closing: str, scope: Any) -> Iterator[Entry]:
        while True:
            key, wrong_key = None, None
            if closing == "}":
                if self._peek() != '"':
                    self._fail('expected a key in "…"')
                key, _, wrong_key = self._value()
                if self._peek() != ":":
                    self._fail("expected a colon after the key")
                self._pos += 1
            self._peek()
            line, column = self._position(self._pos)
            value, text, problem, inner = self._value_or_scope(scope, key, is_readable=wrong_key is None)
            if inner is not None:
                yield from self._container(inner)
            else:
                entry = Entry(key, value, text, line, column, wrong_key or problem, scope, self._replaced)
                if self._outline is None or not self._outline.absorbs(entry):
                    yield entry
            following = self._peek()
            if following == closing:
                self._pos += 1
                return
            if following != ",":
                self._fail(f"a comma or the closing {closing} was expected")
            comma = self._position(self._pos)
            self._pos += 1
            if self._peek() == closing:
                self._fail(f"remove the comma before the closing {closing}", comma)

    def _json_lines(self) -> Iterator[Entry]:
        outline, scope = self._outline, None
        if outline is not None:
            scope = outline.root([])  # a line is what an element of an array is
        while self._peek():
            while (end := self._text.find("\n", self._pos)) < 0 and not self._is_long() and self._fill():
                pass
            line, column = self._position(self._pos)
            if end < 0 and self._is_long():
                inner = None if outline is None else outline.descend(scope, None, self._unread())
                if inner is not None:
                    yield from self._container(inner)
                    continue
                yield Entry(None, None, self._excerpt(), line, column, TOO_LONG, scope)
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
            self._replaced = 0
            try:
                value = self._single_value(text)
            except json.JSONDecodeError as exc:
                problem = f"{exc.msg} (column {column + exc.pos})"
            except RecursionError:
                problem = TOO_DEEP
            if problem is None and self._constants > before:
                problem = NOT_JSON
            problem = INVALID_BYTES if INVALID.search(text) else problem
            inner = None if outline is None or problem else outline.descend(scope, None, value)
            if inner is None:
                yield Entry(None, value, text, line, column, problem, scope, self._replaced)
                continue
            for entry in self._in_text(text, inner):
                yield replace(entry, line=line, column=entry.column + column - 1)

    def _in_text(self, text: str, scope: Any) -> Iterator[Entry]:
        """Yield the entries of a container that is a whole text."""
        reader = Reader(
            io.BytesIO(text.encode()), encoding="utf-8", outline=self._outline, longest=self._longest, window=self._size
        )
        reader._peek()
        yield from reader._container(scope)

    def _single_value(self, text: str) -> Any:
        """Return the value of a text. Raises `JSONDecodeError` if it has more than one."""
        value, end = self._decode(text, 0)
        if end != len(text):
            raise json.JSONDecodeError("there is more text after the value", text, end)
        return value

    def _value_or_scope(
        self, scope: Any, key: str | None, *, is_readable: bool
    ) -> tuple[Any, str, str | None, Any | None]:
        """Read one value as `_value` does, or return the scope of its entries and stay at its beginning."""
        opening = self._text[self._pos : self._pos + 1]
        if self._outline is None or not is_readable or not opening or opening not in "{[":
            return (*self._value(), None)
        inner: list[Any] = []

        def descends() -> bool:
            assert self._outline is not None
            inner.append(self._outline.descend(scope, key, self._unread()))
            return inner[-1] is not None

        value, text, problem = self._value(descends)
        if value is not None and not inner:  # even with a problem: it may concern only one of its entries
            inner.append(self._outline.descend(scope, key, value))
            if inner[-1] is not None:
                self._pos -= len(text)
        return value, text, problem, inner[-1] if inner else None

    def _value(self, descends: Callable[[], bool] = lambda: False) -> tuple[Any, str, str | None]:
        """Read one value and return it, its text, and its problem (None if it can be used).

        If it is too long and `descends` returns True, stay at its beginning.
        """
        while True:
            before, self._replaced = self._constants, 0
            try:
                value, end = self._decode(self._text, self._pos)
            except json.JSONDecodeError as exc:
                may_be_cut = exc.msg.startswith("Unterminated string") or exc.pos >= len(self._text) - _TAIL
                if may_be_cut and self._is_long():
                    return (None, "", None) if descends() else self._skip_value(TOO_LONG)
                if not (may_be_cut and self._fill()):
                    self._fail(_plain(exc.msg), self._position(exc.pos))
                continue
            except RecursionError:
                return self._skip_value(TOO_DEEP)
            if end >= len(self._text) - 2 and self._text[end - 1] not in '"}]' and self._fill():
                continue  # a number may continue in the next window: 1 as 1.5 or 1e+5
            text = self._text[self._pos : end]
            problem = NOT_JSON if self._constants > before else None
            self._pos = end
            return value, text, INVALID_BYTES if INVALID.search(text) else problem

    def _is_long(self) -> bool:
        return len(self._text) - self._pos > self._longest

    def _excerpt(self) -> str:
        return self._text[self._pos : self._pos + _EXCERPT] + "…"

    def _skip_value(self, problem: str) -> tuple[None, str, str]:
        """Skip a value without decoding it, looking only at brackets and strings."""
        excerpt, depth, is_string = self._excerpt(), 0, False
        while True:
            match = (_IN_STRING if is_string else _BETWEEN).match(self._text, self._pos)
            assert match is not None, "the pattern also matches the empty string"
            self._pos = match.end()
            rest = self._text[self._pos : self._pos + 1]
            if not rest or (is_string and rest == "\\"):  # the window may end inside an escape
                if not self._fill():
                    self._fail("the file ends inside a value")
                continue
            if not is_string and depth == 0 and rest in ",}]":  # a number
                return None, excerpt, problem
            self._pos += 1
            if rest == '"':
                is_string = not is_string
            else:
                depth += (rest in "{[") - (rest in "}]")
            if depth == 0 and not is_string and rest != ",":
                return None, excerpt, problem

    def _decode(self, text: str, pos: int) -> tuple[Any, int]:
        try:
            return self._decoder.raw_decode(text, pos)
        except json.JSONDecodeError:
            raise
        except ValueError:
            return self._lenient.raw_decode(text, pos)

    def _constant(self, name: str) -> None:
        self._constants += 1

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._replaced += sum(not is_same(found[key], value) for key, value in pairs)
        return found

    def _peek(self) -> str:
        """Skip white space and return the next character, '' at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._pos)
            assert match is not None, "the pattern also matches the empty string"
            self._pos = match.end()
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._fill():
                return ""

    def _fill(self) -> bool:
        """Read more text after the rest of the window; return False at the end of the file."""
        if self._ended:
            return False
        left = len(self._text) - self._pos
        # Double the rest each time, so that a long entry is not decoded too often, up to the maximum entry length.
        data = self._file.read(max(self._size, min(left, self._longest + 1 - left)))
        self.read += len(data)
        self._ended = not data
        if self._bytes is None:
            while len(data) < 4 and (more := self._file.read(4 - len(data))):
                data += more
                self.read += len(more)
            self.encoding, mark = resolve(self.encoding, data[:4])
            data, self.has_bom = data[mark:], mark > 0
            self._bytes = codecs.getincrementaldecoder(self.encoding)(MARK_INVALID)
        try:
            text = self._bytes.decode(data, final=self._ended)
        except UnicodeError as exc:  # of a codec that does not mark what is invalid
            raise ValidationError(f"it cannot be read as {self.encoding}: {exc}") from None
        if self._ended and not text:
            return False
        self._position(self._pos)
        self._text = self._text[self._pos :] + text
        self._pos = self._counted = 0
        return True

    def _position(self, pos: int) -> tuple[int, int]:
        """Return line and column of a position in the window. Positions must not decrease between calls."""
        newlines = self._text.count("\n", self._counted, pos)
        if newlines:
            self._column = pos - self._text.rfind("\n", self._counted, pos) - 1
        else:
            self._column += pos - self._counted
        self._line += newlines
        self._counted = pos
        return self._line, self._column + 1

    def _fail(self, reason: str, place: tuple[int, int] | None = None) -> NoReturn:
        line, column = place or self._position(self._pos)
        raise ValidationError(f"line {line}, column {column}: {reason}")


def is_same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are the same; True and 1, or 1 and 1.0, are not."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def _plain(message: str) -> str:
    """Return a clearer message for an error of Python's JSON decoder."""
    return {
        "Expecting value": "expected a value",
        "Expecting ',' delimiter": "expected a comma or a closing bracket",
        "Expecting ':' delimiter": "expected a colon after the key",
        "Expecting property name enclosed in double quotes": 'expected a key in "…" (is there an extra comma?)',
        "Illegal trailing comma before end of object": "remove the comma before the closing }",
        "Illegal trailing comma before end of array": "remove the comma before the closing ]",
    }.get(message, message)

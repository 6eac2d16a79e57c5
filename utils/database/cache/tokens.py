"""A statement as tokens: what it calls, before anything parses it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
      (?P<blank>\s+|--[^\n]*)
    | (?P<comment>/\*)
    | (?P<text>[eE]'(?:[^'\\]|\\.|'')*'|(?:[uU]&|[bBxXnN])?'(?:[^']|'')*')
    | (?P<quoted>(?:[uU]&)?"(?:[^"]|"")*")
    | (?P<dollar>\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$)
    | (?P<parameter>\$\d+)
    | (?P<number>\d[\w.]*)
    | (?P<word>[^\W\d][\w$]*)
    | (?P<sign>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_VALUE = r"(?:\$\d+|\d+|NULL|DEFAULT)(?:::[\w ]++(?:\(\d+(?:,\s*\d+)?\))?(?:\[\])*)?"
_ROW = rf"\(\s*{_VALUE}(?:\s*,\s*{_VALUE})*\s*\)"
_MORE_ROWS = re.compile(rf"({_ROW})(?:\s*,\s*{_ROW})+", re.IGNORECASE)

#: Functions that are stable within one statement, but depend on time, session or privileges.
_CONTEXTUAL = re.compile(
    r"(pg_|has_|txid_|mxid_|current_|inet_(client|server)|to_reg|binary_upgrade_).*|.*_to_xml(schema|_and_xmlschema)?"
    r"|now|age|version|lastval|currval|row_security_active|getpgusername|getdatabaseencoding|format_type"
    r"|(obj|col|shobj)_description|(statement|transaction|clock)_timestamp|timeofday|ts_stat|ts_debug|ts_rewrite"
)
#: Words that depend on them without a call. System catalogs that a view reads appear only in its text.
_CONTEXTUAL_WORDS = re.compile(
    r"pg_\w+|information_schema|current_\w+|localtime|localtimestamp|session_user|system_user|user|tablesample"
    r"|reg(class|type|proc|procedure|oper|operator|role|namespace|collation)"
)
#: Text literals that depend on the current time when cast to a time.
_SPECIAL_TIME = re.compile(r"\w*&?'\s*(?:now|today|tomorrow|yesterday)\b", re.IGNORECASE)


class Token(NamedTuple):
    """One token. `kind` is the name of a group of the pattern, `text` is as written, but words are in lower case;
    `is_apart`: a blank or comment precedes it."""

    kind: str
    text: str
    is_apart: bool = False

    @property
    def name(self) -> str | None:
        """The identifier, or None for any other token."""
        if self.kind == "word":
            return self.text
        return self.text[1:-1].replace('""', '"') if self.kind == "quoted" and self.text[0] == '"' else None


class Effects(NamedTuple):
    """What the functions in a text do. `is_deterministic`: the result depends on nothing but rows."""

    is_deterministic: bool
    may_write: bool


@dataclass(frozen=True, slots=True)
class FunctionNames:
    """The names of functions by what they do, and of keywords that look like functions."""

    #: Built-in, immutable or stable.
    builtin: frozenset[str]
    #: Not built in: of an extension or a user.
    foreign: frozenset[str]
    volatile: frozenset[str]
    #: Foreign and volatile: may write anything.
    writing: frozenset[str]
    keywords: frozenset[str]

    def effects_of(self, text: str | list[Token]) -> Effects:
        """Look at every call in a text (or its tokens), and at other words that depend on time or session."""
        tokens = tokenize(text) if isinstance(text, str) else text
        is_deterministic, may_write = True, False
        before: str | None = None
        for position, token in enumerate(tokens):
            name = token.name
            if token.kind == "text" and _SPECIAL_TIME.match(token.text):
                is_deterministic = False
            elif name is not None:
                is_called = position + 1 < len(tokens) and tokens[position + 1].text == "("
                if _CONTEXTUAL_WORDS.fullmatch(name) or (is_called and _CONTEXTUAL.fullmatch(name)):
                    is_deterministic = False
                if is_called or before == ".":  # `row.f` calls f(row)
                    may_write |= name in self.writing
                    is_deterministic &= name not in self.foreign and (before == "." or name not in self.volatile)
                if is_called and not self._knows(token):
                    is_list = before in ("as", ")", "with", "recursive", "into") or before == "."
                    is_deterministic &= is_list
                    may_write |= not is_list and before != ","
            before = token.text
        return Effects(is_deterministic, may_write)

    def _knows(self, token: Token) -> bool:
        return (
            token.name in self.builtin
            or token.name in self.foreign
            or token.name in self.volatile
            or (token.kind == "word" and token.text in self.keywords)
        )


def tokenize(sql: str) -> list[Token]:
    """Return the tokens, without blanks and comments."""
    tokens = []
    is_apart = False
    position, end = 0, len(sql)
    while position < end:
        match = _TOKEN.match(sql, position)
        assert match is not None
        kind = str(match.lastgroup if match.lastgroup != "tag" else "dollar")
        position = match.end()
        if kind == "comment":
            position = _end_of_comment(sql, position)
        elif kind != "blank":
            text = match.group()
            tokens.append(Token(kind, text.lower() if kind == "word" else text, is_apart))
        is_apart = kind in ("blank", "comment")
    return tokens


def shorten_values(sql: str) -> str:
    """Return the text with one row of each VALUES list: the others read and write the same."""
    return _MORE_ROWS.sub(r"\1", sql)


def to_parsable(tokens: list[Token]) -> str:
    """Return the text without comments and with names instead of parameters, which sqlglot cannot parse everywhere."""
    return "".join(
        (" " if token.is_apart else "") + (f"_p{token.text[1:]}" if token.kind == "parameter" else token.text)
        for token in tokens
    )


def _end_of_comment(sql: str, position: int) -> int:
    depth = 1
    while depth:
        edge = _COMMENT_EDGE.search(sql, position)
        if edge is None:
            return len(sql)
        depth += 1 if edge.group() == "/*" else -1
        position = edge.end()
    return position

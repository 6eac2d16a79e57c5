"""A statement as words: what it calls, before anything tries to parse it."""

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

#: Functions that are steady for PostgreSQL within one statement, but not from one to the next, or not for everybody.
_MOMENTARY = re.compile(
    r"(pg_|has_|txid_|mxid_|current_|inet_(client|server)|to_reg|binary_upgrade_).*|.*_to_xml(schema|_and_xmlschema)?"
    r"|now|age|version|lastval|currval|row_security_active|getpgusername|getdatabaseencoding|format_type"
    r"|(obj|col|shobj)_description|(statement|transaction|clock)_timestamp|timeofday|ts_stat|ts_debug|ts_rewrite"
)
#: Words that are so without being called; of what a view reads of the system catalogue, only its text tells.
_MOMENTARY_WORDS = re.compile(
    r"pg_\w+|information_schema|current_\w+|localtime|localtimestamp|session_user|system_user|user|tablesample"
    r"|reg(class|type|proc|procedure|oper|operator|role|namespace|collation)"
)
#: What a text literal may say that means another moment each time, when it is cast to a time.
_SPECIAL_TIME = re.compile(r"\w*&?'\s*(?:now|today|tomorrow|yesterday)\b", re.IGNORECASE)


class Token(NamedTuple):
    """One token: `kind` is a group's name of the pattern, `text` as written, but words in small letters;
    `is_apart`: a blank or comment stands before it."""

    kind: str
    text: str
    is_apart: bool = False

    @property
    def name(self) -> str | None:
        """The identifier that this is, or None."""
        if self.kind == "word":
            return self.text
        return self.text[1:-1].replace('""', '"') if self.kind == "quoted" and self.text[0] == '"' else None


class Judgement(NamedTuple):
    """What the functions of a text mean: `is_steady`: nothing but rows decides its result."""

    is_steady: bool
    may_write: bool


@dataclass(frozen=True, slots=True)
class Words:
    """The names of functions, and of what only looks like one."""

    #: PostgreSQL's own, immutable or stable.
    steady: frozenset[str]
    #: Somebody else's: an extension's, a user's.
    foreign: frozenset[str]
    volatile: frozenset[str]
    #: Foreign and volatile: may write whatever it likes.
    writing: frozenset[str]
    keywords: frozenset[str]

    def judge(self, text: str | list[Token]) -> Judgement:
        """Look at every call in a text (or its tokens) and at everything else that differs from moment to moment."""
        tokens = tokens_of(text) if isinstance(text, str) else text
        is_steady, may_write = True, False
        before: str | None = None
        for position, token in enumerate(tokens):
            name = token.name
            if token.kind == "text" and _SPECIAL_TIME.match(token.text):
                is_steady = False
            elif name is not None:
                is_called = position + 1 < len(tokens) and tokens[position + 1].text == "("
                if _MOMENTARY_WORDS.fullmatch(name) or (is_called and _MOMENTARY.fullmatch(name)):
                    is_steady = False
                if is_called or before == ".":  # `row.f` calls f(row)
                    may_write |= name in self.writing
                    is_steady &= name not in self.foreign and (before == "." or name not in self.volatile)
                if is_called and not self._knows(token):
                    is_list = before in ("as", ")", "with", "recursive", "into") or before == "."
                    is_steady &= is_list
                    may_write |= not is_list and before != ","
            before = token.text
        return Judgement(is_steady, may_write)

    def _knows(self, token: Token) -> bool:
        return (
            token.name in self.steady
            or token.name in self.foreign
            or token.name in self.volatile
            or (token.kind == "word" and token.text in self.keywords)
        )


def tokens_of(sql: str) -> list[Token]:
    """Return the tokens without blanks and comments."""
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


def shortened(sql: str) -> str:
    """Return the text with one row of each long VALUES list: the others read and write nothing else."""
    return _MORE_ROWS.sub(r"\1", sql)


def parsable(tokens: list[Token]) -> str:
    """Return the text without comments and with names for its parameters, over which sqlglot would stumble."""
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

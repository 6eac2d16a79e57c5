"""What a statement of a migration does to others who use the database meanwhile.

From PostgreSQL's manual: 13.3 Explicit Locking for the locks and who waits for them; ALTER TABLE, Notes, for what
rewrites or scans a table; CREATE INDEX, "Building Indexes Concurrently". Where it depends (a change of type that keeps
the bytes, say) the worse is said. What no rule is about is marked as unknown, not as harmless.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from sqlglot.tokenizer_core import Token

Kind = Literal["drops", "rewrites", "scans", "blocks writes", "locks", "changes rows", "lets be", "unknown"]

#: Letters of a statement that are shown in a list.
TITLE = 120
_SHORTLY = "ACCESS EXCLUSIVE, shortly: readers and writers wait until the transaction ends"
_SCANNED = "every row is checked under ACCESS EXCLUSIVE: nobody reads or writes meanwhile"

#: Patterns of whole statements, upper case, texts left out, and what they do; the first that fits decides.
_STATEMENTS: tuple[tuple[str, Kind, str], ...] = (
    (r"(BEGIN|START TRANSACTION|COMMIT|END|SET|RESET|COMMENT ON|GRANT|REVOKE|ANALYZE)\b", "lets be", ""),
    (r"(UPDATE|DELETE FROM|INSERT INTO) ALEMBIC_VERSION\b", "lets be", "Alembic's own line"),
    (r"CREATE( \w+)* TABLE .* PARTITION OF\b", "locks", f"of the partitioned table: {_SHORTLY}"),
    (r"CREATE( \w+)* TABLE .*\bREFERENCES\b", "locks", "SHARE ROW EXCLUSIVE of the table referred to, shortly"),
    (r"CREATE( \w+)* TABLE [^(]* AS\b", "lets be", "reads what it is made of"),
    (r"CREATE( GLOBAL| LOCAL| TEMP| TEMPORARY| UNLOGGED)* TABLE\b", "lets be", "a new table"),
    (r"CREATE( UNIQUE)? INDEX CONCURRENTLY\b", "lets be", "SHARE UPDATE EXCLUSIVE; waits for older transactions"),
    (r"CREATE( UNIQUE)? INDEX\b", "blocks writes", "SHARE, as long as the index is built"),
    (r"CREATE OR REPLACE VIEW\b", "locks", f"of the view: {_SHORTLY}"),
    (r"CREATE (MATERIALIZED )?VIEW\b", "lets be", "a new view"),
    (r"CREATE( OR REPLACE)?( CONSTRAINT)? TRIGGER\b", "locks", "SHARE ROW EXCLUSIVE, shortly: writers wait"),
    (r"CREATE (SCHEMA|SEQUENCE|TYPE|DOMAIN|EXTENSION|STATISTICS)\b", "lets be", ""),
    (r"CREATE( OR REPLACE)? (FUNCTION|PROCEDURE)\b", "lets be", ""),
    (r"DROP INDEX CONCURRENTLY\b", "drops", "an index, no rows: SHARE UPDATE EXCLUSIVE, others go on"),
    (r"DROP INDEX\b", "drops", f"an index, no rows: {_SHORTLY}"),
    (r"DROP (VIEW|FUNCTION|PROCEDURE|TRIGGER)\b", "drops", f"no rows: {_SHORTLY}"),
    (r"DROP SCHEMA .*\bCASCADE\b", "drops", "everything in it"),
    (r"DROP (TABLE|MATERIALIZED VIEW)\b", "drops", f"every row: {_SHORTLY}"),
    (r"DROP\b", "drops", ""),
    (r"TRUNCATE\b", "drops", f"every row: {_SHORTLY}"),
    (r"DELETE FROM\b", "drops", "rows; ROW EXCLUSIVE, writers of the same rows wait"),
    (r"(UPDATE|MERGE INTO)\b", "changes rows", "ROW EXCLUSIVE, writers of the same rows wait until the end"),
    (r"INSERT INTO\b", "lets be", "ROW EXCLUSIVE"),
    (r"LOCK\b", "locks", "what it says, until the transaction ends"),
    (r"REINDEX .*\bCONCURRENTLY\b", "lets be", "SHARE UPDATE EXCLUSIVE"),
    (r"REINDEX\b", "blocks writes", "SHARE, as long as the index is built; readers of the index wait too"),
    (r"REFRESH MATERIALIZED VIEW CONCURRENTLY\b", "lets be", "EXCLUSIVE of the view: readers go on"),
    (r"REFRESH MATERIALIZED VIEW\b", "locks", "ACCESS EXCLUSIVE of the view until it is filled"),
    (r"(CLUSTER|VACUUM FULL|VACUUM \( ?FULL)\b", "rewrites", "under ACCESS EXCLUSIVE"),
    (r"ALTER (SEQUENCE|INDEX|VIEW|TYPE|SCHEMA|MATERIALIZED VIEW)\b", "locks", f"of that alone: {_SHORTLY}"),
)  # fmt: skip

_CONSTRAINT = r"ADD( CONSTRAINT \S+)? "
#: An ADD COLUMN whose default every row shares (ALTER TABLE, Notes): no row is touched.
_CONSTANT = r"DEFAULT ('' ?|[-+]? ?[\d.]+ ?|TRUE ?|FALSE ?|NULL ?|NOW \( \) ?|CURRENT_\w+ ?)(:: ?[\w \[\]]+)?"

#: Patterns of what ALTER TABLE does, part by part.
_ALTERATIONS: tuple[tuple[str, Kind, str], ...] = (
    (rf"{_CONSTRAINT}.*\bNOT VALID\b", "locks", f"{_SHORTLY}; rows that are there are not checked"),
    (rf"{_CONSTRAINT}.*\bUSING INDEX\b", "locks", _SHORTLY),
    (rf"{_CONSTRAINT}CHECK\b", "scans", _SCANNED),
    (rf"{_CONSTRAINT}FOREIGN KEY\b", "scans", "every row is checked under SHARE ROW EXCLUSIVE of both tables"),
    (rf"{_CONSTRAINT}(UNIQUE|PRIMARY KEY|EXCLUDE)\b", "scans", "an index is built under ACCESS EXCLUSIVE"),
    (r"ADD CONSTRAINT\b", "scans", _SCANNED),
    (r"ADD .*\b(GENERATED|IDENTITY|SMALLSERIAL|SERIAL|BIGSERIAL)\b", "rewrites", "every row gets its own value"),
    (r"ADD .*\b(UNIQUE|PRIMARY KEY|REFERENCES|CHECK)\b", "scans", _SCANNED),
    (rf"ADD .*{_CONSTANT}( NOT NULL| NULL)*$", "locks", f"{_SHORTLY}; no row is rewritten"),
    (r"ADD .*\bDEFAULT\b", "rewrites", "a default that is another for each row, under ACCESS EXCLUSIVE"),
    (r"ADD\b", "locks", f"{_SHORTLY}; no row is rewritten"),
    (r"DROP CONSTRAINT\b", "drops", f"a rule, no rows: {_SHORTLY}"),
    (r"DROP\b", "drops", f"the column with what is in it: {_SHORTLY}"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+( SET DATA)? TYPE\b", "rewrites", "with every index, under ACCESS EXCLUSIVE"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ SET NOT NULL\b", "scans", _SCANNED),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ ADD GENERATED\b", "locks", _SHORTLY),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ SET STATISTICS\b", "lets be", "SHARE UPDATE EXCLUSIVE"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ SET EXPRESSION\b", "rewrites", "under ACCESS EXCLUSIVE"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ (SET|DROP|RESET)\b", "locks", _SHORTLY),
    (r"VALIDATE CONSTRAINT\b", "lets be", "every row is checked, under SHARE UPDATE EXCLUSIVE"),
    (r"ATTACH PARTITION\b", "scans", "the new partition, unless a CHECK of its own says what is in it"),
    (r"DETACH PARTITION .*\bCONCURRENTLY\b", "lets be", "SHARE UPDATE EXCLUSIVE; waits for older transactions"),
    (r"DETACH PARTITION\b", "locks", _SHORTLY),
    (r"SET (LOGGED|UNLOGGED|TABLESPACE|ACCESS METHOD|WITHOUT)\b", "rewrites", "under ACCESS EXCLUSIVE"),
    (r"(RE)?SET \(", "lets be", "SHARE UPDATE EXCLUSIVE"),
    (r"RENAME\b", "locks", f"{_SHORTLY}; code that has the old name fails"),
    (r"(SET SCHEMA|OWNER TO|ENABLE|DISABLE|INHERIT|NO INHERIT|CLUSTER|REPLICA|FORCE|NO FORCE)\b", "locks", _SHORTLY),
)  # fmt: skip

_ALTER_TABLE = re.compile(r"ALTER TABLE( IF EXISTS)?( ONLY)? (?P<name>\S+( \. \S+)?)( \*)? ")
_MADE = re.compile(r"CREATE( \w+)* TABLE( IF NOT EXISTS)? (?P<name>\S+( \. \S+)?)")
_INDEXED = re.compile(r"CREATE( UNIQUE)? INDEX .*? ON( ONLY)? (?P<name>\S+( \. \S+)?)")


@dataclass(frozen=True, slots=True)
class Remark:
    """What a statement does to others."""

    kind: Kind
    #: "" where the kind says it all.
    text: str

    def __str__(self) -> str:
        return f"-- {self.kind}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True, slots=True)
class Statement:
    """A piece of SQL up to its semicolon."""

    #: Blanks and comments before it.
    before: str
    sql: str
    #: The statement on one line, shortened.
    title: str
    #: Empty for what is no statement, and for what only opens or ends a transaction.
    remarks: tuple[Remark, ...]

    @property
    def is_destructive(self) -> bool:
        """Whether something that is there is gone afterwards."""
        return any(remark.kind == "drops" for remark in self.remarks)

    def remarked(self) -> str:
        """Return the SQL as it was, with the remarks in lines above it."""
        return self.before + "".join(f"{remark}\n" for remark in self.remarks) + self.sql


def read(sql: str) -> list[Statement]:
    """Split SQL at its semicolons, and say of each statement what it does; put together it is the SQL that went in."""
    from sqlglot.dialects.postgres import Postgres
    from sqlglot.errors import TokenError  # takes a while, and few need it
    from sqlglot.tokenizer_core import TokenType

    class Tokenizer(Postgres.Tokenizer):
        # It takes the rest of these statements for one word up to the next semicolon, also one inside a text.
        COMMANDS: ClassVar[set[TokenType]] = set()

    try:
        tokens = Tokenizer(dialect=Postgres).tokenize(sql)
    except TokenError:
        return [Statement("", sql, " ".join(sql.split())[:TITLE], (Remark("unknown", "it could not be read"),))]
    found: list[Statement] = []
    made: set[str] = set()
    at = 0
    current: list[Token] = []
    for token in tokens:
        if token.token_type != TokenType.SEMICOLON:
            current.append(token)
            continue
        if current:
            found.append(_statement(sql, at, current, token.end + 1, made))
            at, current = token.end + 1, []
    if current:
        end = current[-1].end + 1
        found.append(_statement(sql, at, current, end, made))
        at = end
    if sql[at:]:
        found.append(Statement(sql[at:], "", "", ()))
    return found


def _statement(sql: str, at: int, tokens: Sequence[Token], end: int, made: set[str]) -> Statement:
    start = tokens[0].start
    words = _plain(sql, tokens)
    remarks = tuple(remark for remark in _remarks(words, made) if remark.text or remark.kind != "lets be")
    new = _MADE.match(words)
    if new is not None:
        made.add(new["name"])
    title = " ".join(sql[start:end].rstrip(";").split())
    return Statement(sql[at:start], sql[start:end], title if len(title) <= TITLE else f"{title[: TITLE - 1]}…", remarks)


def _plain(sql: str, tokens: Sequence[Token]) -> str:
    """Return a statement in upper case, one blank between words, without what its texts say; "Names" stay."""
    words: list[str] = []
    for token in tokens:
        raw = sql[token.start : token.end + 1]
        if raw.startswith('"'):
            words.append(raw.replace(" ", "_"))
        elif raw.endswith("'") or raw.startswith("$"):
            words.append("''")
        else:
            words.append(" ".join(raw.upper().split()))
    return " ".join(words)


def _remarks(words: str, made: set[str]) -> Iterator[Remark]:
    altered = _ALTER_TABLE.match(words)
    if altered is not None:
        for part in _parts(words[altered.end() :]):
            remark = _first(part, _ALTERATIONS)
            yield _on_new(remark) if altered["name"] in made else remark
        return
    indexed = _INDEXED.match(words)
    remark = _first(words, _STATEMENTS)
    yield _on_new(remark) if indexed is not None and indexed["name"] in made else remark


def _on_new(remark: Remark) -> Remark:
    if remark.kind in ("drops", "unknown"):
        return remark
    return Remark("lets be", "its table is made above: nobody else uses it yet")


def _first(words: str, rules: Sequence[tuple[str, Kind, str]]) -> Remark:
    for pattern, kind, text in rules:
        if re.match(pattern, words):
            return Remark(kind, text)
    return Remark("unknown", "no rule is about it: look up what it locks")


def _parts(words: str) -> Iterator[str]:
    """Split at the commas outside of parentheses."""
    depth, begun = 0, 0
    for place, letter in enumerate(words):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        elif letter == "," and not depth:
            yield words[begun:place].strip()
            begun = place + 1
    yield words[begun:].strip()

"""What each SQL statement of a migration does to other users of the database.

From PostgreSQL's manual: 13.3 Explicit Locking for the locks and who waits for them; ALTER TABLE, Notes, for what
rewrites or scans a table; CREATE INDEX, "Building Indexes Concurrently". Where it depends (say, a change of type that
keeps the bytes), the worse case is assumed. A statement that no rule matches is unknown, not safe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from sqlglot.tokenizer_core import Token

Kind = Literal["drops", "fails", "rewrites", "scans", "blocks writes", "locks", "changes rows", "safe", "unknown"]

#: Most characters of a statement's title.
TITLE_LENGTH = 120
_BRIEFLY = "ACCESS EXCLUSIVE, briefly: readers and writers wait until the transaction ends"
_SCANNED = "every row is checked under ACCESS EXCLUSIVE: nobody reads or writes meanwhile; fails if one violates it"
_REFERENCED = "every row is checked under SHARE ROW EXCLUSIVE of both tables; fails if one violates it"
_INDEXED = "an index is built under ACCESS EXCLUSIVE; fails on duplicates"
_NO_VALUE = "if the table has rows, which would have no value: add it with a default, or nullable, and fill it first"
_ONE_VALUE = "if the table has more than one row: all of them would have the same value"

#: Patterns of normalized statements (see `_normalize`) and their effects; the first match decides.
_STATEMENTS: tuple[tuple[str, Kind, str], ...] = (
    (r"(BEGIN|START TRANSACTION|COMMIT|END|SET|RESET|COMMENT ON|GRANT|REVOKE|ANALYZE)\b", "safe", ""),
    (r"(UPDATE|DELETE FROM|INSERT INTO) (\S+ \. )?(ALEMBIC|GUILDBOOK)_VERSION\b", "safe", "the row with the revision"),
    (r"CREATE( \w+)* TABLE .* PARTITION OF\b", "locks", f"the partitioned table: {_BRIEFLY}"),
    (r"CREATE( \w+)* TABLE .*\bREFERENCES\b", "locks", "SHARE ROW EXCLUSIVE of the referenced table, briefly"),
    (r"CREATE( \w+)* TABLE [^(]* AS\b", "safe", "reads the source tables"),
    (r"CREATE( GLOBAL| LOCAL| TEMP| TEMPORARY| UNLOGGED)* TABLE\b", "safe", "a new table"),
    (r"CREATE( UNIQUE)? INDEX CONCURRENTLY\b", "safe", "SHARE UPDATE EXCLUSIVE; waits for older transactions"),
    (r"CREATE UNIQUE INDEX\b", "blocks writes", "SHARE, while the index is built; fails on duplicates"),
    (r"CREATE INDEX\b", "blocks writes", "SHARE, while the index is built"),
    (r"CREATE OR REPLACE VIEW\b", "locks", f"the view: {_BRIEFLY}"),
    (r"CREATE (MATERIALIZED )?VIEW\b", "safe", "a new view"),
    (r"CREATE( OR REPLACE)?( CONSTRAINT)? TRIGGER\b", "locks", "SHARE ROW EXCLUSIVE, briefly: writers wait"),
    (r"CREATE (SCHEMA|SEQUENCE|TYPE|DOMAIN|EXTENSION|STATISTICS)\b", "safe", ""),
    (r"CREATE( OR REPLACE)? (FUNCTION|PROCEDURE)\b", "safe", ""),
    (r"DROP INDEX CONCURRENTLY\b", "drops", "an index, no rows: SHARE UPDATE EXCLUSIVE, nobody waits"),
    (r"DROP INDEX\b", "drops", f"an index, no rows: {_BRIEFLY}"),
    (r"DROP (VIEW|FUNCTION|PROCEDURE|TRIGGER)\b", "drops", f"no rows: {_BRIEFLY}"),
    (r"DROP SCHEMA .*\bCASCADE\b", "drops", "everything in it"),
    (r"DROP (TABLE|MATERIALIZED VIEW)\b", "drops", f"every row: {_BRIEFLY}"),
    (r"DROP\b", "drops", ""),
    (r"TRUNCATE\b", "drops", f"every row: {_BRIEFLY}"),
    (r"DELETE FROM\b", "drops", "rows; ROW EXCLUSIVE, writers of the same rows wait"),
    (r"(UPDATE|MERGE INTO)\b", "changes rows", "ROW EXCLUSIVE, writers of the same rows wait until the end"),
    (r"INSERT INTO\b", "safe", "ROW EXCLUSIVE"),
    (r"LOCK\b", "locks", "the mode it names, until the transaction ends"),
    (r"REINDEX .*\bCONCURRENTLY\b", "safe", "SHARE UPDATE EXCLUSIVE"),
    (r"REINDEX\b", "blocks writes", "SHARE, while the index is built; readers of the index wait too"),
    (r"REFRESH MATERIALIZED VIEW CONCURRENTLY\b", "safe", "EXCLUSIVE of the view: readers do not wait"),
    (r"REFRESH MATERIALIZED VIEW\b", "locks", "ACCESS EXCLUSIVE of the view until it is filled"),
    (r"(CLUSTER|VACUUM FULL|VACUUM \( ?FULL)\b", "rewrites", "under ACCESS EXCLUSIVE"),
    (r"ALTER (SEQUENCE|INDEX|VIEW|TYPE|SCHEMA|MATERIALIZED VIEW)\b", "locks", f"only that object: {_BRIEFLY}"),
)  # fmt: skip

_CONSTRAINT = r"ADD( CONSTRAINT \S+)? "
#: The default of an ADD COLUMN that is the same for every row (ALTER TABLE, Notes): no row is rewritten.
_CONSTANT = r"DEFAULT ('' ?|[-+]? ?[\d.]+ ?|TRUE ?|FALSE ?|NULL ?|NOW \( \) ?|CURRENT_\w+ ?)(:: ?[\w \[\]]+)?"

#: ADD of a column, not of a constraint.
_COLUMN = r"ADD (?!CONSTRAINT\b|CHECK\b|UNIQUE\b|PRIMARY\b|FOREIGN\b|EXCLUDE\b)"
#: What gives existing rows a value for a new column.
_VALUE = r"\b(DEFAULT (?!NULL\b)|GENERATED\b|IDENTITY\b|SMALLSERIAL\b|SERIAL\b|BIGSERIAL\b)"

#: The same for each subcommand of ALTER TABLE.
_ALTERATIONS: tuple[tuple[str, Kind, str], ...] = (
    (rf"{_CONSTRAINT}.*\bNOT VALID\b", "locks", f"{_BRIEFLY}; existing rows are not checked"),
    (rf"{_CONSTRAINT}.*\bUSING INDEX\b", "locks", _BRIEFLY),
    (rf"{_CONSTRAINT}CHECK\b", "scans", _SCANNED),
    (rf"{_CONSTRAINT}FOREIGN KEY\b", "scans", _REFERENCED),
    (rf"{_CONSTRAINT}(UNIQUE|PRIMARY KEY|EXCLUDE)\b", "scans", _INDEXED),
    (r"ADD CONSTRAINT\b", "scans", _SCANNED),
    (rf"{_COLUMN}(?!.*{_VALUE}).*\b(NOT NULL|PRIMARY KEY)\b", "fails", _NO_VALUE),
    (rf"{_COLUMN}.*\b{_CONSTANT}.*\b(UNIQUE|PRIMARY KEY)\b", "fails", _ONE_VALUE),
    (r"ADD .*\b(GENERATED|IDENTITY|SMALLSERIAL|SERIAL|BIGSERIAL)\b", "rewrites", "every row gets its own value"),
    (r"ADD .*\b(UNIQUE|PRIMARY KEY|REFERENCES|CHECK)\b", "scans", _SCANNED),
    (rf"ADD .*{_CONSTANT}( NOT NULL| NULL)*$", "locks", f"{_BRIEFLY}; no row is rewritten"),
    (r"ADD .*\bDEFAULT\b", "rewrites", "the default differs from row to row; under ACCESS EXCLUSIVE"),
    (r"ADD\b", "locks", f"{_BRIEFLY}; no row is rewritten"),
    (r"DROP CONSTRAINT\b", "drops", f"a constraint, no rows: {_BRIEFLY}"),
    (r"DROP\b", "drops", f"the column and its values: {_BRIEFLY}"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+( SET DATA)? TYPE\b", "rewrites", "with every index, under ACCESS EXCLUSIVE"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ SET NOT NULL\b", "scans", _SCANNED),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ ADD GENERATED\b", "locks", _BRIEFLY),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ SET STATISTICS\b", "safe", "SHARE UPDATE EXCLUSIVE"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ SET EXPRESSION\b", "rewrites", "under ACCESS EXCLUSIVE"),
    (r"ALTER (COLUMN )?(?!COLUMN )\S+ (SET|DROP|RESET)\b", "locks", _BRIEFLY),
    (r"VALIDATE CONSTRAINT\b", "safe", "every row is checked, under SHARE UPDATE EXCLUSIVE"),
    (r"ATTACH PARTITION\b", "scans", "the new partition, unless it has a matching CHECK constraint"),
    (r"DETACH PARTITION .*\bCONCURRENTLY\b", "safe", "SHARE UPDATE EXCLUSIVE; waits for older transactions"),
    (r"DETACH PARTITION\b", "locks", _BRIEFLY),
    (r"SET (LOGGED|UNLOGGED|TABLESPACE|ACCESS METHOD|WITHOUT)\b", "rewrites", "under ACCESS EXCLUSIVE"),
    (r"(RE)?SET \(", "safe", "SHARE UPDATE EXCLUSIVE"),
    (r"RENAME\b", "locks", f"{_BRIEFLY}; code that uses the old name fails"),
    (r"(SET SCHEMA|OWNER TO|ENABLE|DISABLE|INHERIT|NO INHERIT|CLUSTER|REPLICA|FORCE|NO FORCE)\b", "locks", _BRIEFLY),
)  # fmt: skip

#: What is dropped without a row: our own bookkeeping of batches included.
_KEEPS_ROWS = re.compile(
    r"DROP (INDEX|(MATERIALIZED )?VIEW|FUNCTION|PROCEDURE|TRIGGER|CONSTRAINT|TABLE (IF EXISTS )?GUILDBOOK_BATCHES)\b"
)
_ALTER_TABLE = re.compile(r"ALTER TABLE( IF EXISTS)?( ONLY)? (?P<name>\S+( \. \S+)?)( \*)? ")
_CREATE_TABLE = re.compile(r"CREATE( \w+)* TABLE( IF NOT EXISTS)? (?P<name>\S+( \. \S+)?)")
_CREATE_INDEX = re.compile(r"CREATE( UNIQUE)? INDEX .*? ON( ONLY)? (?P<name>\S+( \. \S+)?)")


@dataclass(frozen=True, slots=True)
class Effect:
    """What a statement does to other users of the database."""

    kind: Kind
    #: Empty where the kind says it all.
    text: str
    #: Whether rows, or values in them, are lost that nothing can bring back.
    loses_rows: bool = False

    def __str__(self) -> str:
        return f"-- {self.kind}" + (f": {self.text}" if self.text else "")


@dataclass(frozen=True, slots=True)
class Statement:
    """A piece of SQL up to its semicolon."""

    #: White space and comments before it.
    before: str
    sql: str
    #: The statement on one line, shortened.
    title: str
    #: Empty for trailing white space, and for statements that only open or end a transaction.
    effects: tuple[Effect, ...]

    @property
    def is_destructive(self) -> bool:
        """Whether it drops or deletes anything."""
        return any(effect.kind == "drops" for effect in self.effects)

    @property
    def is_failing(self) -> bool:
        """Whether it fails on a table that has rows."""
        return any(effect.kind == "fails" for effect in self.effects)

    @property
    def loses_rows(self) -> bool:
        """Whether rows, or values in them, are lost that nothing can bring back."""
        return any(effect.loses_rows for effect in self.effects)

    def annotated(self) -> str:
        """Return the original SQL with the effects as comments above it."""
        return self.before + "".join(f"{effect}\n" for effect in self.effects) + self.sql


def parse(sql: str) -> list[Statement]:
    """Split SQL at its semicolons and classify each statement. Joined, the pieces are the original SQL."""
    from sqlglot.dialects.postgres import Postgres  # slow to import, rarely needed
    from sqlglot.errors import TokenError
    from sqlglot.tokenizer_core import TokenType

    class Tokenizer(Postgres.Tokenizer):
        # By default it reads the rest of these statements as one token up to the next semicolon, even one in a string.
        COMMANDS: ClassVar[set[TokenType]] = set()

    try:
        tokens = Tokenizer(dialect=Postgres).tokenize(sql)
    except TokenError:
        title = " ".join(sql.split())[:TITLE_LENGTH]
        return [Statement("", sql, title, (Effect("unknown", "it could not be parsed"),))]
    statements: list[Statement] = []
    created: set[str] = set()
    position = 0
    current: list[Token] = []
    for token in tokens:
        if token.token_type != TokenType.SEMICOLON:
            current.append(token)
        elif current:
            statements.append(_statement(sql, position, current, token.end + 1, created))
            position, current = token.end + 1, []
    if current:
        end = current[-1].end + 1
        statements.append(_statement(sql, position, current, end, created))
        position = end
    if sql[position:]:
        statements.append(Statement(sql[position:], "", "", ()))
    return statements


def _statement(sql: str, position: int, tokens: Sequence[Token], end: int, created: set[str]) -> Statement:
    start = tokens[0].start
    normalized = _normalize(sql, tokens)
    effects = tuple(effect for effect in _classify(normalized, created) if effect.text or effect.kind != "safe")
    table = _CREATE_TABLE.match(normalized)
    if table is not None:
        created.add(table["name"])
    title = " ".join(sql[start:end].rstrip(";").split())
    if len(title) > TITLE_LENGTH:
        title = f"{title[: TITLE_LENGTH - 1]}…"
    return Statement(sql[position:start], sql[start:end], title, effects)


def _normalize(sql: str, tokens: Sequence[Token]) -> str:
    """Return a statement in upper case, words separated by one space, strings emptied, quoted names unchanged."""
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


def _classify(statement: str, created: set[str]) -> Iterator[Effect]:
    """Yield the effects of a normalized statement. `created`: tables that earlier statements created."""
    alter = _ALTER_TABLE.match(statement)
    if alter is not None:
        for subcommand in _split_at_commas(statement[alter.end() :]):
            effect = _first_match(subcommand, _ALTERATIONS)
            yield _on_new_table(effect) if alter["name"] in created else effect
        return
    index = _CREATE_INDEX.match(statement)
    effect = _first_match(statement, _STATEMENTS)
    yield _on_new_table(effect) if index is not None and index["name"] in created else effect


def _on_new_table(effect: Effect) -> Effect:
    if effect.kind in ("drops", "unknown"):
        return effect
    return Effect("safe", "its table is created above: nobody uses it yet")


def _first_match(sql: str, rules: Sequence[tuple[str, Kind, str]]) -> Effect:
    for pattern, kind, text in rules:
        if re.match(pattern, sql):
            return Effect(kind, text, loses_rows=kind == "drops" and not _KEEPS_ROWS.match(sql))
    return Effect("unknown", "no rule matches: look up what it locks")


def _split_at_commas(sql: str) -> Iterator[str]:
    """Split at the commas outside of parentheses."""
    depth, start = 0, 0
    for position, character in enumerate(sql):
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        elif character == "," and not depth:
            yield sql[start:position].strip()
            start = position + 1
    yield sql[start:].strip()

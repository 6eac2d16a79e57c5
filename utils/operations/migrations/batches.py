"""Changing many rows in a migration without one long transaction: in batches that a killed migration goes on from.

A revision that changes rows holds nothing else, because what it did is committed before its number is::

    def upgrade() -> None:
        in_batches(op, "members", revision=revision, set_sql="nick = btrim(nick)", where="nick <> btrim(nick)")

The table `guildbook_batches` remembers how far it came. It is there only while a migration is under way, and each batch
and its line in it are one statement, so that no row is changed twice: not even `xp = xp * 10` needs a `where`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from utils.exceptions import MigrationError

_log = logging.getLogger(__name__)

#: How far migrations came; made by the first batch, dropped with the number of the revision.
TABLE = "guildbook_batches"
#: Rows of one batch: some 50 ms, for which other writers of these rows wait.
SIZE = 5_000
#: Seconds between two lines in the log.
SAY_SECONDS = 10.0

_LONE_COLON = re.compile(r"(?<!:):(?!:)")

_MAKE = """
CREATE TABLE IF NOT EXISTS guildbook_batches (
    revision text, part text, last text[], visited bigint NOT NULL DEFAULT 0, changed bigint NOT NULL DEFAULT 0,
    is_done boolean NOT NULL DEFAULT false, PRIMARY KEY (revision, part)
)
"""
_KEY = """
SELECT a.attname, quote_ident(a.attname) AS name, format_type(a.atttypid, a.atttypmod) AS type
FROM pg_index AS i CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k(attnum, position)
JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indrelid = to_regclass(:table) AND i.indisprimary ORDER BY k.position
"""


@dataclass(frozen=True, slots=True)
class Batched:
    """How far it is: rows looked at and rows changed, by earlier runs too."""

    visited: int
    changed: int
    is_done: bool


def in_batches(
    op: Any, table: str, *, revision: str, set_sql: str, where: str = "true", part: str = "", size: int = SIZE
) -> None:
    """Change the rows of a table that `where` picks, batch by batch in the order of its primary key, from a revision.

    `op`: Alembic's; `table`: its name, with the schema where it is not the usual one; `set_sql` and `where`: SQL that
    calls the row `t`, never made of values of people's; `revision`: the revision's own; `part` tells two passes over
    one table apart; `size`: rows of a batch. Rows that the bot adds meanwhile may be left out: let a default, or the
    code that is deployed with it, fill those. Without a database (`preview`) it is the one UPDATE that it amounts to.
    Raises `MigrationError` for a table without a primary key.
    """
    if op.get_context().as_sql:
        op.execute(
            "-- in batches, each committed by itself, when Guildbook runs it\n"
            + " ".join(("UPDATE", table, "AS t SET", set_sql, "WHERE", where))
        )
        return
    with op.get_context().autocommit_block():
        walk(op.get_bind(), table, revision=revision, set_sql=set_sql, where=where, part=part, size=size)


def walk(
    connection: Connection,
    table: str,
    *,
    revision: str,
    set_sql: str,
    where: str = "true",
    part: str = "",
    size: int = SIZE,
    after_batch: Callable[[Batched], None] | None = None,
) -> Batched:
    """Do what `in_batches` says on a connection that commits every statement, from where an earlier run stopped."""
    if size < 1:
        raise MigrationError(f"a batch of {size} rows changes nothing: expected at least 1")
    key = [(row.name, row.type) for row in connection.execute(text(_KEY), {"table": table})]
    if not key:
        raise MigrationError(f"{table} cannot be changed in batches: there is no such table, or it has no primary key")
    mark = {"revision": revision, "part": f"{table} {part}".strip()}
    connection.execute(text(_MAKE))
    connection.execute(
        text("INSERT INTO guildbook_batches (revision, part) VALUES (:revision, :part) ON CONFLICT DO NOTHING"), mark
    )
    set_sql, where = (_LONE_COLON.sub(r"\\:", sql) for sql in (set_sql, where))  # in '12:30' it is no parameter
    first, further = (text(_statement(table, key, set_sql, where, is_first=flag)) for flag in (True, False))
    read = text(
        "SELECT last, visited, changed, is_done FROM guildbook_batches WHERE revision = :revision AND part = :part"
    )
    told = time.monotonic()
    while True:
        row = connection.execute(read, mark).one()
        state = Batched(row.visited, row.changed, row.is_done)
        if after_batch is not None:
            after_batch(state)
        if state.is_done:
            return state
        if time.monotonic() - told > SAY_SECONDS:
            told = time.monotonic()
            _log.info("changing %s: %s rows looked at so far", table, f"{state.visited:,}")
        lower = {f"k{number}": value for number, value in enumerate(row.last or ())}
        connection.execute(further if lower else first, {**mark, **lower, "size": size})


def forget(connection: Connection, revisions: Sequence[str]) -> None:
    """Take back what is remembered of revisions, in the transaction that writes their number."""
    if connection.scalar(text("SELECT to_regclass('guildbook_batches') IS NULL")):
        return
    connection.execute(
        text("DELETE FROM guildbook_batches WHERE revision = ANY(:revisions)"), {"revisions": list(revisions)}
    )
    if not connection.scalar(text("SELECT count(*) FROM guildbook_batches")):
        connection.execute(text("DROP TABLE guildbook_batches"))


def _statement(table: str, key: Sequence[tuple[str, str]], set_sql: str, where: str, *, is_first: bool) -> str:
    """Return the statement of one batch: the page of keys, its rows locked in their order, changed, and noted."""
    aliases = [f"batch_key_{number}" for number in range(len(key))]  # so that a bare name is the row's own column
    own = ", ".join("t." + name for name, _ in key)
    selected = ", ".join(f"t.{name} AS {alias}" for (name, _), alias in zip(key, aliases, strict=True))
    same = " AND ".join(f"t.{name} = {alias}" for (name, _), alias in zip(key, aliases, strict=True))
    bound = ", ".join(f"CAST(CAST(:k{number} AS text) AS {kind})" for number, (_, kind) in enumerate(key))
    return " ".join(
        (
            *("WITH page AS (SELECT", selected, "FROM", table, "AS t"),
            *(() if is_first else ("WHERE (", own, ") > (", bound, ")")),
            *("ORDER BY", own, "LIMIT :size),"),
            *("picked AS (SELECT", selected, "FROM", table, "AS t JOIN page ON", same),
            *("WHERE (", where, ") ORDER BY", own, "FOR NO KEY UPDATE OF t),"),
            *("done AS (UPDATE", table, "AS t SET", set_sql, "FROM picked WHERE", same, "RETURNING 1)"),
            "UPDATE guildbook_batches AS b SET visited = b.visited + (SELECT count(*) FROM page),",
            "changed = b.changed + (SELECT count(*) FROM done), is_done = (SELECT count(*) FROM page) < :size,",
            *("last = coalesce((SELECT ARRAY[", ", ".join(f"{alias}::text" for alias in aliases), "] FROM page"),
            *("ORDER BY", ", ".join(f"{alias} DESC" for alias in aliases), "LIMIT 1), b.last)"),
            "WHERE b.revision = :revision AND b.part = :part",
        )
    )

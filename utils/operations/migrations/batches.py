"""Change many rows in a migration without one long transaction: in batches, each committed by itself.

A revision that changes rows must do nothing else, because its batches are committed before its number is::

    def upgrade() -> None:
        in_batches(op, "members", revision=revision, set_sql="nick = btrim(nick)", where="nick <> btrim(nick)")

The table `guildbook_batches` records the progress, and a killed migration continues from there. It exists only while a
migration runs. Each batch updates it in the same statement, so that no row is changed twice: not even `xp = xp * 10`
needs a `where`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from utils.database.ownership import BATCHES_TABLE
from utils.exceptions import MigrationError

_log = logging.getLogger(__name__)

#: Created by the first batch, dropped in the transaction that sets the revision.
TABLE = BATCHES_TABLE
#: Rows of one batch: about 50 ms, during which other writers of these rows wait.
SIZE = 5_000
#: Seconds between two log lines.
LOG_SECONDS = 10.0

_LONE_COLON = re.compile(r"(?<!:):(?!:)")

_CREATE = """
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
class BatchProgress:
    """Rows visited and rows changed so far, including earlier runs."""

    visited: int
    changed: int
    is_done: bool


def in_batches(
    op: Any, table: str, *, revision: str, set_sql: str, where: str = "true", part: str = "", size: int = SIZE
) -> None:
    """Update the rows of a table in batches, in the order of its primary key. Called in a revision's `upgrade`.

    Rows that the bot inserts meanwhile may be missed: fill those with a column default or in the code. Without a
    database (`preview`), it writes the equivalent single UPDATE.

    Parameters
    ----------
    op: Alembic's `op`.
    table: the table's name, with its schema unless that is on the search path.
    revision: the revision's own id.
    set_sql, where: SQL in which the row is named `t`. Never built from user input.
    part: tells several passes over one table apart.
    size: rows in a batch.

    Raises
    ------
    MigrationError: the table does not exist or has no primary key.
    """
    if op.get_context().as_sql:
        op.execute(
            "-- Guildbook runs it in batches, each committed by itself\n"
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
    after_batch: Callable[[BatchProgress], None] | None = None,
) -> BatchProgress:
    """Run or continue `in_batches` on a connection that commits every statement."""
    if size < 1:
        raise MigrationError(f"the batch size must be at least 1, not {size}")
    key = [(row.name, row.type) for row in connection.execute(text(_KEY), {"table": table})]
    if not key:
        raise MigrationError(f"cannot update {table} in batches: it does not exist or has no primary key")
    batch = {"revision": revision, "part": f"{table} {part}".strip()}
    connection.execute(text(_CREATE))
    connection.execute(
        text("INSERT INTO guildbook_batches (revision, part) VALUES (:revision, :part) ON CONFLICT DO NOTHING"),
        batch,
    )
    set_sql, where = (_LONE_COLON.sub(r"\\:", sql) for sql in (set_sql, where))  # '12:30' has no parameter
    first, further = (text(_statement(table, key, set_sql, where, is_first=flag)) for flag in (True, False))
    read = text(
        "SELECT last, visited, changed, is_done FROM guildbook_batches WHERE revision = :revision AND part = :part"
    )
    logged_at = time.monotonic()
    while True:
        row = connection.execute(read, batch).one()
        state = BatchProgress(row.visited, row.changed, row.is_done)
        if after_batch is not None:
            after_batch(state)
        if state.is_done:
            return state
        if time.monotonic() - logged_at > LOG_SECONDS:
            logged_at = time.monotonic()
            _log.info("updating %s in batches", table, extra={"visited": state.visited, "changed": state.changed})
        lower = {f"k{number}": value for number, value in enumerate(row.last or ())}
        connection.execute(further if lower else first, {**batch, **lower, "size": size})


def forget(connection: Connection, revisions: Sequence[str]) -> None:
    """Delete the progress of revisions, in the transaction that sets their number."""
    if connection.scalar(text("SELECT to_regclass(format('%I.guildbook_batches', current_schema())) IS NULL")):
        return
    connection.execute(
        text("DELETE FROM guildbook_batches WHERE revision = ANY(:revisions)"), {"revisions": list(revisions)}
    )
    if not connection.scalar(text("SELECT count(*) FROM guildbook_batches")):
        connection.execute(text("DROP TABLE guildbook_batches"))


def _statement(table: str, key: Sequence[tuple[str, str]], set_sql: str, where: str, *, is_first: bool) -> str:
    """Return the statement of one batch: select a page of keys, lock and update its rows, record progress."""
    # An unqualified name in `set_sql` must mean the row's own column.
    aliases = [f"batch_key_{number}" for number in range(len(key))]
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

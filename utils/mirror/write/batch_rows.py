"""Writes rows of batches into the tables of cogs, together with the position that their journal has reached."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache

import asyncpg
import orjson

from utils.database import Connection, Pool
from utils.database.sql import quote_identifier
from utils.exceptions import ValidationError, is_transient
from utils.mirror.records.batch_rows import BatchRow, BatchTarget, DecodedRow, RowGroup, decode_row, group_rows
from utils.mirror.write import events
from utils.mirror.write.dead_letters import bury_batch_rows
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: How long a row or table that a cog has locked is waited for. The rows are then tried again, with a pause.
_LIMIT_LOCKS = "SET LOCAL lock_timeout = '5s'"
#: A deferred constraint would otherwise fail the commit, and nothing would tell which row is at fault.
_CHECK_AT_ONCE = "SET CONSTRAINTS ALL IMMEDIATE"
#: SQLSTATEs of class 42 that are about a single row: a policy of row security, a privilege on a column.
_ROW_STATES = ("42501",)


async def write_batch_rows(pool: Pool, fence: Fence, journal: str, rows: Sequence[BatchRow], upto: int) -> set[str]:
    """Write rows of one journal, oldest first, and the position that they reach; return the tables written.

    Rows that are already in the database are left out. A row that its table refuses becomes a dead letter, in the same
    transaction. Raises `DatabaseError` when the database cannot take any now, `LeaseLost` when another process holds
    the lease.
    """
    decoded = _decode(rows)
    refused: list[tuple[DecodedRow, asyncpg.PostgresError]] = []
    async with pool.transaction() as connection:
        await fence.check(connection)
        position = await connection.fetchval(events.SELECT_POSITION, journal) or 0
        new = [row for row in decoded if row.stamp > position]
        if new:
            await connection.execute(_LIMIT_LOCKS)
            await connection.execute(_CHECK_AT_ONCE)
            await _write(connection, new, refused)
            await bury_batch_rows(connection, refused)
        await connection.execute(events.ADVANCE_POSITION, journal, upto)
    for table in {row.target.table for row, _ in refused}:
        errors = [error for row, error in refused if row.target.table == table]
        _log.error("%s refused %s rows of a batch; moved to ops.dead_letters: %s", table, len(errors), errors[0])
    return {row.target.table for row in decoded}


def _decode(rows: Iterable[BatchRow]) -> list[DecodedRow]:
    decoded: list[DecodedRow] = []
    for row in rows:
        try:
            decoded.append(decode_row(row))
        except ValidationError as error:
            _log.error("journal record skipped: %s", error, extra={"stamp": row.stamp})
    return decoded


async def _write(
    connection: Connection, rows: Sequence[DecodedRow], refused: list[tuple[DecodedRow, asyncpg.PostgresError]]
) -> None:
    """Write rows inside a transaction; halve what a table refuses until the bad row is alone, and add it to `refused`.

    Raises what is not about a row or a table.
    """
    for group in group_rows(rows):
        try:
            async with connection.transaction():
                await connection.execute(upsert(group.target, group.columns), _to_json(group))
        except asyncpg.PostgresError as error:
            if is_transient(error):
                raise
            if len(group.rows) == 1 or (_is_about_all(error) and not _has_several_shapes(group)):
                refused += [(row, error) for row in group.rows]
            else:
                half = len(group.rows) // 2
                await _write(connection, group.rows[:half], refused)
                await _write(connection, group.rows[half:], refused)


def _is_about_all(error: asyncpg.PostgresError) -> bool:
    """Return whether no row of the statement can be written: a table or a column does not exist (any more)."""
    state: str = getattr(error, "sqlstate", None) or ""
    return state.startswith("42") and state not in _ROW_STATES


def _has_several_shapes(group: RowGroup) -> bool:
    """Return whether rows with different columns were combined: a column that is missing is not about all of them."""
    return len({frozenset(row.values) for row in group.rows}) > 1


def _to_json(group: RowGroup) -> str:
    return orjson.dumps(group.combined).decode()


@cache
def upsert(target: BatchTarget, columns: tuple[str, ...]) -> str:
    """Return the statement that adds rows to a table. Parameter: the rows, as a JSON array of objects.

    The table itself tells the types of the columns: the cog and its models need not be loaded.
    """
    table = quote_identifier(target.table)
    keys = ", ".join(quote_identifier(name) for name in target.keys)
    names = ", ".join(quote_identifier(name) for name in (*target.keys, *columns))
    assignments = ", ".join(_assignment(name, is_added=name in target.increments) for name in columns)
    return f"""\
INSERT INTO {table} AS t ({names})
SELECT {names} FROM jsonb_populate_recordset(NULL::{table}, $1::text::jsonb)
ORDER BY {keys}
ON CONFLICT ({keys}) DO {f"UPDATE SET {assignments}" if columns else "NOTHING"}
"""


def _assignment(name: str, *, is_added: bool) -> str:
    column = quote_identifier(name)
    return f"{column} = coalesce(t.{column}, 0) + excluded.{column}" if is_added else f"{column} = excluded.{column}"

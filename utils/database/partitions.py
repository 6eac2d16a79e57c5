"""Monthly partitions of the append-only tables, by their time-ordered ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime

from models import DISCORD_EPOCH_MS, Base
from utils.database.placement import placement_on
from utils.database.pool import Connection, Pool

_log = logging.getLogger(__name__)

#: Advisory lock for creating partitions: "partitio" as a bigint.
LOCK_KEY = 0x7061727469746966
#: Seconds to wait for a table lock: writers queue behind the wait.
LOCK_SECONDS = 5.0


def partitioned_tables() -> list[str]:
    """Return the names of the tables that are partitioned by month."""
    return [
        table.name
        for table in Base.metadata.sorted_tables
        if table.dialect_options["postgresql"]["partition_by"] == "RANGE (id)"
    ]


def month_start(year: int, month: int) -> datetime:
    """Return the start of a month in UTC; months beyond 12 are in the following years."""
    years, index = divmod(month - 1, 12)
    return datetime(year + years, index + 1, 1, tzinfo=UTC)


def id_at(moment: datetime) -> int:
    """Return the smallest time-ordered id for a time (Discord API reference, "Snowflake IDs in Pagination")."""
    return (round(moment.timestamp() * 1000) - DISCORD_EPOCH_MS) << 22


async def ensure_partitions(
    conn: Connection, now: datetime, months_ahead: int = 2, *, lock_seconds: float = LOCK_SECONDS
) -> list[str]:
    """Create the missing partitions from this month to `months_ahead` months later; return their names.

    Rows of such a month in the default partition are moved in the same transaction. Raises asyncpg's
    `LockNotAvailableError` when a table stays locked for `lock_seconds`: until the next call the default partition
    takes the rows.
    """
    created: list[str] = []
    for table, name, start, end in _expected(now, months_ahead):
        if not await _exists(conn, table, name) and await _create(conn, table, name, start, end, lock_seconds):
            created.append(name)
    return created


async def find_missing(where: Connection | Pool, now: datetime, months_ahead: int = 2) -> list[str]:
    """Return the names of the partitions that `ensure_partitions` would create."""
    return [name for table, name, _, _ in _expected(now, months_ahead) if not await _exists(where, table, name)]


def _expected(now: datetime, months_ahead: int) -> Iterator[tuple[str, str, datetime, datetime]]:
    """Yield the table, name, start and end of each partition from this month on."""
    utc = now.astimezone(UTC)
    for table in partitioned_tables():
        for month in range(utc.month, utc.month + months_ahead + 1):
            start, end = month_start(utc.year, month), month_start(utc.year, month + 1)
            yield table, f"{table}_y{start:%Y}m{start:%m}", start, end


async def _create(conn: Connection, table: str, name: str, start: datetime, end: datetime, lock_seconds: float) -> bool:
    low, high = id_at(start), id_at(end)
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = {round(lock_seconds * 1000)}")
        await conn.execute("SELECT pg_advisory_xact_lock($1)", placement_on(conn).lock_key(LOCK_KEY))
        if await _exists(conn, table, name):
            return False  # another process created it meanwhile
        # Created separately and attached: CREATE TABLE … PARTITION OF would block readers of the whole table.
        await conn.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
        await conn.execute(f"LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE")
        moved = await conn.fetchval(
            f"WITH moved AS (DELETE FROM {table}_default WHERE id >= $1 AND id < $2 RETURNING *),"  # noqa: S608
            f" inserted AS (INSERT INTO {name} SELECT * FROM moved RETURNING 1) SELECT count(*) FROM inserted",
            low,
            high,
        )
        await conn.execute(f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({low}) TO ({high})")
    _log.info("created partition %s", name, extra={"rows_moved": moved})
    return True


async def _exists(conn: Connection | Pool, table: str, name: str) -> bool:
    # Not to_regclass, which answers from a cache that is not refreshed by waiting for an advisory lock.
    query = "SELECT FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
    query += " WHERE i.inhparent = $1::text::regclass AND c.relname = $2"
    return bool(await conn.fetchval(f"SELECT EXISTS ({query})", table, name))

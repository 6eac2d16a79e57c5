"""Monthly partitions of the tables that only grow, cut by their time-ordered ids."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from models import DISCORD_EPOCH_MS, Base
from utils.database.pool import Connection

_log = logging.getLogger(__name__)

#: Serialises two processes that make partitions at once; "partitio" as a bigint.
LOCK_KEY = 0x7061727469746966
#: Seconds to wait for the tables' locks: those who write must not wait longer for us.
LOCK_TIMEOUT = "5s"


def partitioned_tables() -> list[str]:
    """Return the names of the tables that are cut into months."""
    return [
        table.name
        for table in Base.metadata.sorted_tables
        if table.dialect_options["postgresql"]["partition_by"] == "RANGE (id)"
    ]


def month_start(year: int, month: int) -> datetime:
    """Return the first moment of a month, UTC; months beyond 12 run on into the next years."""
    years, index = divmod(month - 1, 12)
    return datetime(year + years, index + 1, 1, tzinfo=UTC)


def id_at(moment: datetime) -> int:
    """Return the smallest time-ordered id of a moment (Discord API reference, "Snowflake IDs in Pagination")."""
    return (round(moment.timestamp() * 1000) - DISCORD_EPOCH_MS) << 22


async def ensure_partitions(conn: Connection, now: datetime, months_ahead: int = 2) -> list[str]:
    """Make the partitions from this month to `months_ahead` months later; return the names of the new ones.

    Rows of such a month that landed in the default partition are moved, in the same transaction. Nothing is done for
    a month that has its partition. Raises asyncpg's `LockNotAvailableError` when the tables stay locked for 5 s: the
    default partition takes the rows meanwhile, so the next call catches up.
    """
    made: list[str] = []
    utc = now.astimezone(UTC)
    for table in partitioned_tables():
        for month in range(utc.month, utc.month + months_ahead + 1):
            start, end = month_start(utc.year, month), month_start(utc.year, month + 1)
            name = f"{table}_y{start:%Y}m{start:%m}"
            if not await _exists(conn, table, name) and await _make(conn, table, name, start, end):
                made.append(name)
    return made


async def _make(conn: Connection, table: str, name: str, start: datetime, end: datetime) -> bool:
    low, high = id_at(start), id_at(end)
    async with conn.transaction():
        await conn.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        await conn.execute("SELECT pg_advisory_xact_lock($1)", LOCK_KEY)
        if await _exists(conn, table, name):
            return False  # another process made it while we waited
        # Made apart and attached: CREATE TABLE … PARTITION OF would lock out all readers of the whole table.
        await conn.execute(f"CREATE TABLE {name} (LIKE {table} INCLUDING DEFAULTS INCLUDING CONSTRAINTS)")
        await conn.execute(f"LOCK TABLE {table}_default IN ACCESS EXCLUSIVE MODE")
        moved = await conn.fetchval(
            f"WITH moved AS (DELETE FROM {table}_default WHERE id >= $1 AND id < $2 RETURNING *),"  # noqa: S608
            f" kept AS (INSERT INTO {name} SELECT * FROM moved RETURNING 1) SELECT count(*) FROM kept",
            low,
            high,
        )
        await conn.execute(f"ALTER TABLE {table} ATTACH PARTITION {name} FOR VALUES FROM ({low}) TO ({high})")
    _log.info("partition %s made", name, extra={"rows_moved": moved})
    return True


async def _exists(conn: Connection, table: str, name: str) -> bool:
    # Not to_regclass: it answers from a cache that waiting for an advisory lock does not bring up to date.
    query = "SELECT FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
    query += " WHERE i.inhparent = $1::text::regclass AND c.relname = $2"
    return bool(await conn.fetchval(f"SELECT EXISTS ({query})", table, name))

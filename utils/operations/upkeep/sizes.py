"""How large the tables are, and how they grew: samples in `ops.table_sizes`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from utils.database import Pool

#: Seconds between two samples.
SAMPLE_SECONDS = 6 * 3_600.0
#: Days for which samples are kept; of those older than a month the first of each day.
KEPT_DAYS, FINE_DAYS = 400, 31

#: Name, estimated rows and bytes of every table that is not a catalogue's, partitions counted with their table.
#: A table that was never analysed has -1 rows (PostgreSQL manual, pg_class): its live rows are asked of the statistics.
_SIZES = """
SELECT CASE WHEN n.nspname = 'public' THEN c.relname ELSE n.nspname || '.' || c.relname END AS name, sizes.rows,
    sizes.bytes, sizes.dead
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT coalesce(sum(CASE WHEN l.reltuples < 0 THEN s.n_live_tup ELSE l.reltuples::bigint END), 0)::bigint AS rows,
        coalesce(sum(pg_total_relation_size(l.oid)), 0)::bigint AS bytes,
        coalesce(sum(s.n_dead_tup), 0)::bigint AS dead
    FROM pg_class AS l LEFT JOIN pg_stat_all_tables AS s ON s.relid = l.oid
    WHERE l.relkind IN ('r', 'm')
        AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf))
) AS sizes
WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND c.relpersistence <> 't'
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
ORDER BY sizes.bytes DESC, name
"""
_SAMPLE = """
INSERT INTO ops.table_sizes (at, table_name, rows, bytes)
SELECT $1, * FROM unnest($2::text[], $3::bigint[], $4::bigint[])
"""
_THIN_OUT = """
DELETE FROM ops.table_sizes WHERE at < $1 OR at < $2 AND at NOT IN (
    SELECT min(at) FROM ops.table_sizes WHERE at < $2 GROUP BY date_trunc('day', at, 'UTC')
)
"""
_GROWTH = (
    "SELECT at, sum(bytes)::bigint AS bytes, sum(rows)::bigint AS rows FROM ops.table_sizes GROUP BY at ORDER BY at"
)


@dataclass(frozen=True, slots=True)
class Size:
    """One table, with its partitions, indexes and what is kept aside (TOAST)."""

    name: str
    #: The planner's estimate.
    rows: int
    bytes: int
    #: Dead rows, also estimated, that a vacuum has yet to clear.
    dead: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All tables together at one time."""

    at: datetime
    bytes: int
    rows: int


async def sizes(database: Pool) -> list[Size]:
    """Return every table, the largest first. Raises `DatabaseError`."""
    return [Size(**dict(row)) for row in await database.fetch(_SIZES)]


async def sample(database: Pool) -> int:
    """Note the sizes of this moment, let go of old samples, and return how many tables there are."""
    now, found = database.now(), await sizes(database)
    async with database.transaction() as connection:
        names, rows, sized = [one.name for one in found], [one.rows for one in found], [one.bytes for one in found]
        await connection.execute(_SAMPLE, now, names, rows, sized)
        await connection.execute(_THIN_OUT, now - timedelta(days=KEPT_DAYS), now - timedelta(days=FINE_DAYS))
    return len(found)


async def growth(database: Pool) -> list[Sample]:
    """Return all samples, oldest first."""
    return [Sample(**dict(row)) for row in await database.fetch(_GROWTH)]

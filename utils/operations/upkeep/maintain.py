"""Upkeep of the database, as `/db maintain` and `db maintain` do it: first what it would do, then doing it."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from typing import Literal

import asyncpg

from utils.database import Pool
from utils.database.materialized_views import REFRESH_SECONDS, VIEWS
from utils.database.partitions import ensure_partitions
from utils.exceptions import GuildbookError, MigrationError, translate
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.text import format_bytes

_log = logging.getLogger(__name__)

#: An index that is so many times as large as its rows need, and wastes so many bytes, is built anew.
BLOATED, WASTED = 2.0, 1_000_000
#: Seconds for one statement; building an index reads its whole table.
JOB_SECONDS = 3_600.0
#: Seconds to wait for other people's locks: those who write must not wait longer for us.
LOCK_TIMEOUT = "5s"
#: "maintain" as a bigint: one at a time.
LOCK_KEY = 0x6D61696E7461696E
_GENTLE = "beside its readers"

#: Tables that were never analysed, or a tenth of which changed since: autovacuum's own measure (PostgreSQL manual,
#: 19.10, autovacuum_analyze_scale_factor and _threshold), which partitioned tables as such never reach.
_STALE = """
SELECT format('%I.%I', n.nspname, c.relname) AS name, greatest(c.reltuples, 0)::bigint AS rows, leaves.changed,
    c.reltuples < 0 AS is_new
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT coalesce(sum(s.n_mod_since_analyze), 0)::bigint AS changed, sum(pg_relation_size(l.oid)) AS bytes
    FROM pg_class AS l LEFT JOIN pg_stat_user_tables AS s ON s.relid = l.oid
    WHERE l.relkind IN ('r', 'm')
        AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf))
) AS leaves
WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND c.relpersistence <> 't'
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
    AND (c.reltuples < 0 AND leaves.bytes > 0 OR leaves.changed > 50 + 0.1 * greatest(c.reltuples, 0))
ORDER BY 1
"""
#: B-tree indexes with what their rows need: an index entry is its columns, eight bytes of header, aligned to eight, and
#: a line pointer of four; pages are filled to nine tenths (PostgreSQL manual, 65.1 and 73.6). Deduplicated entries need
#: less, so that an index is found bloated late rather than too soon.
_INDEXES = """
SELECT format('%I.%I', n.nspname, i.relname) AS name, pg_relation_size(i.oid) AS bytes,
    (t.reltuples * ((7 + 8 + widths.width)::int / 8 * 8 + 4) / 0.9 + 16384)::bigint AS needed
FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid JOIN pg_class AS t ON t.oid = x.indrelid
JOIN pg_namespace AS n ON n.oid = i.relnamespace JOIN pg_am AS am ON am.oid = i.relam
CROSS JOIN LATERAL (
    SELECT coalesce(sum(coalesce(s.avg_width, 8)), 8) AS width FROM unnest(x.indkey::int2[]) AS k(number)
    LEFT JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum = k.number
    LEFT JOIN pg_stats AS s ON s.schemaname = n.nspname AND s.tablename = t.relname AND s.attname = a.attname
) AS widths
WHERE am.amname = 'btree' AND i.relkind = 'i' AND x.indisvalid AND x.indpred IS NULL AND t.reltuples >= 0
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to do."""

    kind: Literal["analyze", "reindex", "refresh", "partitions"]
    #: Quoted by the server, ready for SQL; of partitions empty.
    name: str
    why: str

    @property
    def line(self) -> str:
        """What it does, for people."""
        return f"{self.kind} {self.name.removeprefix('public.')}: {self.why}" if self.name else self.why


async def plan(database: Pool) -> list[Job]:
    """Return what there is to do, and change nothing. Raises `DatabaseError`."""
    jobs = [Job("partitions", "", "make the partitions of the coming months where they are missing")]
    for row in await database.fetch(_STALE):
        why = "never analysed" if row["is_new"] else f"{row['changed']:,} of {row['rows']:,} rows changed since"
        jobs.append(Job("analyze", row["name"], why))
    for row in await database.fetch(_INDEXES):
        if row["bytes"] > BLOATED * row["needed"] and row["bytes"] - row["needed"] > WASTED:
            why = f"{format_bytes(row['bytes'])} where {format_bytes(row['needed'])} would do"
            jobs.append(Job("reindex", row["name"], why))
    for row in await database.fetch(VIEWS):
        how = (
            "beside its readers"
            if row["can_refresh_concurrently"]
            else "its readers wait: it was never filled or has no unique index"
        )
        jobs.append(Job("refresh", row["quoted"], how))
    return jobs


async def preview(database: Pool) -> Outcome:
    """Say what `maintain` would do."""
    jobs = await plan(database)
    return Outcome("\n".join(job.line for job in jobs), data={"jobs": [asdict(job) for job in jobs]})


async def maintain(database: Pool, *, progress: Progress = ignore_progress) -> Outcome:
    """Do what `plan` says, one after the other; what fails is told, and the rest is done all the same.

    Raises `MigrationError` when another process is at it, and `DatabaseError`.
    """
    jobs = await plan(database)
    done: list[str] = []
    failed: list[str] = []
    try:
        connection = await asyncpg.connect(**database.direct.connect_kwargs(), timeout=30)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
        raise translate(exc) or exc from exc
    try:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY, timeout=30):
            raise MigrationError("the database is being maintained already: wait until that is done")
        await connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
        for number, job in enumerate(jobs):
            progress(Step("maintaining", number, len(jobs), "jobs"))
            started = time.monotonic()
            try:
                await _do(connection, database, job)
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, GuildbookError) as exc:
                error = translate(exc) or exc
                _log.warning("maintenance, %s: %s", job.line, error)
                failed.append(f"{job.line}: {error}")
            else:
                done.append(f"{job.line} ({time.monotonic() - started:.1f} s)")
    finally:
        await connection.close(timeout=10)
    lines = [*(f"done: {line}" for line in done), *(f"FAILED: {line}" for line in failed)]
    return Outcome("\n".join(lines), data={"done": done, "failed": failed}, ok=not failed)


async def _do(connection: asyncpg.Connection[asyncpg.Record], database: Pool, job: Job) -> None:
    match job.kind:
        case "partitions":
            await ensure_partitions(connection, database.now())
        case "analyze":
            await connection.execute("ANALYZE " + job.name, timeout=JOB_SECONDS)
        case "reindex":
            await connection.execute("REINDEX INDEX CONCURRENTLY " + job.name, timeout=JOB_SECONDS)
        case "refresh":
            how = "CONCURRENTLY " if job.why == _GENTLE else ""
            await connection.execute("REFRESH MATERIALIZED VIEW " + how + job.name, timeout=REFRESH_SECONDS)

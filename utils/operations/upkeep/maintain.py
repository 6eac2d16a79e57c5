"""Routine maintenance of the database: list what is due, and do it."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import asyncpg

from utils.database import Pool, ownership
from utils.database.locks import ADVISORY_HOLDER, LOCK_STATES, Mode, describe_lock_holders
from utils.database.materialized_views import AGES, REFRESH_SECONDS, VIEWS, record_name, record_refreshed
from utils.database.ownership import SCRIPTS
from utils.database.partitions import ensure_partitions, find_missing, partitioned_tables
from utils.exceptions import DatabaseError, GuildbookError, MigrationError, translate_errors
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.text import format_bytes, format_count

_log = logging.getLogger(__name__)
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

#: An index is rebuilt when it is this many times as large as its rows need and wastes this many bytes.
BLOAT_FACTOR, WASTED_BYTES = 2.0, 1_000_000
#: Seconds for one statement; building an index reads its whole table.
JOB_SECONDS = 3_600.0
#: How long a statement waits for a lock; other writers queue behind it for as long.
LOCK_TIMEOUT = "5s"
#: Seconds after which a view is due again.
VIEW_SECONDS = 3_600.0
#: "maintain" as a bigint: the advisory lock that lets one process maintain at a time.
LOCK_KEY = 0x6D61696E7461696E

#: Tables that were never analyzed, or of which a tenth changed since: autovacuum's own criterion (PostgreSQL manual,
#: 19.10, autovacuum_analyze_scale_factor and _threshold), which it never applies to partitioned tables as a whole.
_STALE_TABLES = """
SELECT n.nspname AS schema, c.relname, format('%I.%I', n.nspname, c.relname) AS name,
    greatest(c.reltuples, 0)::bigint AS rows, leaves.changed, c.reltuples < 0 AS is_new
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT coalesce(sum(s.n_mod_since_analyze), 0)::bigint AS changed, sum(pg_relation_size(l.oid)) AS bytes
    FROM pg_class AS l LEFT JOIN pg_stat_user_tables AS s ON s.relid = l.oid
    WHERE l.relkind = 'r'
        AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf))
) AS leaves
WHERE c.relkind IN ('r', 'p') AND (n.nspname, c.relname) IN (SELECT * FROM unnest($1::text[], $2::text[]))
    AND (c.reltuples < 0 AND leaves.bytes > 0 OR leaves.changed > 50 + 0.1 * greatest(c.reltuples, 0))
ORDER BY 1
"""
#: B-tree indexes with the size that their rows need: an index entry is its columns and a header of 8 bytes, aligned to
#: 8 bytes, plus a line pointer of 4; pages are filled to nine tenths (PostgreSQL manual, 65.1 and 73.6). Deduplicated
#: entries need less, so that this rather misses bloat than reports too much.
_INDEXES = """
SELECT n.nspname AS schema, i.relname, format('%I.%I', n.nspname, i.relname) AS name, pg_relation_size(i.oid) AS bytes,
    (t.reltuples * ((7 + 8 + widths.width)::int / 8 * 8 + 4) / 0.9 + 16384)::bigint AS needed
FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid JOIN pg_class AS t ON t.oid = x.indrelid
JOIN pg_class AS root ON root.oid = coalesce(pg_partition_root(t.oid), t.oid)
JOIN pg_namespace AS n ON n.oid = root.relnamespace JOIN pg_am AS am ON am.oid = i.relam
CROSS JOIN LATERAL (
    SELECT coalesce(sum(coalesce(s.avg_width, 8)), 8) AS width FROM unnest(x.indkey::int2[]) AS k(number)
    LEFT JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum = k.number
    LEFT JOIN pg_stats AS s ON s.schemaname = n.nspname AND s.tablename = t.relname AND s.attname = a.attname
) AS widths
WHERE am.amname = 'btree' AND i.relkind = 'i' AND x.indisvalid AND x.indpred IS NULL AND t.reltuples >= 0
    AND (n.nspname, root.relname) IN (SELECT * FROM unnest($1::text[], $2::text[]))
ORDER BY 1
"""
_NOTHING_DUE = "Nothing is due: tables, views and indexes were looked after lately, and the partitions are there."


@dataclass(frozen=True, slots=True)
class Job:
    """One maintenance task."""

    kind: Literal["analyze", "reindex", "refresh", "partitions"]
    #: The object's name, quoted by the server; empty for partitions.
    name: str
    why: str
    #: The object's name as our SQL spells it; empty for partitions.
    label: str = ""
    #: Of a refresh: whether readers can use the view meanwhile.
    concurrently: bool = False
    #: The row of `ops.positions` that records a refresh; empty for other jobs.
    record: str = ""

    @property
    def line(self) -> str:
        """The job as a line of text."""
        return f"{self.kind} {self.label}: {self.why}" if self.label else self.why


async def plan(pool: Pool, *, scripts: Path = SCRIPTS, view_seconds: float = VIEW_SECONDS) -> list[Job]:
    """Return the jobs that are due, without doing them. Raises `DatabaseError`.

    `scripts`: the revisions that say which tables and views are ours; those of other programs are left alone.
    `view_seconds`: how long after its last refresh a view is due again.
    """
    ours = ownership.owned(scripts).qualified_relations(pool.placement)
    names, shown = ([schema for schema, _ in ours], [name for _, name in ours]), pool.placement.shown
    jobs = []
    if missing := await find_missing(pool, pool.now()):
        jobs.append(Job("partitions", "", f"create {format_count(len(missing), 'partition')} for the coming months"))
    for row in await pool.fetch(_STALE_TABLES, *names):
        changed = f"{row['changed']:,} changes since the last analysis of {format_count(row['rows'], 'row')}"
        why = "never analyzed" if row["is_new"] else changed
        jobs.append(Job("analyze", row["name"], why, shown(row["schema"], row["relname"])))
    for row in await pool.fetch(_INDEXES, *names):
        if row["bytes"] > BLOAT_FACTOR * row["needed"] and row["bytes"] - row["needed"] > WASTED_BYTES:
            why = f"{format_bytes(row['bytes'])}, of which its rows need {format_bytes(row['needed'])}"
            jobs.append(Job("reindex", row["name"], why, shown(row["schema"], row["relname"])))
    recorded = {(schema, name): record_name(pool.placement, schema, name) for schema, name in ours}
    ages = {row["journal"]: row["seconds"] for row in await pool.fetch(AGES, list(recorded.values()))}
    for row in await pool.fetch(VIEWS):
        view, concurrently = (row["schema"], row["relname"]), row["can_refresh_concurrently"]
        age = ages.get(recorded.get(view, "")) if row["is_populated"] else None
        if view not in recorded or (age is not None and 0 <= age < view_seconds):
            continue
        why = "never filled" if not row["is_populated"] else "not refreshed recently"
        why += "" if concurrently else "; blocks readers"
        jobs.append(Job("refresh", row["quoted"], why, shown(*view), concurrently, recorded[view]))
    return jobs


async def preview(pool: Pool) -> Outcome:
    """Report what `maintain` would do."""
    jobs = await plan(pool)
    text = "\n".join(job.line for job in jobs) or _NOTHING_DUE
    return Outcome(text, data={"jobs": [asdict(job) for job in jobs]})


async def maintain(
    pool: Pool,
    *,
    progress: Progress = ignore_progress,
    lock_timeout: str = LOCK_TIMEOUT,
    scripts: Path = SCRIPTS,
    view_seconds: float = VIEW_SECONDS,
) -> Outcome:
    """Do what is due (see `plan`). A job that fails is reported, and the others are done all the same.

    Raises `MigrationError` when another process maintains the database, and `DatabaseError`.
    """
    jobs = await plan(pool, scripts=scripts, view_seconds=view_seconds)
    done: list[str] = []
    failed: list[str] = []
    if not jobs:
        return Outcome(_NOTHING_DUE, data={"done": done, "failed": failed})
    async with contextlib.AsyncExitStack() as stack:
        connection, key = await _connect(pool, stack), pool.placement.lock_key(LOCK_KEY)
        with translate_errors():
            if pool.direct.pooled:  # sessions are shared there: a transaction of its own holds the lock
                keeper = await _connect(pool, stack)
                await keeper.execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0")
                is_locked = await keeper.fetchval("SELECT pg_try_advisory_xact_lock($1)", key, timeout=30)
            else:
                is_locked = await connection.fetchval("SELECT pg_try_advisory_lock($1)", key, timeout=30)
                await connection.execute("SELECT set_config('lock_timeout', $1, false)", lock_timeout)
        if not is_locked:
            holder = await pool.fetchval(ADVISORY_HOLDER.format(key="$1"), key)
            by = f": {holder}" if holder else ""
            raise MigrationError(f"another process maintains this database{by}; wait until it is done")
        for number, job in enumerate(jobs):
            progress(Step("maintaining", number, len(jobs), "jobs"))
            started = time.monotonic()
            try:
                with translate_errors():
                    await _run(connection, pool, job, lock_timeout)
            except GuildbookError as error:
                reason = f"{error}{await _describe_lock_holders(pool, job, error)}"
                _log.warning("maintenance job failed: %s: %s", job.line, reason)
                failed.append(f"{job.line}: {reason}")
            else:
                done.append(f"{job.line} ({time.monotonic() - started:.1f} s)")
        progress(Step("maintaining", len(jobs), len(jobs), "jobs"))
    lines = [*(f"done: {line}" for line in done), *(f"FAILED: {line}" for line in failed)]
    return Outcome("\n".join(lines), data={"done": done, "failed": failed}, ok=not failed)


async def _describe_lock_holders(pool: Pool, job: Job, error: GuildbookError) -> str:
    """Return the end of an error message that names who holds the lock that a job waited for."""
    if not isinstance(error, DatabaseError) or error.sqlstate not in LOCK_STATES:
        return ""
    match job.kind:
        case "partitions":
            return await describe_lock_holders(pool.direct, partitioned_tables())
        case "reindex" | "analyze":
            return await describe_lock_holders(pool.direct, [job.name], "SHARE UPDATE EXCLUSIVE")
        case "refresh":
            mode: Mode = "EXCLUSIVE" if job.concurrently else "ACCESS EXCLUSIVE"
            return await describe_lock_holders(pool.direct, [job.name], mode)


async def _connect(pool: Pool, stack: contextlib.AsyncExitStack) -> Connection:
    with translate_errors():
        connection: Connection = await asyncpg.connect(**pool.direct.connect_kwargs(), timeout=30)
    stack.push_async_callback(connection.close, timeout=10)
    return connection


async def _run(connection: Connection, pool: Pool, job: Job, lock_timeout: str) -> None:
    if pool.direct.pooled and job.kind != "reindex":
        async with connection.transaction():
            await connection.execute("SELECT set_config('lock_timeout', $1, true)", lock_timeout)
            await _work(connection, pool, job)
    else:
        await _work(connection, pool, job)


async def _work(connection: Connection, pool: Pool, job: Job) -> None:
    match job.kind:
        case "partitions":
            await ensure_partitions(connection, pool.now())
        case "analyze":
            await connection.execute("ANALYZE " + job.name, timeout=JOB_SECONDS)
        case "reindex":  # not in a transaction; its locks let readers and writers through
            await connection.execute("REINDEX INDEX CONCURRENTLY " + job.name, timeout=JOB_SECONDS)
        case "refresh":
            option = "CONCURRENTLY " if job.concurrently else ""
            await connection.execute("REFRESH MATERIALIZED VIEW " + option + job.name, timeout=REFRESH_SECONDS)
            await connection.execute("ANALYZE " + job.name, timeout=JOB_SECONDS)
            await record_refreshed(connection.execute, [job.record])

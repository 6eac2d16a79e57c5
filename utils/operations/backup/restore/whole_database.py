"""Replaces the whole live database by a restored one, with everything in it that is not Guildbook's.

For a database that Guildbook has for itself, when nothing of the old one is to stay: a scratch database is made and
loaded, and then swapped with the live one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from utils.database import ConnectTarget, Pool
from utils.database.partitions import ensure_partitions
from utils.database.placement import Placement
from utils.database.sessions import connect
from utils.exceptions import BackupError, ForbiddenHere, GuildbookError, translate_errors
from utils.operations import migrations
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup.archive.objects import Name, find_views, owned_names, qualified
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.restore import swap
from utils.operations.backup.scratch import databases, load
from utils.operations.backup.scratch.load import Loaded
from utils.operations.backup.scratch.locks import new_suffix, without_other_restores
from utils.operations.backup.scratch.tables import missing_revisions
from utils.text import format_count

_log = logging.getLogger(__name__)

#: Makes a backup of the live database and returns its id, or None and why there is none.
SafetyBackup = Callable[[], Awaitable[tuple[str | None, str]]]
#: Awaited once the restored rows are live.
After = Callable[[], Awaitable[None]] | None
RECONCILE, VIEWS = "the reconcile", "refreshing the materialized views"

#: What is in the database besides these tables, with the rows that the planner estimates.
_LOSSES = """
SELECT n.nspname::text AS schema, c.relname::text AS name, CASE c.relkind WHEN 'v' THEN 'view'
    WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' ELSE 'table' END AS kind,
    CASE WHEN c.relkind = 'p' THEN (SELECT sum(greatest(l.reltuples, 0)) FROM pg_partition_tree(c.oid) AS t
        JOIN pg_class AS l ON l.oid = t.relid WHERE t.isleaf) ELSE greatest(c.reltuples, 0) END::bigint AS rows
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition AND c.relpersistence <> 't'
    AND n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\\_%'
    AND NOT EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
        AND d.deptype = 'e')
    AND NOT EXISTS (SELECT FROM unnest($1::text[], $2::text[]) AS kept (schema, name)
        WHERE kept.schema = n.nspname AND kept.name = c.relname)
ORDER BY 1, 2
"""
_OTHERS = """
SELECT 'extension ' || quote_ident(extname) AS line FROM pg_extension WHERE extname <> 'plpgsql'
UNION ALL SELECT 'publication ' || quote_ident(pubname) FROM pg_publication
UNION ALL SELECT 'event trigger ' || quote_ident(evtname) FROM pg_event_trigger
UNION ALL SELECT 'grants on Guildbook''s tables' WHERE EXISTS (
    SELECT FROM unnest($1::text[], $2::text[]) AS kept (schema, name) JOIN pg_namespace AS n ON n.nspname = kept.schema
        JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = kept.name, aclexplode(c.relacl) AS a
    WHERE a.grantee <> c.relowner)
UNION ALL SELECT 'policies on Guildbook''s tables' WHERE EXISTS (
    SELECT FROM unnest($1::text[], $2::text[]) AS kept (schema, name) JOIN pg_policies AS p
        ON p.schemaname = kept.schema AND p.tablename = kept.name)
ORDER BY 1
"""


async def find_losses(pool: Pool, tables: Sequence[Name]) -> list[str]:
    """Return what replacing the whole database would lose, one line each.

    That is everything but our views, the tables of `ops`, whose rows are copied, and `tables`, which the backup has.
    """
    schemas = pool.placement
    own = [name for name in owned_names(schemas) if name[0] == schemas.ops]
    async with connect(pool.direct) as connection:
        with translate_errors("looking for other programs' objects"):
            kept = [*tables, *own, *await find_views(connection, schemas)]
            names = [schema for schema, _ in kept], [name for _, name in kept]
            relations = await connection.fetch(_LOSSES, *names)
            others = await connection.fetch(_OTHERS, *names)
    lines = [
        f"{row['kind']} {qualified((row['schema'], row['name']))}"
        + (f" (about {format_count(row['rows'], 'row')})" if row["kind"] != "view" else "")
        for row in relations
    ]
    return [*lines, *(row["line"] for row in others)]


async def replace_database(
    pool: Pool,
    archive: Archive,
    *,
    safety_backup: SafetyBackup,
    drop_old: bool = False,
    progress: Progress = ignore_progress,
    after: After = None,
) -> Outcome:
    """Put a restored database in the place of the live one; see `utils.operations.backup.restore.restore`."""
    live = pool.direct
    if live.pooled:
        raise BackupError(
            f"{live} is a pooler, and a restore needs a direct connection: set DATABASE_UNPOOLED_URL. Nothing was"
            " changed"
        )
    name: str = await pool.fetchval("SELECT current_database()")
    live = live.with_database(name)
    schemas = pool.placement
    suffix = new_suffix()
    before = databases.scratch_name(name, databases.BEFORE, suffix)
    try:
        await databases.check_privileges(live, name)
    except ForbiddenHere as error:
        raise ForbiddenHere(
            f"{error}, so the whole database cannot be replaced: restore without --whole-database"
        ) from error
    revisions = missing_revisions(archive)
    async with contextlib.AsyncExitStack() as alone:
        await alone.enter_async_context(without_other_restores(live))
        lost = await find_losses(pool, list(archive.counts))
        safety_id, why_none = await safety_backup()
        started = time.monotonic()
        async with databases.scratch_database(live, name, suffix) as database:
            loaded = await _load(pool, archive, live, database.target, progress)
            progress(Step("swapping"))
            await alone.aclose()  # the swap ends every session, and keeps other restores out by itself
            with _quiet_pool():
                swapped = await swap.swap(
                    live,
                    name,
                    database.name,
                    before,
                    comment=f"{name} until backup {archive.id} was restored; dropped by the next restore",
                    revoke_lease=after is None,
                )
    seconds_until_live = round(time.monotonic() - started, 2)
    lines = load.describe_restored(archive, loaded, name, revisions, safety_id, why_none)
    if swapped.has_diverged:
        lines.append("The live database had begun anew since that backup: schema ops has the rows of both.")
    else:
        lines.append(f"Schema ops was kept: {format_count(sum(swapped.ops_rows.values()), 'row')}.")
    if lost:
        lines.append(f"Not in the new database: {', '.join(lost)}.")
    lines += [f"Not copied from the old database: {line}" for line in swapped.not_copied]
    more_lines, is_ok = await _finish(pool, name, schemas, before, drop_old, after)
    lines += more_lines
    seconds = round(time.monotonic() - started, 2)
    data: dict[str, Any] = {
        "backup": archive.id,
        "database": name,
        "seconds": seconds,
        #: Until the swap; gathering statistics and cleaning up come after.
        "seconds_until_live": seconds_until_live,
        "safety_backup": safety_id,
        "migrated": revisions,
        "rows": loaded.rows,
        "left_out": loaded.left_out,
        "lost": lost,
        "ops": swapped.ops_rows,
        "began_anew": swapped.has_diverged,
        "before": None if drop_old else before,
    }
    _log.info("whole database restored", extra={"backup": archive.id, "seconds": seconds, "database_name": name})
    return Outcome("\n".join(lines), data, ok=is_ok)


async def _load(
    pool: Pool, archive: Archive, live: ConnectTarget, scratch_target: ConnectTarget, progress: Progress
) -> Loaded:
    """Load an archive into an empty database, and migrate it; meanwhile drop what earlier restores kept."""
    target = scratch_target.with_placement(pool.placement)
    revisions = missing_revisions(archive)
    dropping = asyncio.create_task(
        _drop_earlier(live, str(live.database)), name="dropping the database of an earlier restore"
    )
    try:
        place = await load.make_place(archive, target, pool.placement)
        if not revisions:  # older revisions may not have all partitioned tables
            await _make_partitions(target, [*await load.list_months(archive), pool.now()])
        loaded = await load.load_and_check(archive, place, progress=progress)
        await load.set_sequences(archive, place)
        await dropping
    finally:
        dropping.cancel()
        await asyncio.wait({dropping})
    if revisions:
        progress(Step("migrating", 0, len(revisions), "revisions"))
        await migrations.upgrade(target, "heads")
        progress(Step("migrating", len(revisions), len(revisions), "revisions"))
        await _make_partitions(target, [pool.now()])
    with contextlib.suppress(BackupError):  # reported when they are refreshed again, with the live rows of `ops`
        await load.refresh_views(target, pool.placement)
    return loaded


async def _make_partitions(target: ConnectTarget, months: Sequence[datetime]) -> None:
    """Create partitions for these months and, after the last one, for those to come.

    Before rows are loaded: otherwise they would be moved from the default partition.
    """
    async with connect(target) as connection:
        with translate_errors("creating partitions"):
            for month in months[:-1]:
                await ensure_partitions(connection, month, 0)
            await ensure_partitions(connection, months[-1])


async def _finish(
    pool: Pool,
    name: str,
    schemas: Placement,
    before: str,
    drop_old: bool,
    after: After,
) -> tuple[list[str], bool]:
    live = pool.direct.with_database(name)
    about_old: list[str] = []

    async def report_old() -> None:
        about_old.extend(await _report_old(live, name, before, drop_old))

    lines, is_ok = await follow_up(
        ("reconnecting", pool.renew),
        # A pause of the former database is in `ops`, but the restored one is at the newest revision.
        ("resuming AUTO_MIGRATE", lambda: migrations.resume_auto_migrate(pool)),
        (RECONCILE, after),
        (VIEWS, lambda: load.refresh_views(live, schemas)),
        ("gathering statistics", lambda: load.analyze(live, owned_names(schemas))),
        ("dropping the old database", report_old),
    )
    return [*about_old, *lines], is_ok


async def follow_up(*steps: tuple[str, Callable[[], Awaitable[object]] | None]) -> tuple[list[str], bool]:
    """Do what restored rows still need, in order; they are live already, so a failure is reported and not raised.

    Returns lines for the report, and whether nothing failed. Without a step for `RECONCILE` a running bot does it.
    """
    lines: list[str] = []
    is_ok = True
    for what, step in steps:
        if step is not None:
            try:
                await step()
            except GuildbookError as error:
                is_ok = False
                lines.append(f"Restored, but {what} failed: {error}")
        elif what == RECONCILE:
            lines.append("A running bot starts over by itself and reconciles every guild.")
    return lines, is_ok


async def _drop_earlier(live: ConnectTarget, name: str) -> None:
    """Drop the databases that earlier restores kept.

    Concurrently with the load: DROP waits for a full checkpoint, and the earlier it starts, the less there is to flush.
    """
    try:
        async with connect(await databases.maintenance_target(live, name)) as connection:
            with translate_errors("dropping the database of an earlier restore"):
                for old in await databases.list_databases(connection, name, databases.BEFORE):
                    await databases.drop(connection, old)
    except GuildbookError as error:
        _log.warning("the next restore tries again: %s", error)


async def _report_old(live: ConnectTarget, name: str, before: str, drop_old: bool) -> list[str]:
    """Drop the old database if `drop_old`, and say what became of it."""
    async with connect(await databases.maintenance_target(live, name)) as connection:
        with translate_errors("dropping the old database"):
            if drop_old:
                await databases.drop(connection, before)
                return ["The old database was dropped."]
            size = await connection.fetchval("SELECT pg_size_pretty(pg_database_size($1))", before)
    return [f"The old database is kept as {before} ({size}) until the next restore drops it."]


@contextlib.contextmanager
def _quiet_pool() -> Iterator[None]:
    """Suppress the traceback that asyncpg's pool logs for each connection that the swap terminates."""
    logger = logging.getLogger("asyncpg.pool")

    def is_other(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)

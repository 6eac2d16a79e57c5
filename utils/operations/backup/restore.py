"""Restores a backup: into a scratch database first, whose rows are counted before it replaces the live one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError

from utils.database import ConnectTarget, Pool
from utils.database.partitions import ensure_partitions
from utils.exceptions import BackupError, ForbiddenHere, GuildbookError, translate_errors
from utils.operations import migrations
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup import load, recovery, scratch, swap
from utils.operations.backup.archive import Archive
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import BackupRequest, create
from utils.operations.backup.objects import Schemas

_log = logging.getLogger(__name__)

#: Makes a backup of the live database and returns its id, or None and why there is none.
SafetyBackup = Callable[[], Awaitable[tuple[str | None, str]]]


async def restore(
    pool: Pool,
    catalog: BackupCatalog,
    id: str = "latest",
    *,
    drop_old: bool = False,
    progress: Progress = ignore_progress,
    after: Callable[[], Awaitable[None]] | None = None,
) -> Outcome:
    """Replace the live database by a backup, after backing up what is there.

    `after` is awaited once the restored database is live, and should reconcile everything in a new session with
    Discord, because only that sends all threads. Without it, the holder of the lease loses it: a bot that is running
    starts over, which reconciles too. With `drop_old` the old database is dropped, unless it could not be backed up.
    Raises `BackupError`, and leaves everything as it was, if the backup is damaged or cannot be loaded.
    """
    progress(Step("checking the backup"))
    async with catalog.open(id, pool.server_version_num // 10_000, progress=progress) as archive:
        assessment = await recovery.assess(pool)

        async def safety_backup() -> tuple[str | None, str]:
            if not assessment.has_tables:
                return None, "The old database had no tables of Guildbook's, so it was not backed up."
            if assessment.state == "damaged":
                return None, f"The old database was damaged, so it was not backed up: {assessment.reason}."
            manifest = await create(pool, catalog, BackupRequest("before restore"), progress=progress)
            return manifest.id, ""

        return await restore_archive(
            pool,
            archive,
            safety_backup=safety_backup,
            drop_old=drop_old and assessment.state != "damaged",
            progress=progress,
            after=after,
        )


async def restore_archive(
    pool: Pool,
    archive: Archive,
    *,
    safety_backup: SafetyBackup,
    drop_old: bool = False,
    progress: Progress = ignore_progress,
    after: Callable[[], Awaitable[None]] | None = None,
) -> Outcome:
    """Do what `restore` does, with a verified archive."""
    live = pool.direct
    if live.pooled:
        raise BackupError(
            f"{live} is a pooler, and a restore needs a direct connection: set DATABASE_UNPOOLED_URL. Nothing was"
            " changed"
        )
    name: str = await pool.fetchval("SELECT current_database()")
    live = live.with_database(name)
    suffix = scratch.new_suffix()
    before = scratch.scratch_name(name, scratch.BEFORE, suffix)
    try:
        await scratch.check_privileges(live, name, to_rename=True)
    except ForbiddenHere as error:
        raise ForbiddenHere(f"{error}, so backup {archive.id} cannot be restored next to the live database") from error
    revisions = await _missing_revisions(archive)
    progress(Step("safety backup"))
    safety_id, why_none = await safety_backup()
    started = time.monotonic()
    async with scratch.scratch_database(live, name, scratch.RESTORE, suffix) as database:
        dropping = asyncio.create_task(_drop_earlier(live, name), name="dropping the database of an earlier restore")
        try:
            place = await load.make_place(archive, database.target)
            loaded = await load.load_and_check(archive, place, progress=progress)
            await load.set_sequences(archive, place)
            await dropping
        finally:
            dropping.cancel()
            await asyncio.wait({dropping})
        if revisions:
            progress(Step("migrating", 0, len(revisions), "revisions"))
            await migrations.upgrade(database.target)
        async with scratch.connect(database.target) as connection:
            with translate_errors("creating partitions"):
                await ensure_partitions(connection, pool.now())
        progress(Step("swapping"))
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
    lines = [
        f"Backup {archive.id} of {archive.made_at:%Y-%m-%d %H:%M} UTC is now the live database {name}:"
        f" {loaded.rows:,} rows in {len(loaded.tables)} tables, all counted."
    ]
    if loaded.left_out:
        lines.append(f"Left out, because no revision here makes them: {', '.join(loaded.left_out)}.")
    if revisions:
        lines.append(f"It was migrated from revision {archive.revision} to {revisions[-1]}.")
    lines.append(f"The old database was backed up first: {safety_id}." if safety_id else why_none)
    if swapped.has_diverged:
        lines.append("The live database had begun anew since that backup: schema ops has the rows of both.")
    else:
        lines.append(f"Schema ops was kept: {sum(swapped.ops_rows.values()):,} rows.")
    lines += [f"Not copied from the old database: {line}" for line in swapped.not_copied]
    more_lines, is_ok = await _finish(pool, name, before, drop_old, after)
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
        "ops": swapped.ops_rows,
        "began_anew": swapped.has_diverged,
        "before": None if drop_old else before,
    }
    _log.info("backup restored", extra={"backup": archive.id, "seconds": seconds, "database_name": name})
    return Outcome("\n".join(lines), data, ok=is_ok)


async def _missing_revisions(archive: Archive) -> list[str]:
    """Return the revisions that the backup lacks, oldest first. Raises `BackupError` if its own is unknown."""
    if archive.revision is None:
        raise BackupError(f"backup {archive.id} contains no tables of Guildbook's: there is nothing to restore")
    scripts = ScriptDirectory(str(migrations.SCRIPTS))
    try:
        revisions = [script.revision for script in scripts.iterate_revisions("heads", archive.revision)]
    except (CommandError, RevisionError):
        raise BackupError(
            f"backup {archive.id} is at revision {archive.revision}, which this version does not know: it was made by a"
            " newer Guildbook. Restore it with that version"
        ) from None
    return revisions[::-1]


async def _finish(
    pool: Pool, name: str, before: str, drop_old: bool, after: Callable[[], Awaitable[None]] | None
) -> tuple[list[str], bool]:
    """Do what the restored database still needs; it is live already, so a failure is reported and not raised."""
    lines: list[str] = []
    is_ok = True
    live = pool.direct.with_database(name)
    for what, work in (
        ("reconnecting", pool.renew),
        # A pause of the former database is in `ops`, but the restored one is at the newest revision.
        ("resuming AUTO_MIGRATE", lambda: migrations.resume_auto_migrate(pool)),
        ("the reconcile", after),
        ("gathering statistics", lambda: load.analyze(live, Schemas())),
    ):
        try:
            if work is not None:
                await work()
        except GuildbookError as error:
            is_ok = False
            lines.append(f"Restored, but {what} failed: {error}")
    try:
        lines += await _report_old(live, name, before, drop_old)
    except GuildbookError as error:
        is_ok = False
        lines.append(f"Restored, but the old database could not be dropped: {error}")
    if after is None:
        lines.append("A running bot starts over by itself and reconciles every guild.")
    return lines, is_ok


async def _drop_earlier(live: ConnectTarget, name: str) -> None:
    """Drop the databases that earlier restores kept.

    Concurrently with the load: DROP waits for a full checkpoint, and the earlier it starts, the less there is to flush.
    """
    try:
        async with scratch.connect(await scratch.maintenance_target(live, name)) as connection:
            with translate_errors("dropping the database of an earlier restore"):
                for old in await scratch.list_databases(connection, name, scratch.BEFORE):
                    await scratch.drop(connection, old)
    except GuildbookError as error:
        _log.warning("the next restore tries again: %s", error)


async def _report_old(live: ConnectTarget, name: str, before: str, drop_old: bool) -> list[str]:
    """Drop the old database if `drop_old`, and say what became of it."""
    async with scratch.connect(await scratch.maintenance_target(live, name)) as connection:
        with translate_errors("dropping the old database"):
            if drop_old:
                await scratch.drop(connection, before)
                return ["The old database was dropped."]
            size = await connection.fetchval("SELECT pg_size_pretty(pg_database_size($1))", before)
    return [f"The old database is kept as {before} ({size}) until the next restore drops it."]


@contextlib.contextmanager
def _quiet_pool() -> Iterator[None]:
    """Suppress the traceback that asyncpg's pool logs for each connection that the swap terminates."""
    logger = logging.getLogger("asyncpg.pool")

    def is_other(record: logging.LogRecord) -> bool:
        return "connection floor" not in str(record.msg)  # the record has nothing else to tell it by

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)

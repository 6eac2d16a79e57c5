"""Restores a backup: into scratch tables first, whose rows are counted before they replace those of the live ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from utils.database import Pool
from utils.database.partitions import ensure_partitions
from utils.exceptions import BackupError
from utils.operations import migrations
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup.archive.objects import Name, owned_names
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import BackupRequest, create
from utils.operations.backup.restore.assessment import assess
from utils.operations.backup.restore.replacing import Replaced, check_owner, replace_rows
from utils.operations.backup.restore.selection import Selection, check_options, select
from utils.operations.backup.restore.whole_database import (
    RECONCILE,
    VIEWS,
    After,
    SafetyBackup,
    follow_up,
    replace_database,
)
from utils.operations.backup.scratch import load
from utils.operations.backup.scratch.tables import ScratchTables, missing_revisions, open_scratch_tables
from utils.text import format_count

_log = logging.getLogger(__name__)


async def restore(
    pool: Pool,
    catalog: BackupCatalog,
    id: str = "latest",
    *,
    tables: Sequence[str] = (),
    documents_of: int | None = None,
    whole_database: bool = False,
    drop_old: bool = False,
    from_other: bool = False,
    progress: Progress = ignore_progress,
    after: After = None,
) -> Outcome:
    """Replace the rows of the live tables by those of a backup, after backing up what is there.

    With `tables`, only theirs; of a partial backup, those of all tables that it has. With `documents_of`, only the
    documents of that guild (0: of none), for which a running bot need not start over. With `whole_database` the live
    database is replaced instead, and everything in it is lost that is not Guildbook's; `drop_old` then drops it at
    once, unless it could not be backed up. A backup of another database or application is refused unless `from_other`.

    `after` is awaited once the restored rows are live, and should reconcile everything in a new session with Discord,
    because only that sends all threads. Without it, the holder of the lease loses it: a bot that is running starts
    over, which reconciles too. Raises `BackupError`, and leaves everything as it was, if the backup is damaged or
    cannot be loaded, or if rows of tables that are not restored refer to rows that are not in it, or the other way
    round, and `ValidationError` for options that exclude each other.
    """
    check_options(tables, documents_of, whole_database=whole_database, drop_old=drop_old)
    progress(Step("checking the backup"))
    major = pool.server_version_num // 10_000
    catalog = await catalog.serving(pool)
    async with catalog.open(
        id, major, from_other=from_other, allow_partial=not whole_database, progress=progress
    ) as archive:
        missing_revisions(archive)
        selection = select(archive, tables, documents_of)
        assessment = await assess(pool)

        async def safety_backup() -> tuple[str | None, str]:
            progress(Step("safety backup"))
            if not assessment.has_tables:
                return None, "The database had no tables of Guildbook's, so it was not backed up."
            if assessment.state == "damaged":
                return None, f"The database was damaged, so it was not backed up: {assessment.reason}."
            manifest = await create(pool, catalog.writable(), BackupRequest("before restore"), progress=progress)
            return manifest.id, ""

        if whole_database:
            return await replace_database(
                pool,
                archive,
                safety_backup=safety_backup,
                drop_old=drop_old and assessment.state != "damaged",
                progress=progress,
                after=after,
            )
        return await restore_archive(
            pool, archive, selection, safety_backup=safety_backup, progress=progress, after=after
        )


async def restore_archive(
    pool: Pool,
    archive: Archive,
    selection: Selection | None = None,
    *,
    safety_backup: SafetyBackup,
    progress: Progress = ignore_progress,
    after: After = None,
) -> Outcome:
    """Do what `restore` does, with a verified archive."""
    missing_revisions(archive)
    async with open_scratch_tables(pool, is_restore=True) as scratch:
        await check_owner(scratch.live, scratch.schemas)
        await _check_live_tables(pool, archive, selection)
        started = time.monotonic()
        loaded = await scratch.load(archive, selection, with_indexes=False, progress=progress)
        rows = loaded.rows if selection is None else sum(archive.counts[name] for name in selection.tables)
        revisions = await scratch.migrate(archive, progress=progress)
        tables = await scratch.tables_to_replace(loaded, selection)
        guild_id = None if selection is None else selection.guild_id
        if selection is not None and guild_id is not None:
            rows = await scratch.keep_documents_of(guild_id)
            # A safety copy without any was made before they were restored, which it serves to undo.
            if not rows and not archive.is_safety_copy:
                raise BackupError(f"backup {archive.id} has no documents of {selection.whose}: nothing was changed")
        # After everything that may refuse the backup, and just before the first change.
        before_copy = time.monotonic()
        safety_id, why_none = await safety_backup()
        started += time.monotonic() - before_copy
        await _prepare_live_tables(pool, scratch, archive)
        progress(Step("replacing rows"))
        replaced = await replace_rows(
            scratch.live,
            scratch.schemas,
            scratch.place,
            tables,
            load.translated(await load.read_sequences(archive), archive.schemas, scratch.schemas),
            is_partial=selection is not None,
            guild_id=guild_id,
            revoke_lease=after is None and guild_id is None,
            progress=progress,
        )
        seconds_until_live = round(time.monotonic() - started, 2)
        database = str(scratch.live.database)
    what = None if selection is None else selection.describe(rows)
    lines = [
        *load.describe_restored(archive, loaded, database, revisions, safety_id, why_none, what=what),
        f"Deleted {format_count(replaced.deleted, 'row')}, changed {replaced.changed:,} and added {replaced.added:,}.",
        _describe_ops(replaced),
    ]
    if replaced.brought_back:
        lines.append(f"Missing tables were brought back: {', '.join(replaced.brought_back)}.")
    if archive.is_partial and revisions:
        lines.append("It was migrated without the rows of other tables, which the backup does not have.")
    more_lines, is_ok = await _finish(pool, scratch, tables, after, selection)
    seconds = round(time.monotonic() - started, 2)
    data: dict[str, Any] = {
        "backup": archive.id,
        "database": database,
        "seconds": seconds,
        #: Until the rows are live; gathering statistics comes after.
        "seconds_until_live": seconds_until_live,
        "safety_backup": safety_id,
        "migrated": revisions,
        "rows": rows,
        #: The tables whose rows were restored; null: all.
        "tables": None if selection is None else [".".join(name) for name in selection.tables],
        "guild_id": guild_id,
        "deleted": replaced.deleted,
        "changed": replaced.changed,
        "added": replaced.added,
        "left_out": loaded.left_out,
        "brought_back": replaced.brought_back,
        "ops": replaced.ops_rows,
        "began_anew": replaced.has_diverged,
    }
    _log.info("backup restored", extra={"backup": archive.id, "seconds": seconds, "database_name": database})
    return Outcome("\n".join([*lines, *more_lines]), data, ok=is_ok)


async def _check_live_tables(pool: Pool, archive: Archive, selection: Selection | None) -> None:
    """Raise `BackupError` unless the live tables are such that rows can be replaced in them."""
    assessment = await assess(pool)
    if selection is None:
        if assessment.state == "damaged" and await migrations.pending(pool):
            # Missing tables are brought back as the newest revision has them, beside those that are left.
            raise BackupError(
                f"the live database is damaged ({assessment.reason}), and not at the newest revision: restore with"
                " --whole-database"
            )
        return
    if assessment.state == "damaged" or not assessment.has_tables:
        raise BackupError(
            f"a part of a backup can only be restored into a database that has all tables ({assessment.reason}):"
            " restore a whole backup first"
        )
    if await migrations.current(pool) != archive.revision and (waiting := await migrations.pending(pool)):
        raise BackupError(
            f"the live database is not at the revision of the backup, {archive.revision}, and lacks"
            f" {', '.join(waiting)}: run python bot.py db upgrade first"
        )


async def _prepare_live_tables(pool: Pool, scratch: ScratchTables, archive: Archive) -> None:
    """Bring the live tables to the revision of the loaded ones, with partitions for the rows."""
    if (await assess(pool)).state == "damaged":
        return  # at the newest revision already; what is missing comes back with its partitions
    if scratch.is_migrated:
        await migrations.upgrade(pool, "heads")
        _, problems = await migrations.upgrade_packs(pool)
        if problems:
            raise BackupError("; ".join(problems))
    async with pool.acquire() as connection:
        for month in await load.list_months(archive):
            await ensure_partitions(connection, month, 0)
        await ensure_partitions(connection, pool.now())


def _describe_ops(replaced: Replaced) -> str:
    if replaced.has_diverged:
        return "The live database had begun anew since that backup: schema ops has the rows of both."
    return "Schema ops was kept."


async def _finish(
    pool: Pool, scratch: ScratchTables, tables: Sequence[Name], after: After, selection: Selection | None
) -> tuple[list[str], bool]:
    async def resume() -> None:
        if not await migrations.pending(pool):  # there is nothing left that the pause would keep from being applied
            await migrations.resume_auto_migrate(pool)

    changed = owned_names(scratch.schemas) if selection is None else tables
    steps: list[tuple[str, Callable[[], Awaitable[object]] | None]] = [
        (VIEWS, lambda: load.refresh_views(scratch.live, scratch.schemas)),
        ("gathering statistics", lambda: load.analyze(scratch.live, changed)),
    ]
    if selection is None or selection.guild_id is None:  # documents are not mirrored
        steps.insert(0, (RECONCILE, after))
    if selection is None:
        steps.insert(0, ("resuming AUTO_MIGRATE", resume))
    return await follow_up(*steps)

"""Bring a backup back: into a scratch database first, counted there, and only then in the live one's place."""

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
from utils.operations.backup import loading, recover, scratch, swap
from utils.operations.backup.source import Archive, Backups

_log = logging.getLogger(__name__)


#: Makes the backup of what is there now and returns its id, or why there is none.
Safety = Callable[[], Awaitable[tuple[str | None, str]]]


async def restore(
    database: Pool,
    backups: Backups,
    which: str = "latest",
    *,
    drop_old: bool = False,
    progress: Progress = ignore_progress,
    after: Callable[[], Awaitable[None]] | None = None,
) -> Outcome:
    """Put a backup (its id, or "latest") in the live database's place, after a backup of what is there.

    `after` is awaited once it is live, and is to have everything reconciled: by a new session with Discord, as threads
    come with nothing else. Without it whoever holds the lease loses it: a bot that runs somewhere begins anew, which
    reconciles too. `drop_old`: what was there is not kept, unless it could not be backed up.
    Raises `BackupError`, and leaves everything as it was, when the backup is not whole or cannot be brought in.
    """
    progress(Step("checking the backup"))
    async with backups.opened(which, database.server_version_num // 10_000, progress) as archive:
        found = await recover.assess(database)

        async def safety() -> tuple[str | None, str]:
            if not found.has_tables:
                return None, "There was nothing to back up before."
            if found.state == "damaged":
                return None, f"The database until then was not backed up, it is damaged: {found.reason}."
            return await backups.save(database, "before restore", progress), ""

        may_drop = drop_old and found.state != "damaged"
        return await bring_back(database, archive, safety=safety, drop_old=may_drop, progress=progress, after=after)


async def bring_back(
    database: Pool,
    archive: Archive,
    *,
    safety: Safety,
    drop_old: bool = False,
    progress: Progress = ignore_progress,
    after: Callable[[], Awaitable[None]] | None = None,
) -> Outcome:
    """Do what `restore` does with a backup that has been checked."""
    live = database.direct
    if live.pooled:
        raise BackupError(
            f"{live} is a pooler, and a restore needs the server itself: set DATABASE_UNPOOLED_URL. Nothing was changed"
        )
    name: str = await database.fetchval("SELECT current_database()")
    live = live.with_database(name)
    mark = scratch.stamp()
    before = scratch.beside(name, scratch.BEFORE, mark)
    try:
        await scratch.allowed(live, name, to_rename=True)
    except ForbiddenHere as error:
        line = loading.by_hand(archive, live)
        raise ForbiddenHere(
            f"{error}, so backup {archive.id} cannot be restored beside the live database. To restore it over the live"
            f" one: stop the bot, type this, and start the bot (schema ops stays as it is; everything else in the"
            f" database is replaced, in one transaction):\n{line}"
        ) from error
    steps = await _steps(archive)
    progress(Step("safety backup"))
    saved, unsaved = await safety()
    started = time.monotonic()
    async with scratch.scratch(live, name, scratch.RESTORE, mark) as made:
        dropping = asyncio.create_task(_drop_older(live, name), name="dropping the database of an earlier restore")
        try:
            await loading.load_and_check(archive, made.target, progress=progress)
            await dropping
        finally:
            dropping.cancel()
            await asyncio.wait({dropping})
        if steps:
            progress(Step("migrating", 0, len(steps), "revisions"))
            await migrations.upgrade(made.target)
        async with scratch.connected(made.target) as connection:
            with translate_errors("making partitions"):
                await ensure_partitions(connection, database.now())
        progress(Step("swapping"))
        with _unheard():
            swapped = await swap.swap(
                live,
                name,
                made.name,
                before,
                comment=f"{name} until backup {archive.id} was restored; the next restore drops this",
                depose=after is None,
            )
    live_after = round(time.monotonic() - started, 2)
    lines = [
        f"Backup {archive.id} of {archive.made_at:%Y-%m-%d %H:%M} UTC is the live database {name} now:"
        f" {sum(archive.counts.values()):,} rows in {len(archive.counts)} tables, each counted."
    ]
    if steps:
        lines.append(f"It was migrated from revision {archive.revision} to {steps[-1]}.")
    lines.append(f"What was there was backed up before: {saved}." if saved else unsaved)
    if swapped.is_other:
        lines.append("The live database had begun anew since that backup: schema ops holds the rows of both.")
    else:
        lines.append(f"Schema ops kept its state: {sum(swapped.kept_rows.values()):,} rows.")
    lines += [f"Not taken over from the old database: {line}" for line in swapped.not_carried]
    old, is_well = await _afterwards(database, name, before, drop_old, after)
    lines += old
    seconds = round(time.monotonic() - started, 2)
    data: dict[str, Any] = {
        "backup": archive.id,
        "database": name,
        "seconds": seconds,
        #: Until it was in its place; statistics and tidying up come after.
        "seconds_until_live": live_after,
        "safety_backup": saved,
        "migrated": steps,
        "rows": sum(archive.counts.values()),
        "ops": swapped.kept_rows,
        "began_anew": swapped.is_other,
        "before": None if drop_old else before,
    }
    _log.info("a backup was restored", extra={"backup": archive.id, "seconds": seconds, "database_name": name})
    return Outcome("\n".join(lines), data, ok=is_well)


async def _steps(archive: Archive) -> list[str]:
    """Return the revisions that the backup lacks, oldest first. Raises `BackupError` for one that is not known."""
    if archive.revision is None:
        raise BackupError(f"backup {archive.id} has no tables of Guildbook's: there is nothing to restore")
    scripts = ScriptDirectory(str(migrations.SCRIPTS))
    try:
        steps = [step.revision for step in scripts.iterate_revisions("heads", archive.revision)]
    except (CommandError, RevisionError):
        raise BackupError(
            f"backup {archive.id} is at revision {archive.revision}, which this version does not know: it was made by a"
            " newer Guildbook. Restore it with that version"
        ) from None
    return steps[::-1]


async def _afterwards(
    database: Pool, name: str, before: str, drop_old: bool, after: Callable[[], Awaitable[None]] | None
) -> tuple[list[str], bool]:
    """Do what the restored database still needs; it is live already, so that nothing here undoes the restore."""
    lines: list[str] = []
    is_well = True
    live = database.direct.with_database(name)
    for what, work in (
        ("new connections", database.renew),
        ("the reconcile", after),
        ("the planner's statistics", lambda: loading.analyse(live)),
    ):
        try:
            if work is not None:
                await work()
        except GuildbookError as error:
            is_well = False
            lines.append(f"Restored, but {what}: {error}")
    try:
        lines += await _put_away(live, name, before, drop_old)
    except GuildbookError as error:
        is_well = False
        lines.append(f"Restored, but the old databases could not be dropped: {error}")
    if after is None:
        lines.append("A bot that runs begins anew by itself and reconciles every guild.")
    return lines, is_well


async def _drop_older(live: ConnectTarget, name: str) -> None:
    """Drop what earlier restores kept.

    While this one loads: it waits for a checkpoint of everything, and the sooner it begins the less there is to flush.
    """
    try:
        async with scratch.connected(await scratch.home(live, name)) as connection:
            with translate_errors("dropping the database of an earlier restore"):
                for old in await scratch.there(connection, name, scratch.BEFORE):
                    await scratch.drop(connection, old)
    except GuildbookError as error:
        _log.warning("the next restore tries again: %s", error)


async def _put_away(live: ConnectTarget, name: str, before: str, drop_old: bool) -> list[str]:
    """Say what is kept of the old database, or with `drop_old` drop it."""
    async with scratch.connected(await scratch.home(live, name)) as connection:
        with translate_errors("dropping the old database"):
            if drop_old:
                await scratch.drop(connection, before)
                return ["The old database was dropped."]
            size = await connection.fetchval("SELECT pg_size_pretty(pg_database_size($1))", before)
    return [f"The old database is kept as {before} ({size}) until the next restore drops it."]


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep asyncpg's pool from printing a traceback for each connection that the swap ends."""
    logger = logging.getLogger("asyncpg.pool")

    def is_other(record: logging.LogRecord) -> bool:
        return "connection floor" not in str(record.msg)

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)

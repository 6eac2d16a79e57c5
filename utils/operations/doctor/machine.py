"""Checks of this machine's disk: free space, permissions, backups, and leftover journals."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from utils.exceptions import DatabaseError
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import CheckSkipped, Finding
from utils.tasks import run_in_daemon_thread
from utils.text import format_bytes

#: Free bytes below which the disk counts as full: PostgreSQL's write-ahead log alone grows in files of 16 MB.
MIN_FREE_BYTES = 200 * 2**20
#: How old the newest backup may be when none are scheduled.
MAX_BACKUP_AGE = timedelta(days=7)
#: The journals' directory under DATA_DIR; importing the bot's own constant would load discord.py.
SPOOL = "spool"


async def check_disk(
    context: DoctorContext, *, free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> Sequence[Finding]:
    """Check that DATA_DIR is writable and has enough free space."""
    directory = context.data_dir
    free, error = await run_in_daemon_thread(lambda: _probe(directory, free_bytes))
    if error is not None:
        advice = "give the directory to the user that the bot runs as, or set DATA_DIR to another"
        return [Finding("fail", "disk", f"{directory} is not writable: {error}", advice)]
    seen = f"{format_bytes(free)} free under {directory}"
    if free < MIN_FREE_BYTES:
        return [Finding("fail", "disk", seen, "free some space, or set DATA_DIR to a larger disk")]
    spool = context.settings.spool_max_mb * 2**20 if context.settings.spool != "off" else 0
    if free < MIN_FREE_BYTES + spool:
        advice = (
            f"free some space, or lower SPOOL_MAX_MB ({context.settings.spool_max_mb}): an outage of the database would"
            " fill the disk"
        )
        return [Finding("warn", "disk", seen, advice)]
    return [Finding("ok", "disk", seen)]


def _probe(directory: Path, free_bytes: Callable[[Path], int]) -> tuple[int, str | None]:
    """Return the free bytes, and the error of writing a file there, None if it works. Leaves nothing behind."""
    existing = directory.expanduser().resolve()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent  # the first start creates the rest
    free = free_bytes(existing)
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as exc:
        return free, exc.strerror or type(exc).__name__
    return free, None


async def check_backups(context: DoctorContext) -> Sequence[Finding]:
    """Check the age of the newest full backup, and whether the database has lost what a backup of it has."""
    from utils.operations.backup import recovery
    from utils.operations.backup.catalog import BackupCatalog

    context.require("BACKUP_URL", "BACKUP_AGE_RECIPIENT", "BACKUP_AGE_IDENTITY_FILE", "BACKUP_EVERY", "DATA_DIR")
    catalog = BackupCatalog(context.settings.model_copy(update={"data_dir": context.data_dir}))
    with contextlib.suppress(DatabaseError, CheckSkipped):  # other checks report them
        pool = await context.pool()
        loss = await recovery.find_loss(pool)
        hold = None if loss is None else await recovery.find_hold(pool, catalog, loss, _unknown)
        if hold is not None:
            return [Finding("fail", "backups", hold.line.removesuffix(f"; {hold.advice}"), hold.advice)]
    newest = await catalog.newest()
    every = context.settings.backup_every
    advice = "run python bot.py backup create" + ("" if every else ", or schedule backups with BACKUP_EVERY=1d")
    if newest is None:
        return [Finding("warn", "backups", "there is no full backup", advice)]
    age = datetime.now(UTC) - newest.made_at
    seen = f"the newest, {newest.id}, is {age / timedelta(hours=1):,.0f} hours old"
    max_age = timedelta(seconds=2 * every) if every else MAX_BACKUP_AGE
    return [Finding("warn", "backups", seen, advice) if age > max_age else Finding("ok", "backups", seen)]


async def _unknown() -> None:
    """Return no application: any may be that of the token."""


async def check_spool(context: DoctorContext) -> Sequence[Finding]:
    """Look for journals of processes that ended before their events reached the database."""
    from utils.mirror.spool import journal

    directory = context.data_dir / SPOOL

    def count() -> tuple[int, int, int]:
        journals = journal.list_journals(directory)
        dead = [path for path in journals if journal.is_dead(directory, path.name)]
        size = sum(entry.stat().st_size for path in dead for entry in path.iterdir() if entry.is_file())
        return len(journals), len(dead), size

    total, dead, size = await run_in_daemon_thread(count)
    if dead:
        seen = f"{dead} journals of processes that have ended, {format_bytes(size)}"
        return [Finding("warn", "spool", seen, "start the bot: it writes them to the database")]
    return [Finding("ok", "spool", f"{total} in use" if total else "no leftover journals")]

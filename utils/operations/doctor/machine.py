"""Checks of this machine's disk: room, rights, backups, and what a killed process left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import Finding, in_thread
from utils.text import format_bytes

#: Bytes below which the disk is as good as full: PostgreSQL's write-ahead log alone grows in pieces of 16 MB.
LEAST_BYTES = 200 * 2**20
#: Age of the newest backup from which a reminder is due, where none are scheduled.
OLD = timedelta(days=7)
#: Where journals are, under DATA_DIR; the bot's own constant comes with all of discord.py.
SPOOL = "spool"


async def check_disk(patient: DoctorContext) -> Sequence[Finding]:
    """Whether there is room under DATA_DIR, and whether we may write there."""
    directory = patient.data_dir
    free, refused = await in_thread(lambda: _looked_at(directory))
    if refused is not None:
        todo = "give the directory to the user that the bot runs as, or set DATA_DIR to another"
        return [Finding("fail", "disk", f"{directory} cannot be written: {refused}", todo)]
    seen = f"{format_bytes(free)} free under {directory}"
    if free < LEAST_BYTES:
        return [Finding("fail", "disk", seen, "make room, or set DATA_DIR to a larger disk")]
    spool = patient.settings.spool_max_mb * 2**20 if patient.settings.spool != "off" else 0
    if free < LEAST_BYTES + spool:
        todo = f"make room, or lower SPOOL_MAX_MB ({patient.settings.spool_max_mb}): an outage would fill the disk"
        return [Finding("warn", "disk", seen, todo)]
    return [Finding("ok", "disk", seen)]


def _looked_at(directory: Path) -> tuple[int, str | None]:
    """Return the bytes that are free and why nothing can be written, None when it can; leaves nothing behind."""
    there = directory.expanduser().resolve()
    while not there.exists() and there != there.parent:
        there = there.parent  # the first start makes it
    free = shutil.disk_usage(there).free
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as exc:
        return free, exc.strerror or type(exc).__name__
    return free, None


async def check_backups(patient: DoctorContext) -> Sequence[Finding]:
    """How old the newest full backup is."""
    from utils.operations.backup.kept import Kept

    patient.needs("BACKUP_URL", "BACKUP_AGE_RECIPIENT", "BACKUP_AGE_IDENTITY_FILE", "BACKUP_EVERY", "DATA_DIR")
    newest = await Kept(patient.settings.model_copy(update={"data_dir": patient.data_dir})).newest()
    every = patient.settings.backup_every
    todo = "run python bot.py backup create" + ("" if every else ", or let it happen: BACKUP_EVERY=1d")
    if newest is None:
        return [Finding("warn", "backups", "there is no full one", todo)]
    age = datetime.now(UTC) - newest.made_at
    seen = f"the newest, {newest.id}, is {age / timedelta(hours=1):,.0f} hours old"
    late = timedelta(seconds=2 * every) if every else OLD
    return [Finding("warn", "backups", seen, todo) if age > late else Finding("ok", "backups", seen)]


async def check_spool(patient: DoctorContext) -> Sequence[Finding]:
    """Journals of processes that ended before the database had their events."""
    from utils.mirror.spool import journal

    directory = patient.data_dir / SPOOL

    def look() -> tuple[int, int, int]:
        found = journal.list_journals(directory)
        dead = [path for path in found if journal.is_dead(directory, path.name)]
        size = sum(entry.stat().st_size for path in dead for entry in path.iterdir() if entry.is_file())
        return len(found), len(dead), size

    total, dead, size = await in_thread(look)
    if dead:
        seen = f"{dead} journals of processes that have ended, {format_bytes(size)}"
        return [Finding("warn", "spool", seen, "start the bot: it writes them into the database")]
    return [Finding("ok", "spool", f"{total} in use" if total else "nothing is left over")]

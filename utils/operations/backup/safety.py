"""Backups that are made automatically before something is destroyed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

from utils.database import Pool
from utils.database.ownership import fetch_version
from utils.operations.action import Progress, ignore_progress
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import BackupRequest, count_live_rows, create
from utils.operations.backup.manifest import Reason
from utils.settings import Settings


def backup_before(
    reason: Reason,
    settings: Settings,
    pool: Pool,
    progress: Progress = ignore_progress,
    *,
    reuse: timedelta | None = None,
) -> Callable[[], Awaitable[str]]:
    """Return a function that backs the database up and returns the backup's id; it raises `BackupError`.

    reuse: how old a backup may be that was made for the same reason, at the same revision and with as many rows, so
    that no other one is needed: a bot that starts again and again must not fill the disk. None: always make one.
    """

    async def make() -> str:
        catalog = BackupCatalog(settings)
        found = None if reuse is None else await _find_equal(reason, catalog, pool, reuse)
        return found or (await create(pool, catalog, BackupRequest(reason), progress=progress)).id

    return make


async def _find_equal(reason: Reason, catalog: BackupCatalog, pool: Pool, age: timedelta) -> str | None:
    revision = ", ".join((await fetch_version(pool)).revisions) or None
    rows = await count_live_rows(pool)
    for entry in await (await catalog.serving(pool)).entries():
        manifest = entry.manifest
        if manifest is None or entry.intact is None or not entry.is_own or not timedelta(0) <= entry.age <= age:
            continue
        if (manifest.reason, manifest.revision, manifest.data_rows) == (reason, revision, rows):
            return entry.id
    return None

"""Backups that are made automatically before something is destroyed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from utils.database import Pool
from utils.operations.action import Progress, ignore_progress
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import BackupRequest, create
from utils.operations.backup.manifest import Reason
from utils.settings import Settings


def backup_before(
    reason: Reason, settings: Settings, pool: Pool, progress: Progress = ignore_progress
) -> Callable[[], Awaitable[str]]:
    """Return a function that backs the database up and returns the backup's id; it raises `BackupError`."""

    async def make() -> str:
        return (await create(pool, BackupCatalog(settings), BackupRequest(reason), progress=progress)).id

    return make

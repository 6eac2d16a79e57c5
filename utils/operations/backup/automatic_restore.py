"""RECOVER=auto: restores the newest backup into a database that was lost and is empty."""

from __future__ import annotations

import asyncio

from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import Outcome
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.recovery import Hold, assess
from utils.operations.backup.restore import restore
from utils.operations.migrations import admin
from utils.service.lease import Lease

#: Seconds to wait for the lease, and to release it afterwards.
LEASE_SECONDS, RELEASE_SECONDS = 120.0, 5.0


async def restore_lost(pool: Pool, catalog: BackupCatalog, hold: Hold, lease: Lease) -> Outcome | None:
    """Restore the backup of a held empty database, under the lease; None: another process does, or has done so.

    Raises `BackupError` unless the backup is of the application, the server and the database, `GuildbookError` if it
    cannot be restored.
    """
    if hold.state != "empty" or hold.backup is None or not hold.is_of_application:
        raise BackupError(f"nothing is restored without an operator: {hold.line}")
    await admin.upgrade(pool)
    try:
        try:
            async with asyncio.timeout(LEASE_SECONDS):
                await lease.wait()
        except TimeoutError:
            return None
        if (await assess(pool)).state != "empty":
            return None
        return await restore(pool, catalog, hold.backup.id, from_other=True)  # the hold has compared whose it is
    finally:
        await lease.release(RELEASE_SECONDS)

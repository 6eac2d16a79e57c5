"""What operators do with backups: create, list, verify, restore, drill, prune. Each returns an `Outcome`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from utils.database import Pool
from utils.operations.action import Outcome, Progress, ignore_progress
from utils.operations.backup.catalog import BackupCatalog, Entry
from utils.operations.backup.create import BackupRequest, create
from utils.operations.backup.drill import drill
from utils.operations.backup.manifest import Reason
from utils.operations.backup.restore import restore
from utils.operations.backup.retention import RetentionRules
from utils.operations.backup.whole_database import find_losses
from utils.settings import Settings

#: Backups listed for people; `--json` has all.
MAX_LINES = 15


class BackupService:
    """The operators' actions on the backups of one bot. All of them raise `BackupError`."""

    def __init__(self, settings: Settings, *, catalog: BackupCatalog | None = None) -> None:
        self._settings = settings
        self.catalog: BackupCatalog = BackupCatalog(settings) if catalog is None else catalog

    async def create(
        self,
        pool: Pool,
        *,
        tables: Sequence[str] = (),
        schema_only: bool = False,
        reason: Reason = "manual",
        progress: Progress = ignore_progress,
    ) -> Outcome:
        """Back up the database, or only some `tables`, or no rows with `schema_only`."""
        manifest = await create(pool, self.catalog, BackupRequest(reason, tables, schema_only), progress=progress)
        places = " and ".join(store.name for store in self.catalog.stores)
        return Outcome(
            f"backup {manifest.line}; made in {manifest.seconds:.1f} s, stored in {places}", asdict(manifest)
        )

    async def list(self) -> Outcome:
        """List the backups, newest first; not ok if a store did not answer."""
        entries, errors = await self.catalog.scan()
        lines = [entry.line for entry in entries[:MAX_LINES]] or ["there are no backups yet"]
        if len(entries) > MAX_LINES:
            lines.append(f"and {len(entries) - MAX_LINES} older ones")
        data = {"backups": [_entry_data(entry) for entry in entries], "problems": errors}
        return Outcome("\n".join([*lines, *errors]), data, ok=not errors)

    async def verify(self, id: str, *, progress: Progress = ignore_progress) -> Outcome:
        """Verify a backup in every store that has it."""
        entry = await self.catalog.find(id)
        checks = [
            str(await self.catalog.verify(store, entry.id, progress=progress))
            for store in self.catalog.stores
            if store.name in entry.places
        ]
        return Outcome("\n".join([f"backup {entry.id} is intact", *checks]), {"id": entry.id, "checks": checks})

    async def restore(
        self,
        pool: Pool,
        id: str,
        *,
        whole_database: bool = False,
        drop_old: bool = False,
        progress: Progress = ignore_progress,
        after: Callable[[], Awaitable[None]] | None = None,
    ) -> Outcome:
        """Replace the rows of our tables by those of a backup; see `utils.operations.backup.restore`."""
        return await restore(
            pool, self.catalog, id, whole_database=whole_database, drop_old=drop_old, progress=progress, after=after
        )

    async def find_losses(self, pool: Pool, id: str) -> Sequence[str]:
        """Return what a restore of the whole database would lose, one line each."""
        entry = await self.catalog.find(id)
        return await find_losses(pool, [] if entry.manifest is None else list(entry.manifest.counts))

    async def drill(self, pool: Pool, id: str = "latest", *, progress: Progress = ignore_progress) -> Outcome:
        """Restore a backup next to the live database and compare; see `utils.operations.backup.drill`."""
        return await drill(pool, self.catalog, id, progress=progress)

    async def prune(self, *, dry_run: bool = False) -> Outcome:
        """Delete the backups that the settings do not keep, and the remains of interrupted uploads."""
        pruned = await self.catalog.prune(RetentionRules.of(self._settings), dry_run=dry_run)
        verb = "would be deleted" if dry_run else "deleted"
        lines = [f"{len(pruned.ids)} of {pruned.total} backups {verb}, {pruned.files} files", *pruned.ids[:MAX_LINES]]
        return Outcome("\n".join(lines), {"deleted": pruned.ids, "files": pruned.files, "dry_run": dry_run})


def _entry_data(entry: Entry) -> dict[str, Any]:
    data = {
        "id": entry.id,
        "places": entry.places,
        "problem": entry.problem,
        "drill": entry.drill.line if entry.drill else None,
    }
    return data if entry.manifest is None else data | asdict(entry.manifest)

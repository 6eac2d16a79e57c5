"""What operators do with backups: create, list, verify, restore, drill, push, sign, accept and prune them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.exceptions import BackupError, DatabaseError, WrongStore
from utils.operations.action import Outcome, Progress, ignore_progress
from utils.operations.backup.archive.manifest import Reason
from utils.operations.backup.archive.reading import Verification
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.entries import Entry
from utils.operations.backup.catalog.keeping import Pruned, drops_among, find_alerts, lacking_remotely, prune
from utils.operations.backup.catalog.retention import RetentionRules
from utils.operations.backup.catalog.signing import sign
from utils.operations.backup.create import BackupRequest, count_live_rows, create
from utils.operations.backup.restore.drill import drill
from utils.operations.backup.restore.restore import restore
from utils.operations.backup.restore.whole_database import find_losses
from utils.settings import Settings
from utils.text import format_count

#: Backups listed for people; `--json` has all.
MAX_LINES = 15


class BackupService:
    """The operators' actions on the backups of one bot. All of them raise `BackupError`.

    `directory` replaces the stores of the settings, and is only read.
    """

    def __init__(
        self, settings: Settings, *, catalog: BackupCatalog | None = None, directory: Path | None = None
    ) -> None:
        self._settings = settings
        self.catalog: BackupCatalog = BackupCatalog(settings, directory=directory) if catalog is None else catalog

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
        """List the backups, newest first, and what is wrong with them; not ok if a store did not answer."""
        entries, errors = await self.catalog.scan()
        lines = [entry.line for entry in entries[:MAX_LINES]] or ["there are no backups yet"]
        if len(entries) > MAX_LINES:
            lines.append(f"and {format_count(len(entries) - MAX_LINES, 'older one')}")
        alerts = [alert.text for alert in find_alerts(self.catalog, entries, errors)]
        data = {"backups": [_entry_data(entry) for entry in entries], "problems": errors, "alerts": alerts}
        return Outcome("\n".join([*lines, *alerts, *errors]), data, ok=not errors)

    async def verify(self, id: str, *, is_deep: bool = False, progress: Progress = ignore_progress) -> Outcome:
        """Verify a backup in every store that has it; with `is_deep`, decompress it and count its rows."""
        entry = await self.catalog.find(id)
        checks: list[Verification] = []
        problems: list[str] = []
        for copy in entry.copies:
            try:
                checks.append(await self.catalog.verify(copy.store, entry.id, is_deep=is_deep, progress=progress))
            except BackupError as exc:
                problems.append(str(exc))
        lines = [str(check) for check in checks]
        if problems:
            raise BackupError("; ".join([*problems, *(f"intact in {line}" for line in lines)]))
        is_read = not is_deep or all(check.rows is not None for check in checks)
        verdict = f"backup {entry.id} is intact" if is_read else f"the rows of backup {entry.id} could not be counted"
        return Outcome("\n".join([verdict, *lines]), {"id": entry.id, "checks": lines}, ok=is_read)

    async def restore(
        self,
        pool: Pool,
        id: str,
        *,
        whole_database: bool = False,
        drop_old: bool = False,
        from_other: bool = False,
        tables: Sequence[str] = (),
        documents_of: int | None = None,
        progress: Progress = ignore_progress,
        after: Callable[[], Awaitable[None]] | None = None,
    ) -> Outcome:
        """Replace the rows of our tables by those of a backup; see `utils.operations.backup.restore`."""
        return await restore(
            pool,
            self.catalog,
            id,
            whole_database=whole_database,
            drop_old=drop_old,
            from_other=from_other,
            tables=tables,
            documents_of=documents_of,
            progress=progress,
            after=after,
        )

    async def describe_restore(self, pool: Pool, id: str) -> tuple[Entry, str]:
        """Return the backup with an id, and what restoring it would mean: which one, how old, and the rows to now."""
        catalog = await self.catalog.serving(pool)
        entry = await catalog.find(id)
        assert entry.manifest is not None, "found ones have one"
        try:
            now = await count_live_rows(pool)
        except DatabaseError as exc:
            difference = f"the rows of the database cannot be counted: {exc}"
        else:
            difference = _describe_difference(entry.manifest.data_rows, now)
        return entry, f"{entry.line}; {difference}"

    async def find_losses(self, pool: Pool, id: str) -> Sequence[str]:
        """Return what a restore of the whole database would lose, one line each."""
        entry = await (await self.catalog.serving(pool)).find(id)
        return await find_losses(pool, [] if entry.manifest is None else list(entry.manifest.counts))

    async def drill(self, pool: Pool, id: str = "latest", *, progress: Progress = ignore_progress) -> Outcome:
        """Restore a backup next to the live database and compare; see `utils.operations.backup.drill`."""
        return await drill(pool, self.catalog, id, progress=progress)

    async def push(self, id: str | None = None, *, progress: Progress = ignore_progress) -> Outcome:
        """Upload a backup, or all that the remote store lacks and would keep."""
        if self.catalog.remote is None:
            raise WrongStore("there is no remote store to upload to: set BACKUP_URL", variables=["BACKUP_URL"])
        if id is None:
            entries, errors = await self.catalog.scan()
            if errors:
                raise BackupError(errors[0])
            ids = lacking_remotely(self.catalog, entries)
        else:
            entry = await self.catalog.find(id)
            is_there = any(copy.store is self.catalog.remote and copy.problem is None for copy in entry.copies)
            ids = [] if is_there else [entry.id]
        for one in ids:
            await self.catalog.push(one, progress=progress)
        text = f"uploaded to {self.catalog.remote.name}: {', '.join(ids)}" if ids else "nothing to upload"
        return Outcome(text, {"uploaded": ids})

    async def sign(self, id: str | None = None, *, progress: Progress = ignore_progress) -> Outcome:
        """Sign a backup, or all of this database that are not signed, after verifying them.

        Not ok if one must not be signed, or a store did not answer. Raises `SettingsError` without BACKUP_SIGNING_KEY.
        """
        done = await sign(self.catalog, id, progress=progress)
        lines = [f"signed {id}: {verification}" for (id, _), verification in done.signed.items()]
        lines += [f"NOT signed {id}: {problem}" for (id, _), problem in done.refused.items()]
        counted = [
            f"{format_count(len(done.signed), 'manifest')} signed",
            f"{len(done.already):,} signed already" if done.already else "",
            f"{len(done.refused):,} refused" if done.refused else "",
            f"{format_count(len(done.foreign), 'backup')} of other databases left out" if done.foreign else "",
        ]
        data = {
            "signed": [{"id": id, "store": store} for id, store in done.signed],
            "already_signed": [{"id": id, "store": store} for id, store in done.already],
            "refused": [{"id": id, "store": store, "problem": why} for (id, store), why in done.refused.items()],
            "foreign": done.foreign,
            "problems": done.errors,
        }
        text = "\n".join([*lines, ", ".join(filter(None, counted)), *done.errors])
        return Outcome(text, data, ok=not (done.refused or done.errors))

    async def accept(self, id: str = "latest") -> Outcome:
        """Let retention go on after a backup that has much less than the ones before it."""
        entries, _ = await self.catalog.scan()
        found = await self.catalog.find(id)
        if found.is_own and found.id not in {drop.after.id for drop in drops_among(entries)}:
            reason = "is accepted already" if found.is_accepted else "does not have much less than the ones before it"
            return Outcome(f"nothing to accept: backup {found.id} {reason}", {"accepted": None})
        entry = await self.catalog.accept(found.id)
        return Outcome(f"backup {entry.id} is accepted: retention goes on", {"accepted": entry.id})

    async def prune(self, *, dry_run: bool = False) -> Outcome:
        """Delete the backups that the settings do not keep, and the remains of interrupted uploads.

        Not ok if nothing may be deleted now, or a store did not answer.
        """
        pruned = await prune(self.catalog, RetentionRules.of(self._settings), dry_run=dry_run)
        data = {
            "deleted": pruned.ids,
            "files": pruned.files,
            "dry_run": dry_run,
            "paused": None if pruned.pause is None else pruned.pause.line,
            "problems": list(pruned.errors),
        }
        return Outcome("\n".join(_describe_pruned(pruned, dry_run)), data, ok=not (pruned.errors or pruned.pause))


def _describe_pruned(pruned: Pruned, dry_run: bool) -> list[str]:
    if pruned.pause is not None:
        return [f"retention is paused: {pruned.pause.line}", *pruned.errors]
    verb = "would be deleted" if dry_run else "deleted"
    lines = [
        f"{len(pruned.ids)} of {format_count(pruned.total, 'backup')} {verb}, {format_count(pruned.files, 'file')}",
        *pruned.ids[:MAX_LINES],
    ]
    if len(pruned.ids) > MAX_LINES:
        lines.append(f"and {len(pruned.ids) - MAX_LINES} more")
    return [*lines, *pruned.errors]


def _describe_difference(rows: int, now: int) -> str:
    """Return how the rows of a backup compare with those that are live, for people."""
    if rows == now:
        return f"the database has {format_count(now, 'row')}, as many as the backup"
    difference = f"{abs(now - rows):,} {'more' if now > rows else 'fewer'}"
    return f"the database has {format_count(now, 'row')}, {difference} than the backup"


def _entry_data(entry: Entry) -> dict[str, Any]:
    data = {
        "id": entry.id,
        "places": entry.places,
        "age_seconds": round(entry.age.total_seconds()),
        "is_own": entry.is_own,
        "is_complete": entry.problem is None,
        "is_accepted": entry.is_accepted,
        "problem": entry.problem,
        "drill": entry.drill.line if entry.drill else None,
    }
    return data if entry.manifest is None else data | asdict(entry.manifest)

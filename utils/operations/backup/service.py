"""What operators do with backups: make, list, verify, restore, drill, prune, wherever the settings keep them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup.create import PLAIN, Places, Wanted, create
from utils.operations.backup.drill import drill, last_drill
from utils.operations.backup.kept import SECOND, Kept, private_room
from utils.operations.backup.manifest import ENCRYPTED, ID, SUFFIX, Manifest
from utils.operations.backup.restore import restore
from utils.operations.backup.retention import Rules, kept
from utils.operations.backup.store import Directory, Remote
from utils.operations.backup.verify import checked, decrypted, in_place, manifest_of, readable

#: Shown to people; `--json` has all.
SHOWN = 15
#: Hours after which a file without a manifest in a remote store is what an upload left that was cut off.
ORPHAN_HOURS = 24.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One backup as a listing shows it."""

    id: str
    #: Names of the stores that have it.
    places: tuple[str, ...]
    #: None: it cannot be read, as `problem` says.
    manifest: Manifest | None
    #: What a look at the files' names and sizes shows to be wrong with it, in whichever place; None: nothing.
    problem: str | None = None
    #: What the last drill said; None: there was none.
    drill: str | None = None

    @property
    def line(self) -> str:
        """It in a line for people."""
        what = f"{self.id}: {self.problem}" if self.manifest is None else self.manifest.line
        if self.manifest is not None and self.problem:
            what += f"; DAMAGED: {self.problem}"
        return what + (f"; {self.drill}" if self.drill else "")


class BackupService(Kept):
    """The backups of one bot."""

    @property
    def stores(self) -> list[Directory | Remote]:
        """Where backups are, the nearest first."""
        return [self.local] if self._remote is None else [self.local, self._remote]

    # --- making

    async def make(self, database: Pool, wanted: Wanted, progress: Progress = ignore_progress) -> Manifest:
        """Make a backup, and return its manifest. Raises `BackupError`."""
        settings = self._settings
        keeps_plain = settings.drill_every is not None and settings.backup_age_identity_file is None
        places = Places(self.local, self._remote, settings.backup_age_recipient, keeps_plain)
        return await create(database, places, wanted, progress=progress)

    async def create(
        self,
        database: Pool,
        *,
        tables: Sequence[str] = (),
        schema_only: bool = False,
        reason: str = "manual",
        progress: Progress = ignore_progress,
    ) -> Outcome:
        """Make a backup, of some `tables` only or without rows where that is asked for. Raises `BackupError`."""
        manifest = await self.make(database, Wanted(reason, tables, schema_only), progress)
        places = " and ".join(store.name for store in self.stores)
        return Outcome(
            f"backup {manifest.line}; made in {manifest.seconds:.1f} s, stored in {places}", asdict(manifest)
        )

    # --- looking

    async def known(self) -> list[Entry]:
        """Return every backup that there is, the newest first, damaged ones too.

        A store elsewhere that does not answer is left out, and logged. Raises `BackupError`.
        """
        return (await self._looked())[0]

    async def _looked(self) -> tuple[list[Entry], list[str]]:
        places, wrong = await self._places()
        entries = [await self._entry(id, found) for id, found in places.items()]
        return sorted(entries, key=_order, reverse=True), wrong

    async def _entry(self, id: str, places: Sequence[tuple[Directory | Remote, dict[str, int]]]) -> Entry:
        names, read, problems = tuple(store.name for store, _ in places), [], []
        for store, there in places:
            try:
                manifest = await manifest_of(store, id)
                read.append(manifest)
                in_place(store, manifest, there)
            except BackupError as exc:
                problems.append(str(exc))
        problem = "; ".join(problems) or None
        if not read:
            return Entry(id, names, None, problem)
        found = await last_drill(self, id)
        told = (
            None if found is None else f"drill of {found.at[:16].replace('T', ' ')} {'well' if found.ok else 'FAILED'}"
        )
        return Entry(id, names, read[0], problem, told)

    async def find(self, id: str) -> Entry:
        """Return a backup; `latest` is the newest full one. Raises `BackupError` when it is not there, or damaged."""
        entries = await self.known()
        for entry in entries:
            if entry.id == id or (id == "latest" and entry.manifest is not None and entry.manifest.kind == "full"):
                if entry.manifest is None:
                    raise BackupError(entry.problem or f"backup {id} is damaged")
                return entry
        there = f"the newest are {', '.join(entry.id for entry in entries[:3])}" if entries else "there is none at all"
        raise BackupError(f"there is no {'full backup' if id == 'latest' else f'backup {id[:60]}'}: {there}")

    async def listing(self) -> Outcome:
        """List the backups."""
        entries, wrong = await self._looked()
        lines = [entry.line for entry in entries[:SHOWN]] or ["there are no backups yet"]
        if len(entries) > SHOWN:
            lines.append(f"and {len(entries) - SHOWN} older ones")
        data = [
            {"id": one.id, "places": one.places, "problem": one.problem, "drill": one.drill}
            | ({} if one.manifest is None else asdict(one.manifest))
            for one in entries
        ]
        return Outcome("\n".join([*lines, *wrong]), {"backups": data, "problems": wrong}, ok=not wrong)

    async def verify(self, id: str, *, progress: Progress = ignore_progress) -> Outcome:
        """Check a backup in every place that has it. Raises `BackupError` with what is wrong."""
        entry = await self.find(id)
        stores = [store for store in self.stores if store.name in entry.places]
        done = [f"{store.name}: {await self._verify(store, entry.id, progress)}" for store in stores]
        return Outcome("\n".join([f"backup {entry.id} is whole", *done]), {"id": entry.id, "checks": done})

    async def _verify(self, store: Directory | Remote, id: str, progress: Progress) -> str:
        manifest = await manifest_of(store, id)
        identity = self._settings.backup_age_identity_file
        async with private_room(self._settings.data_dir / "opened") as room:
            is_remote = isinstance(store, Remote)
            file = room / "fetched" if is_remote else self.local.path / manifest.file
            await checked(store, manifest, keep=file if is_remote else None, progress=progress)
            said = f"{manifest.size:,} bytes with the right SHA-256"
            if manifest.recipient is not None:
                if identity is None:
                    return f"{said}; not decrypted, because BACKUP_AGE_IDENTITY_FILE is not set"
                await decrypted(manifest, file, identity, room / "plain", progress=progress)
                file, said = room / "plain", f"{said}, decrypted"
            progress(Step("reading the contents"))
            await readable(manifest, file)
        return f"{said}, contents as the manifest says"

    # --- using

    async def restore(
        self,
        database: Pool,
        id: str,
        *,
        drop_old: bool = False,
        progress: Progress = ignore_progress,
        after: Callable[[], Awaitable[None]] | None = None,
    ) -> Outcome:
        """Put a backup in the database's place; see `utils.operations.backup.restore`."""
        return await restore(database, self, id, drop_old=drop_old, progress=progress, after=after)

    async def drill(self, database: Pool, id: str = "latest", *, progress: Progress = ignore_progress) -> Outcome:
        """Restore a backup where it touches nothing, and compare; see `utils.operations.backup.drill`."""
        return await drill(database, self, id, progress=progress)

    async def prune(self, *, dry_run: bool = False) -> Outcome:
        """Delete what the settings do not keep, and what uploads left that were cut off; `dry_run`: only say it."""
        settings, now = self._settings, datetime.now(UTC)
        rules = Rules(
            settings.backup_keep, settings.backup_keep_daily, settings.backup_keep_weekly, settings.backup_keep_monthly
        )
        entries, wrong = await self._looked()
        if wrong:
            raise BackupError(f"nothing was deleted: {'; '.join(wrong)}")
        whole = {entry.id: entry.manifest for entry in entries if entry.manifest is not None and entry.problem is None}
        keep = kept(whole.values(), rules, now)
        # What is damaged takes no other one's place, and stays: somebody has to look at it.
        gone = [entry for entry in entries if entry.id in whole and entry.id not in keep]
        files = 0
        for store in self.stores:
            names = await store.names()
            doomed = [name for name in names if _belongs(name, {entry.id for entry in gone})]
            doomed += [name for name in names if _is_orphan(name, names, now)]
            files += len(doomed)
            if not dry_run:
                # The manifest first: without it the backup does not exist, whatever happens next.
                for name in sorted(doomed, key=lambda name: not name.endswith(SUFFIX)):
                    await store.delete(name)
        if not dry_run:
            await asyncio.to_thread(self._forget_plain, {entry.id for entry in gone})
        verb = "would be deleted" if dry_run else "deleted"
        lines = [f"{len(gone)} of {len(entries)} backups {verb}, {files} files", *(entry.id for entry in gone[:SHOWN])]
        return Outcome("\n".join(lines), {"deleted": [entry.id for entry in gone], "files": files, "dry_run": dry_run})

    def _forget_plain(self, ids: set[str]) -> None:
        for id in ids:
            (self.local.path / f"{PLAIN}{id}").unlink(missing_ok=True)


def _order(entry: Entry) -> tuple[str, str, str]:
    """Sort by time: ids say the second, then chance, and a manifest that cannot be read says nothing."""
    return entry.id[:SECOND], entry.manifest.created_at if entry.manifest else "", entry.id


def _belongs(name: str, ids: set[str]) -> bool:
    return name.split(".", 1)[0] in ids


def _is_orphan(name: str, names: dict[str, int], now: datetime) -> bool:
    """Return whether a file is an archive, or a drill's result, whose manifest never came, or is gone."""
    id, _, rest = name.partition(".")
    if not ID.fullmatch(id) or f"{id}{SUFFIX}" in names or rest not in ("dump", ENCRYPTED.lstrip("."), "drill.json"):
        return False
    return now - datetime.strptime(id[:16], "%Y%m%dT%H%M%S%z") > timedelta(hours=ORPHAN_HOURS)


def summary(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the newest backups as statistics show them."""
    return [{"id": entry.id, "line": entry.line} for entry in entries]

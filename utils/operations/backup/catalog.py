"""The catalog of backups: which exist in which store, whose they are, whether they are intact, and their archives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import orjson

from utils.database import Pool
from utils.exceptions import BackupError, MigrationError, UnknownBackup, UploadFailed
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import client_tools, pipeline
from utils.operations.backup.archive import Archive
from utils.operations.backup.contents import check_rows
from utils.operations.backup.entries import Copy, Entry, describe_some, newest_last
from utils.operations.backup.identity import Identity, describe, identity_in_settings, identity_of
from utils.operations.backup.manifest import (
    ACCEPTED_SUFFIX,
    ARCHIVE_SUFFIX,
    DRILL_SUFFIX,
    ENCRYPTED_SUFFIX,
    ID,
    MANIFEST_SUFFIX,
    MAX_DRILL_BYTES,
    MAX_MANIFEST_BYTES,
    TIMESTAMP_LENGTH,
    DrillResult,
    Manifest,
    check_signature,
    created_at,
    parse_drill_result,
    parse_manifest,
)
from utils.operations.backup.reading import Verification, check_contents, decrypt, private_directory, verified_file
from utils.operations.backup.retention import AHEAD, Drop, RetentionRules, find_drops, first_drops, ids_to_keep
from utils.operations.backup.store import Content, Directory, Remote, Store
from utils.operations.migrations import Revisions
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Prefix of an archive kept from before its encryption, for drills without an identity. The dot hides it from listings.
PLAINTEXT_PREFIX = ".plain-"
#: Hours after which a file without a manifest in a store counts as left by an interrupted upload.
ORPHAN_HOURS = 24.0
#: Stands for the newest good backup of this database.
LATEST = "latest"

#: File names of a store with their sizes in bytes.
Names = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Listing:
    """What one store has."""

    #: Ids and backups.
    copies: list[tuple[str, Copy]]
    #: Results of drills by the id of their backup.
    drills: dict[str, DrillResult]
    #: Ids of backups that operators have accepted.
    accepted: set[str]


class Alert(NamedTuple):
    """Something that operators should know of the backups."""

    #: The same for as long as it is the same trouble, although `text` may change.
    key: str
    #: What it is, and what to do, for people.
    text: str


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune deleted, or would delete."""

    ids: list[str]
    #: Number of files, those of interrupted uploads included.
    files: int
    #: Number of own backups before.
    total: int
    #: Why nothing was deleted: the newest backup has much less than the ones before; None if it has not.
    pause: Drop | None = None
    #: Stores that did not answer.
    errors: tuple[str, ...] = ()


class BackupCatalog:
    """The backups in `DATA_DIR/backups` and at `BACKUP_URL`, as seen by one database.

    Raises `BackupError` if `BACKUP_URL` cannot be used.

    Parameters
    ----------
    remote: replaces the store at `BACKUP_URL`.
    directory: replaces both stores, and is not written to.
    identity: the database that it serves; by default the one in the settings, which is not asked.
    clock: returns the current time.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        remote: Remote | None = None,
        directory: Path | None = None,
        identity: Identity | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.settings: Settings = settings
        self.identity: Identity = identity or identity_in_settings(settings)
        self.clock: Callable[[], datetime] = clock
        self._is_elsewhere = directory is not None
        if directory is not None:
            self.local: Directory = Directory(directory, is_read_only=True)
            self.remote: Remote | None = None
        else:
            self.local = Directory(settings.data_dir / "backups")
            self.remote = Remote(settings.backup_url) if remote is None and settings.backup_url is not None else remote
        self.stores: list[Store] = [self.local] if self.remote is None else [self.local, self.remote]

    def __repr__(self) -> str:
        return f"<BackupCatalog stores={[store.name for store in self.stores]} of {self.identity}>"

    async def serving(self, pool: Pool) -> BackupCatalog:
        """Return the same catalog as seen by the database of a pool. Raises `DatabaseError`."""
        other = copy(self)
        other.identity = await identity_of(pool, self.settings)
        return other

    def writable(self) -> BackupCatalog:
        """Return the catalog of the stores in the settings, if this one is of another directory."""
        return BackupCatalog(self.settings, identity=self.identity) if self._is_elsewhere else self

    # --- listing

    async def entries(self) -> list[Entry]:
        """Return all backups, the newest first, damaged ones before the others.

        A remote store that does not answer is logged and left out. Raises `BackupError` if the local store cannot be
        read.
        """
        return (await self.scan())[0]

    async def scan(self) -> tuple[list[Entry], list[str]]:
        """Return all backups, the newest first, and the errors of stores that did not answer."""
        listings = await asyncio.gather(*(self._list(store) for store in self.stores))
        errors = [listing for listing in listings if isinstance(listing, str)]
        copies: dict[str, list[Copy]] = {}
        drills: dict[str, DrillResult] = {}
        accepted: set[str] = set()
        for listing in listings:
            if not isinstance(listing, str):
                for id, copy in listing.copies:
                    copies.setdefault(id, []).append(copy)
                drills = listing.drills | drills
                accepted |= listing.accepted
        readable = [copy.manifest for found in copies.values() for copy in found if copy.manifest is not None]
        identity, now = self.identity.resolve(readable), self.clock()
        entries = []
        for id, found in copies.items():
            manifest = next((copy.manifest for copy in found if copy.manifest is not None), None)
            is_here = not self._is_elsewhere and any(copy.store is self.local for copy in found)
            entries.append(
                Entry(
                    id,
                    tuple(found),
                    is_own=manifest is None or identity.owns(manifest, is_local=is_here),
                    age=now - (created_at(id) if manifest is None else manifest.made_at),
                    is_accepted=id in accepted,
                    drill=drills.get(id),
                )
            )
        return sorted(entries, key=newest_last, reverse=True), errors

    async def find(self, id: str) -> Entry:
        """Return a backup by its id, or the newest good one of this database for `latest`.

        Raises `BackupError` if there is none, or no store has a readable manifest of it.
        """
        entries, errors = await self.scan()
        if id == LATEST:
            found = next((entry for entry in entries if entry.is_good), None)
            if found is not None:
                self._warn_about_newer(found, entries)
                return found
            raise BackupError(
                f"there is no full backup of {self.identity}: {describe_some(entries, errors)}. List backups with"
                " python bot.py backup list"
            )
        for entry in entries:
            if entry.id == id:
                if entry.manifest is None:
                    raise BackupError(entry.problem or f"backup {id} is damaged")
                return entry
        if errors:  # a store that does not answer may have it
            raise BackupError(f"there is no backup {id[:60]}: {describe_some(entries, errors)}")
        raise UnknownBackup(f"there is no backup {id[:60]}: {describe_some(entries, errors)}")

    async def newest(self, accepts: Callable[[Manifest], bool] = lambda _: True) -> Manifest | None:
        """Return the newest good backup of this database that is accepted; None if there is none."""
        for entry in await self.entries():
            if entry.is_good and entry.manifest is not None and accepts(entry.manifest):
                return entry.manifest
        return None

    async def read_manifest(self, store: Store, id: str) -> Manifest:
        """Return a manifest as one store has it. Raises `BackupError` if it does not exist or is damaged."""
        content = await store.read(f"{id}{MANIFEST_SUFFIX}", MAX_MANIFEST_BYTES + 1)
        if content is None:
            raise BackupError(f"{store.name} has no backup {id}: its manifest {id}{MANIFEST_SUFFIX} does not exist")
        manifest = self._parse(id, content)
        check_signature(content, f"{id}{MANIFEST_SUFFIX}", self.settings.backup_signing_key)
        return manifest

    def _parse(self, id: str, content: Content) -> Manifest:
        name = f"{id}{MANIFEST_SUFFIX}"
        if isinstance(content, BackupError):
            raise content
        if content is None:
            raise BackupError(f"the manifest {name} does not exist")
        if len(content) > MAX_MANIFEST_BYTES:
            raise BackupError(f"{name} is damaged: larger than {MAX_MANIFEST_BYTES:,} bytes")
        return parse_manifest(content, name)

    async def _list(self, store: Store) -> Listing | str:
        """Return what a store has, or the error of a remote one. Raises `BackupError` for the local one."""
        try:
            names = await store.names()
            manifests = await store.read_many(filter(_is_manifest, names), MAX_MANIFEST_BYTES + 1)
            results = await store.read_many([name for name in names if name.endswith(DRILL_SUFFIX)], MAX_DRILL_BYTES)
        except BackupError as exc:
            if store is self.local:
                raise
            _log.warning("only the backups in %s are listed: %s", self.local.name, exc)
            return str(exc)
        copies: list[tuple[str, Copy]] = []
        for name, content in manifests.items():
            id, manifest, problem = name.removesuffix(MANIFEST_SUFFIX), None, None
            try:
                manifest = self._parse(id, content)
                assert isinstance(content, bytes), "it was parsed"
                check_signature(content, name, self.settings.backup_signing_key)
                _check_presence(store, manifest, names)
            except BackupError as exc:
                problem = str(exc)
            copies.append((id, Copy(store, manifest, problem)))
        drills = {
            name.removesuffix(DRILL_SUFFIX): drill
            for name, content in results.items()
            if isinstance(content, bytes) and (drill := _parse_drill(name, content)) is not None
        }
        accepted = {name.removesuffix(ACCEPTED_SUFFIX) for name in names if name.endswith(ACCEPTED_SUFFIX)}
        return Listing(copies, drills, accepted)

    def _warn_about_newer(self, latest: Entry, entries: Sequence[Entry]) -> None:
        damaged = [
            f"{entry.id} ({entry.problem})"
            for entry in entries
            if entry.is_own and entry.intact is None and entry.id[:TIMESTAMP_LENGTH] > latest.id[:TIMESTAMP_LENGTH]
        ]
        if damaged:
            _log.warning("damaged backups newer than %s are skipped: %s", latest.id, "; ".join(damaged))

    # --- adding

    async def order_after(self, moment: datetime) -> datetime:
        """Return `moment`, or a later time if a backup of this database is already dated so late."""
        newest = max(
            (entry.manifest.order[0] for entry in await self.entries() if entry.is_own and entry.manifest is not None),
            default=moment,
        )
        return max(moment, newest + timedelta(milliseconds=1)) if newest >= moment else moment

    async def add(self, unfinished: Path, manifest: Manifest, *, progress: Progress = ignore_progress) -> None:
        """Add a finished archive to every store: locally first, and its manifest last.

        Raises `UploadFailed` if only the remote store lacks it then, `BackupError` for the local one.
        """
        await asyncio.to_thread(self.local.finish, unfinished, manifest.file)
        await self.local.write(f"{manifest.id}{MANIFEST_SUFFIX}", self._serialize(manifest))
        await self.delete_plaintext(keep=manifest.id)
        try:
            await self._upload(manifest, progress)
        except BackupError as exc:
            raise UploadFailed(
                f"backup {manifest.id} is complete in {self.local.name}, but was not stored remotely: {exc}",
                backup=manifest.id,
            ) from exc

    def lacking_remotely(self, entries: Sequence[Entry]) -> list[str]:
        """Return the ids of those of the backups that the remote store lacks and would keep, oldest first."""
        remote = self.remote
        if remote is None:
            return []
        there = _intact_in(remote, entries)
        here = _intact_in(self.local, entries)
        # A damaged copy there is a reason to upload again; a foreign backup here is not.
        lacking = {id: manifest for id, manifest in here.items() if id not in there}
        keep = ids_to_keep([*there.values(), *lacking.values()], RetentionRules.of(self.settings), self.clock())
        return [one.id for one in sorted(lacking.values(), key=lambda one: one.order) if one.id in keep]

    async def push(self, id: str, *, progress: Progress = ignore_progress) -> None:
        """Upload a backup that is complete locally. Raises `BackupError`."""
        if self.remote is None:
            raise BackupError("there is no remote store: set BACKUP_URL")
        manifest = await self.read_manifest(self.local, id)
        _check_presence(self.local, manifest, await self.local.names())
        async with private_directory(self.settings.data_dir / "opened") as directory:
            await verified_file(self.local, manifest, directory, progress)  # it must not replace a good one there
        await self._upload(manifest, progress)

    async def _upload(self, manifest: Manifest, progress: Progress) -> None:
        """Upload an archive, read it back, and only then upload its manifest."""
        remote = self.remote
        if remote is None:
            return
        await remote.upload(self.local.path / manifest.file, manifest.file, progress)
        stored = await remote.digest(manifest.file, progress)
        if (stored.size, stored.sha256) != (manifest.size, manifest.sha256):
            await remote.delete(manifest.file)
            raise BackupError(
                f"{remote.name} stored something other than was sent as {manifest.file} ({stored.size:,} bytes, not"
                f" {manifest.size:,}): it was deleted there; try again"
            )
        await remote.write(f"{manifest.id}{MANIFEST_SUFFIX}", self._serialize(manifest))

    def _serialize(self, manifest: Manifest) -> bytes:
        return manifest.serialize(self.settings.backup_signing_key)

    # --- reading archives

    @contextlib.asynccontextmanager
    async def open(
        self,
        id: str,
        server_major: int,
        *,
        from_other: bool = False,
        allow_partial: bool = False,
        progress: Progress = ignore_progress,
    ) -> AsyncIterator[Archive]:
        """Yield a backup as a local file: downloaded, its checksum verified, decrypted.

        Raises `BackupError` if the backup does not exist, belongs to another project, is partial or damaged, is
        encrypted and there is no identity, or was made on a newer major version.

        Parameters
        ----------
        id: may be `latest`.
        server_major: the major version of the server that it is to be restored on.
        from_other: whether it may be of another database or application.
        allow_partial: whether it may have some tables only.
        """
        entry = await self.find(id)
        if entry.intact is None or entry.intact.manifest is None:
            raise BackupError(entry.problem or f"backup {entry.id} is damaged")
        manifest = entry.intact.manifest
        if not (entry.is_own or from_other):
            owner = describe(manifest.application_id, manifest.host, manifest.database)
            raise BackupError(
                f"backup {manifest.id} is of {owner}, not of {self.identity}: nothing was changed. To restore it here"
                " all the same, add --from-other"
            )
        if manifest.kind == "schema" or (manifest.kind == "tables" and not allow_partial):
            raise BackupError(
                f"backup {manifest.id} is partial ({manifest.kind}): "
                + ("it has no rows" if manifest.kind == "schema" else "only a full one can be drilled or replace all")
            )
        if manifest.major > server_major:
            raise BackupError(
                f"backup {manifest.id} was made on PostgreSQL {manifest.major}, which pg_restore {server_major} cannot"
                f" read: restore it on a server of version {manifest.major} or newer"
            )
        tools = await client_tools.find_directory(server_major)
        async with private_directory(self.settings.data_dir / "opened") as directory:
            file, manifest = await self._first_intact_file(entry, directory, progress)
            made_at, major = manifest.made_at, manifest.major
            is_partial = manifest.kind == "tables"
            yield Archive(manifest.id, file, tools, made_at, major, manifest.revision, manifest.counts, is_partial)

    async def _first_intact_file(self, entry: Entry, directory: Path, progress: Progress) -> tuple[Path, Manifest]:
        """Return the archive of the first copy whose checksum is right. Raises `BackupError` if none has one."""
        problems: list[str] = []
        for found in entry.copies:
            if found.problem is None and found.manifest is not None:
                try:
                    return await self._plaintext_file(found.store, found.manifest, directory, progress), found.manifest
                except BackupError as exc:
                    problems.append(str(exc))
                    _log.warning("%s", exc)
        raise BackupError("; ".join(problems))

    async def verify(
        self, store: Store, id: str, *, is_deep: bool = False, progress: Progress = ignore_progress
    ) -> Verification:
        """Read a backup's archive in one store and compare it with its manifest. Raises `BackupError` if it differs.

        An encrypted one is decrypted too if there is an identity. With `is_deep` it is decompressed, and all rows are
        counted.
        """
        manifest = await self.read_manifest(store, id)
        _check_presence(store, manifest, await store.names())
        is_encrypted = manifest.recipient is not None
        identity = self.settings.backup_age_identity_file
        async with private_directory(self.settings.data_dir / "opened") as directory:
            file = await verified_file(store, manifest, directory, progress)
            if is_encrypted:
                if identity is None:
                    return Verification(store.name, manifest.size, is_encrypted, has_read_contents=False)
                file = await decrypt(manifest, file, identity, directory, progress)
            progress(Step("reading the contents"))
            tools = await client_tools.find_directory(manifest.major)
            await check_contents(manifest, file, tools)
            if is_deep:
                await check_rows(manifest, file, tools, progress=progress)
        rows = manifest.total_rows if is_deep else None
        return Verification(store.name, manifest.size, is_encrypted, has_read_contents=True, rows=rows)

    @property
    def keeps_plaintext(self) -> bool:
        """Whether the newest archive is also kept from before its encryption, for drills without an identity."""
        settings = self.settings
        return (
            bool(settings.backup_age_recipient and settings.drill_every is not None)
            and settings.backup_age_identity_file is None
        )

    def plaintext_path(self, id: str) -> Path:
        """Return where the archive of a backup is kept from before its encryption."""
        return self.local.path / f"{PLAINTEXT_PREFIX}{id}"

    async def delete_plaintext(self, *, keep: str) -> None:
        """Delete the archives from before their encryption, except that of the backup `keep`."""

        def delete() -> None:
            for path in self.local.path.glob(f"{PLAINTEXT_PREFIX}*"):
                if path != self.plaintext_path(keep):
                    path.unlink(missing_ok=True)

        await asyncio.to_thread(delete)

    async def _plaintext_file(self, store: Store, manifest: Manifest, directory: Path, progress: Progress) -> Path:
        """Return the archive as a verified local file that is not encrypted."""
        if manifest.recipient is None:
            return await verified_file(store, manifest, directory, progress)
        identity = self.settings.backup_age_identity_file
        if identity is not None:
            file = await verified_file(store, manifest, directory, progress)
            return await decrypt(manifest, file, identity, directory, progress)
        file = self.plaintext_path(manifest.id)
        try:
            digest = await asyncio.to_thread(pipeline.file_digest, file)
        except OSError:
            raise BackupError(
                f"backup {manifest.id} is encrypted, and no copy from before its encryption is kept: set"
                " BACKUP_AGE_IDENTITY_FILE to the file with the age identity"
            ) from None
        if digest.sha256 != manifest.plain_sha256:
            raise BackupError(f"the unencrypted copy of backup {manifest.id} is damaged: use another backup")
        return file

    # --- drills

    async def last_drill(self, id: str) -> DrillResult | None:
        """Return the result of a backup's last drill; None if there was none, or its file is damaged."""
        return next((entry.drill for entry in await self.entries() if entry.id == id), None)

    async def write_drill(self, result: DrillResult) -> None:
        """Store the result of a drill in every store that can be written to."""
        await self._write_beside(f"{result.backup}{DRILL_SUFFIX}", result.serialize())

    async def _write_beside(self, name: str, content: bytes) -> list[str]:
        """Write a small file into every store, and return the names of those where that failed."""
        failed = []
        for store in self.stores:
            try:
                await store.write(name, content)
            except BackupError as exc:
                if store is self.local and not self._is_elsewhere:
                    raise
                failed.append(store.name)
                _log.warning("%s is not stored in %s: %s", name, store.name, exc)
        return failed

    # --- deleting

    async def accept(self, id: str) -> Entry:
        """Record that a backup may have less than the ones before it, so that retention goes on. Raises `BackupError`.

        `id` may be `latest`.
        """
        entry = await self.find(id)
        if not entry.is_own:
            raise BackupError(f"backup {entry.id} is not of {self.identity}: nothing was changed")
        content = orjson.dumps({"backup": entry.id, "at": self.clock().isoformat(timespec="seconds")})
        if failed := await self._write_beside(f"{entry.id}{ACCEPTED_SUFFIX}", content):
            raise BackupError(
                f"backup {entry.id} is accepted, but that could not be stored in {' and '.join(failed)}: try again, for"
                " processes that see only that store"
            )
        return entry

    def drops(self, entries: Sequence[Entry]) -> list[Drop]:
        """Return the backups that have much less than earlier ones, oldest first, without what operators accepted."""
        intact = [entry.intact.manifest for entry in entries if entry.is_own and entry.intact is not None]
        accepted = {entry.id for entry in entries if entry.is_accepted}
        return find_drops([one for one in intact if one is not None], accepted, _is_older)

    def pause(self, entries: Sequence[Entry]) -> Drop | None:
        """Return why nothing may be deleted now: the newest backup is a drop; None if it is not."""
        newest = next((entry.id for entry in entries if entry.is_good), None)
        return next((drop for drop in self.drops(entries) if drop.after.id == newest), None)

    def alerts(self, entries: Sequence[Entry], errors: Sequence[str] = ()) -> list[Alert]:
        """Return what is wrong with the backups of this database.

        entries, errors: what `scan` returned.
        """
        pause = self.pause(entries)
        alerts = [] if pause is None else [Alert(f"drop after {pause.before.id}", pause.line)]
        own = [entry for entry in entries if entry.is_own]
        newest = next((entry for entry in own if entry.is_good), None)
        for entry in own:
            if entry.problem is not None and (newest is None or entry.id >= newest.id):
                alerts.append(Alert(f"damage of {entry.id}", f"backup {entry.id} is damaged: {entry.problem}"))
            if entry.age < -AHEAD:
                what = "the clock of the database or of this machine was wrong, or is"
                alerts.append(Alert(f"date of {entry.id}", f"backup {entry.id} is {entry.age_text}: {what}"))
        if not errors and (pending := self.lacking_remotely(entries)):
            what = f"backup {pending[0]} is" if len(pending) == 1 else f"{len(pending)} backups are"
            alerts.append(
                Alert("uploads", f"{what} not in the remote store yet: run python bot.py backup push, or wait")
            )
        return alerts

    async def prune(self, rules: RetentionRules, *, dry_run: bool = False) -> Pruned:
        """Delete the backups that the rules do not keep, and what interrupted uploads left, in each store by itself.

        Only backups of this database are deleted. Damaged ones are neither counted nor deleted, because somebody should
        look at them. Nothing is deleted while the newest backup has much less than the ones before it, and the last one
        before such a drop is kept. With `dry_run` nothing is deleted. A store that does not answer stays as it is.
        """
        now = self.clock()
        entries, errors = await self.scan()
        total = sum(entry.is_own for entry in entries)
        if (pause := self.pause(entries)) is not None:
            return Pruned([], 0, total, pause, tuple(errors))
        # The smaller one too: without it nobody could tell that there was a drop.
        protected = {id for drop in first_drops(self.drops(entries)) for id in (drop.before.id, drop.after.id)}
        deleted: dict[str, None] = {}
        files = 0
        for store in self.stores:
            try:
                names = await store.names()
            except BackupError as exc:
                if store is self.local:
                    raise
                errors = errors or [str(exc)]
                continue
            copies = _intact_in(store, entries)
            keep = ids_to_keep(copies.values(), rules, now) | protected
            ids = [id for id in copies if id not in keep]
            expired = [name for name in names if _belongs_to(name, ids)]
            expired += [name for name in names if _is_orphan(name, names, now)]
            files += len(expired)
            deleted.update(dict.fromkeys(ids))
            if not dry_run:
                # The manifest first: without it the backup no longer exists, whatever happens next.
                for name in sorted(expired, key=lambda name: not name.endswith(MANIFEST_SUFFIX)):
                    await store.delete(name)
                if store is self.local:
                    for id in ids:
                        await asyncio.to_thread(self.plaintext_path(id).unlink, missing_ok=True)
        return Pruned(list(deleted), files, total, None, tuple(errors))


def _parse_drill(name: str, content: bytes) -> DrillResult | None:
    try:
        return parse_drill_result(content)
    except ValueError as exc:
        _log.warning("%s is damaged: %s", name, exc)
        return None


def _intact_in(store: Store, entries: Sequence[Entry]) -> dict[str, Manifest]:
    """Return the backups of this database of which a store has an intact copy."""
    return {
        entry.id: copy.manifest
        for entry in entries
        if entry.is_own
        for copy in entry.copies
        if copy.store is store and copy.problem is None and copy.manifest is not None
    }


def _is_older(first: str | None, second: str | None) -> bool:
    """Whether a revision is older than another one; False if one of them is not known."""
    if first == second or first is None or second is None:
        return False
    try:
        known = Revisions()
        return bool(set(second.split(", ")) & set(known.pending(first.split(", "))))
    except MigrationError:
        return False


def _check_presence(store: Store, manifest: Manifest, names: Names) -> None:
    """Raise `BackupError` unless the archive is among a store's files with the right size."""
    size = names.get(manifest.file)
    if size is None:
        raise BackupError(f"backup {manifest.id} is incomplete: its archive {manifest.file} is not in {store.name}")
    if size != manifest.size:
        raise BackupError(
            f"{manifest.file} in {store.name} is damaged: it has {size:,} bytes, expected {manifest.size:,}"
        )


def _is_manifest(name: str) -> bool:
    return name.endswith(MANIFEST_SUFFIX) and ID.fullmatch(name.removesuffix(MANIFEST_SUFFIX)) is not None


def _belongs_to(name: str, ids: Collection[str]) -> bool:
    return name.split(".", 1)[0] in ids


def _is_orphan(name: str, names: Names, now: datetime) -> bool:
    """Return whether a file is an old archive or drill result without a manifest."""
    id, _, suffix = name.partition(".")
    if not ID.fullmatch(id) or f"{id}{MANIFEST_SUFFIX}" in names:
        return False
    if f".{suffix}" not in (ARCHIVE_SUFFIX, ENCRYPTED_SUFFIX, DRILL_SUFFIX, ACCEPTED_SUFFIX):
        return False
    return now - created_at(id) > timedelta(hours=ORPHAN_HOURS)

"""The catalog of backups: which exist in which store, whose they are, whether they are intact, and their archives."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from utils.database import Pool
from utils.exceptions import BackupError, UnknownBackup, UploadFailed, WrongStore
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive import client_tools, pipeline
from utils.operations.backup.archive.manifest import (
    ACCEPTED_SUFFIX,
    DRILL_SUFFIX,
    MANIFEST_SUFFIX,
    MAX_MANIFEST_BYTES,
    DrillResult,
    Manifest,
    check_signature,
    created_at,
)
from utils.operations.backup.archive.reading import (
    Verification,
    check_contents,
    check_rows,
    decrypt,
    private_directory,
    verified_file,
)
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.catalog.entries import (
    Copy,
    Entry,
    damaged_since,
    describe_some,
    manifest_of,
    newest_good,
    newest_last,
)
from utils.operations.backup.catalog.identity import Identity, describe_owner, identity_in_settings, identity_of
from utils.operations.backup.catalog.listing import Listing, check_presence, list_store, read_manifest
from utils.operations.backup.store import Directory, Remote, Store
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Prefix of an archive kept from before its encryption, for drills without an identity. The dot hides it from listings.
PLAINTEXT_PREFIX = ".plain-"
#: Stands for the newest good backup of this database.
LATEST = "latest"


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
        if self.remote is not None and self.remote.path is not None:
            here, there = self.local.path.resolve(), self.remote.path.resolve()
            if here == there:
                raise WrongStore(
                    f"BACKUP_URL is the directory {here}, where backups are anyway: a second store must be elsewhere",
                    variables=["BACKUP_URL"],
                )
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
        identity = self.identity.resolve(readable)
        entries = [
            self._entry(id, tuple(found), identity, drills.get(id), is_accepted=id in accepted)
            for id, found in copies.items()
        ]
        return sorted(entries, key=newest_last, reverse=True), errors

    def _entry(
        self, id: str, copies: tuple[Copy, ...], identity: Identity, drill: DrillResult | None, *, is_accepted: bool
    ) -> Entry:
        manifest = manifest_of(copies)
        is_local = not self._is_elsewhere and any(copy.store is self.local for copy in copies)
        return Entry(
            id,
            copies,
            is_local=is_local,
            is_own=manifest is None or identity.owns(manifest, is_local=is_local),
            age=self.clock() - (created_at(id) if manifest is None else manifest.made_at),
            is_accepted=is_accepted,
            drill=drill,
        )

    async def find(self, id: str) -> Entry:
        """Return a backup by its id, or the newest good one of this database for `latest`.

        Raises `BackupError` if there is none, or no store has a readable manifest of it.
        """
        entries, errors = await self.scan()
        if id == LATEST:
            found = newest_good(entries)
            if found is not None:
                if skipped := [entry for entry in damaged_since(found, entries) if entry is not found]:
                    lines = "; ".join(f"{entry.id} ({entry.problem})" for entry in skipped)
                    _log.warning("damaged backups newer than %s are skipped: %s", found.id, lines)
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

    async def newest(self) -> Manifest | None:
        """Return the newest good backup of this database; None if there is none."""
        found = newest_good(await self.entries())
        return None if found is None else found.manifest

    async def read_manifest(self, store: Store, id: str) -> Manifest:
        """Return a manifest as one store has it. Raises `BackupError` if it does not exist or is damaged."""
        content = await store.read(f"{id}{MANIFEST_SUFFIX}", MAX_MANIFEST_BYTES + 1)
        if content is None:
            raise BackupError(f"{store.name} has no backup {id}: its manifest {id}{MANIFEST_SUFFIX} does not exist")
        manifest = read_manifest(id, content)
        check_signature(content, f"{id}{MANIFEST_SUFFIX}", self.settings.backup_signing_key)
        return manifest

    async def _list(self, store: Store) -> Listing | str:
        """Return what a store has, or the error of a remote one. Raises `BackupError` for the local one."""
        try:
            return await list_store(store, self.settings.backup_signing_key)
        except BackupError as exc:
            if store is self.local:
                raise
            _log.warning("only the backups in %s are listed: %s", self.local.name, exc)
            return str(exc)

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

    async def push(self, id: str, *, progress: Progress = ignore_progress) -> None:
        """Upload a backup that is complete locally. Raises `BackupError`."""
        if self.remote is None:
            raise BackupError("there is no remote store: set BACKUP_URL")
        manifest = await self.read_manifest(self.local, id)
        check_presence(self.local, manifest, await self.local.names())
        # What has rotten here must not replace a good archive there.
        await verified_file(self.local, manifest, self.local.path, progress)
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
            raise BackupError(
                f"backup {manifest.id} is of {describe_owner(manifest)}, not of {self.identity}: nothing was changed."
                " To restore it here all the same, add --from-other"
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
            file, manifest = await self._plaintext_file(entry, directory, progress)
            yield Archive(
                manifest.id,
                file,
                tools,
                manifest.made_at,
                manifest.major,
                manifest.revision,
                manifest.counts,
                is_partial=manifest.kind == "tables",
                is_safety_copy=manifest.is_safety_copy,
                packs=manifest.packs,
            )

    async def verify(
        self, store: Store, id: str, *, is_deep: bool = False, progress: Progress = ignore_progress
    ) -> Verification:
        """Read a backup's archive in one store and compare it with its manifest. Raises `BackupError` if it differs.

        An encrypted one is decrypted too if there is an identity. With `is_deep` it is decompressed, and all rows are
        counted.
        """
        return await self.verify_copy(store, await self.read_manifest(store, id), is_deep=is_deep, progress=progress)

    async def verify_copy(
        self, store: Store, manifest: Manifest, *, is_deep: bool = False, progress: Progress = ignore_progress
    ) -> Verification:
        """Do what `verify` does, with a manifest that was read."""
        check_presence(store, manifest, await store.names())
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

    async def _plaintext_file(self, entry: Entry, directory: Path, progress: Progress) -> tuple[Path, Manifest]:
        """Return an archive that has some intact copy as a verified local file that is not encrypted."""
        assert entry.manifest is not None, "it has an intact copy"
        identity = self.settings.backup_age_identity_file
        if entry.manifest.recipient is not None and identity is None:
            return await self._kept_plaintext(entry.manifest), entry.manifest
        file, manifest = await self._first_verified(entry, directory, progress)
        if manifest.recipient is not None and identity is not None:
            file = await decrypt(manifest, file, identity, directory, progress)
        return file, manifest

    async def _first_verified(self, entry: Entry, directory: Path, progress: Progress) -> tuple[Path, Manifest]:
        """Return the archive of the first copy whose checksum is right. Raises `BackupError` if none has one."""
        problems: list[str] = []
        for found in entry.copies:
            if found.problem is None and found.manifest is not None:
                try:
                    return await verified_file(found.store, found.manifest, directory, progress), found.manifest
                except BackupError as exc:
                    problems.append(str(exc))
                    _log.warning("%s", exc)
        raise BackupError("; ".join(problems))

    async def _kept_plaintext(self, manifest: Manifest) -> Path:
        """Return the copy of an archive from before its encryption. Raises `BackupError` if there is none."""
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

    # --- accepting

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

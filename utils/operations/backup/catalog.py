"""The catalog of backups: which ones exist in which store, whether they are intact, and how to get at their content."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from utils.exceptions import BackupError
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import client_tools, encryption, pipeline
from utils.operations.backup.archive import CONTENTS_SECONDS, Archive, list_contents
from utils.operations.backup.manifest import (
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
    created_at,
    parse_drill_result,
    parse_manifest,
)
from utils.operations.backup.retention import RetentionRules, ids_to_keep
from utils.operations.backup.store import Directory, Remote, Store
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Prefix of an archive kept from before its encryption, for drills without an identity. The dot hides it from listings.
PLAINTEXT_PREFIX = ".plain-"
#: Hours after which a file without a manifest in a store counts as left by an interrupted upload.
ORPHAN_HOURS = 24.0
#: Lines of `pg_restore --list` that stand for the rows of a table: schema and name.
_TABLE_DATA = re.compile(r"^\d+; \d+ \d+ TABLE DATA (\S+) (.+) \S+$", re.MULTILINE)

#: File names of a store with their sizes in bytes.
Names = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One backup in a listing."""

    id: str
    #: Names of the stores that have it.
    places: tuple[str, ...]
    #: None if it cannot be read; `problem` says why.
    manifest: Manifest | None
    #: What names, sizes and manifests show to be damaged, in any store; None if nothing.
    problem: str | None = None
    #: Result of its last drill; None if there was none.
    drill: DrillResult | None = None

    @property
    def line(self) -> str:
        """A one-line summary for people."""
        summary = f"{self.id}: {self.problem}" if self.manifest is None else self.manifest.line
        if self.manifest is not None and self.problem:
            summary += f"; DAMAGED: {self.problem}"
        return summary + (f"; {self.drill.line}" if self.drill else "")


@dataclass(frozen=True, slots=True)
class Verification:
    """What the verification of one copy of a backup checked."""

    store: str
    #: Bytes whose SHA-256 was compared.
    size: int
    is_encrypted: bool
    #: False if it is encrypted and no identity was available: then only its checksum was compared.
    has_read_contents: bool

    def __str__(self) -> str:
        checksum = f"{self.store}: {self.size:,} bytes, SHA-256 correct"
        if not self.has_read_contents:
            return f"{checksum}; not decrypted, because BACKUP_AGE_IDENTITY_FILE is not set"
        return f"{checksum}{', decrypted' if self.is_encrypted else ''}, contents match the manifest"


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune deleted, or would delete."""

    ids: list[str]
    #: Number of files, those of interrupted uploads included.
    files: int
    #: Number of backups before.
    total: int


class BackupCatalog:
    """The backups in `DATA_DIR/backups` and at `BACKUP_URL`.

    `remote` replaces the store at `BACKUP_URL`. Raises `BackupError` if `BACKUP_URL` cannot be used.
    """

    def __init__(self, settings: Settings, *, remote: Remote | None = None) -> None:
        self.settings: Settings = settings
        self.local: Directory = Directory(settings.data_dir / "backups")
        if remote is None and settings.backup_url is not None:
            remote = Remote(settings.backup_url)
        self.remote: Remote | None = remote
        self.stores: list[Store] = [self.local] if remote is None else [self.local, remote]

    # --- listing

    async def entries(self) -> list[Entry]:
        """Return all backups, newest first, damaged ones included.

        A remote store that does not answer is logged and left out. Raises `BackupError` if the local store cannot be
        read.
        """
        return (await self.scan())[0]

    async def scan(self) -> tuple[list[Entry], list[str]]:
        """Return all backups, newest first, and the errors of stores that did not answer."""
        copies, errors = await self._copies()
        entries = [await self._entry(id, found) for id, found in copies.items()]
        return sorted(entries, key=_age_key, reverse=True), errors

    async def find(self, id: str) -> Entry:
        """Return a backup by its id, or the newest full one for `latest`.

        Raises `BackupError` if there is none, or no store has a readable manifest of it.
        """
        entries = await self.entries()
        for entry in entries:
            if entry.id == id or (id == "latest" and entry.manifest is not None and entry.manifest.kind == "full"):
                if entry.manifest is None:
                    raise BackupError(entry.problem or f"backup {id} is damaged")
                return entry
        known = f"the newest are {', '.join(entry.id for entry in entries[:3])}" if entries else "there are no backups"
        raise BackupError(f"there is no {'full backup' if id == 'latest' else f'backup {id[:60]}'}: {known}")

    async def newest(self, accepts: Callable[[Manifest], bool] = lambda _: True) -> Manifest | None:
        """Return the newest full backup that is intact in some store and accepted; None if there is none."""
        try:
            _, manifest = await self._find_intact("latest", accepts)
        except BackupError as exc:
            _log.debug("no usable backup: %s", exc)
            return None
        return manifest

    async def read_manifest(self, store: Store, id: str) -> Manifest:
        """Return a manifest as one store has it. Raises `BackupError` if it does not exist or is damaged."""
        name = f"{id}{MANIFEST_SUFFIX}"
        content = await store.read(name, MAX_MANIFEST_BYTES + 1)
        if content is None:
            raise BackupError(f"{store.name} has no backup {id}: its manifest {name} does not exist")
        if len(content) > MAX_MANIFEST_BYTES:
            raise BackupError(f"{name} is damaged: larger than {MAX_MANIFEST_BYTES:,} bytes")
        return parse_manifest(content, name)

    async def _copies(self) -> tuple[dict[str, list[tuple[Store, Names]]], list[str]]:
        """Return the stores that have a manifest of each backup, and the errors of stores that did not answer.

        Raises `BackupError` if the local store cannot be read.
        """
        copies: dict[str, list[tuple[Store, Names]]] = {}
        errors: list[str] = []
        for store in self.stores:
            try:
                names = await store.names()
            except BackupError as exc:
                if store is self.local:
                    raise
                _log.warning("only the backups in %s are listed: %s", self.local.name, exc)
                errors.append(str(exc))
                continue
            for name in filter(_is_manifest, names):
                copies.setdefault(name.removesuffix(MANIFEST_SUFFIX), []).append((store, names))
        return copies, errors

    async def _entry(self, id: str, copies: Sequence[tuple[Store, Names]]) -> Entry:
        manifests, problems = [], []
        for store, names in copies:
            try:
                manifest = await self.read_manifest(store, id)
                manifests.append(manifest)
                _check_presence(store, manifest, names)
            except BackupError as exc:
                problems.append(str(exc))
        return Entry(
            id,
            tuple(store.name for store, _ in copies),
            manifests[0] if manifests else None,
            "; ".join(problems) or None,
            await self.last_drill(id),
        )

    async def _find_intact(
        self, id: str, accepts: Callable[[Manifest], bool] = lambda _: True
    ) -> tuple[Store, Manifest]:
        """Return the first store that has a backup intact, by names and sizes; `latest` is the newest such full one.

        Raises `BackupError` if there is none.
        """
        copies, unreachable = await self._copies()
        if id != "latest":
            found, problem = await self._intact_copy(id, copies.get(id, []))
            if found is None:
                raise BackupError(problem) if problem else self._not_found(f"backup {id}", unreachable)
            return found
        best: tuple[Store, Manifest] | None = None
        damaged: list[str] = []
        for candidate in sorted(copies, reverse=True):
            if best is not None and candidate[:TIMESTAMP_LENGTH] != best[1].id[:TIMESTAMP_LENGTH]:
                break
            found, problem = await self._intact_copy(candidate, copies[candidate])
            if found is None:
                damaged.append(problem)
            # Within one second the ids do not tell which is newer.
            elif found[1].kind == "full" and accepts(found[1]) and (best is None or found[1].made_at > best[1].made_at):
                best = found
        if best is None:
            raise self._not_found("full backup", [*damaged[:1], *unreachable])
        if damaged:
            _log.warning("damaged backups newer than %s are skipped: %s", best[1].id, "; ".join(damaged))
        return best

    async def _intact_copy(
        self, id: str, copies: Sequence[tuple[Store, Names]]
    ) -> tuple[tuple[Store, Manifest] | None, str]:
        """Return the first store whose manifest is readable and whose archive has the right size, or the problems."""
        problems: list[str] = []
        for store, names in copies:
            try:
                manifest = await self.read_manifest(store, id)
                _check_presence(store, manifest, names)
            except BackupError as exc:
                problems.append(str(exc))
            else:
                return (store, manifest), ""
        return None, "; ".join(problems)

    def _not_found(self, what: str, reasons: Sequence[str] = ()) -> BackupError:
        places = " or ".join(store.name for store in self.stores)
        details = f" ({'; '.join(reasons)})" if reasons else ""
        return BackupError(f"there is no {what} in {places}{details}: list backups with python bot.py backup list")

    # --- reading archives

    @contextlib.asynccontextmanager
    async def open(
        self, id: str, server_major: int, *, allow_partial: bool = False, progress: Progress = ignore_progress
    ) -> AsyncIterator[Archive]:
        """Yield a full backup as a local file: downloaded, its checksum verified, decrypted.

        `id` may be `latest`. `server_major` is the major version of the server that it is to be restored on. With
        `allow_partial` it may be of some tables. Raises `BackupError` if the backup does not exist, belongs to another
        project, is partial or damaged, is encrypted and there is no identity, or was made on a newer major version.
        """
        store, manifest = await self._find_intact(id)
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
            file = await self._plaintext_file(store, manifest, directory, progress)
            made_at, major = manifest.made_at, manifest.major
            is_partial = manifest.kind != "full"
            yield Archive(manifest.id, file, tools, made_at, major, manifest.revision, manifest.counts, is_partial)

    async def verify(self, store: Store, id: str, *, progress: Progress = ignore_progress) -> Verification:
        """Read a backup's archive in one store and compare it with its manifest. Raises `BackupError` if it differs.

        An encrypted one is decrypted too if there is an identity.
        """
        manifest = await self.read_manifest(store, id)
        _check_presence(store, manifest, await store.names())
        is_encrypted = manifest.recipient is not None
        identity = self.settings.backup_age_identity_file
        async with private_directory(self.settings.data_dir / "opened") as directory:
            file = await self._verified_file(store, manifest, directory, progress)
            if is_encrypted:
                if identity is None:
                    return Verification(store.name, manifest.size, is_encrypted, has_read_contents=False)
                file = await _decrypt(manifest, file, identity, directory, progress)
            progress(Step("reading the contents"))
            await check_contents(manifest, file, await client_tools.find_directory(manifest.major))
        return Verification(store.name, manifest.size, is_encrypted, has_read_contents=True)

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
            return await self._verified_file(store, manifest, directory, progress)
        identity = self.settings.backup_age_identity_file
        if identity is not None:
            file = await self._verified_file(store, manifest, directory, progress)
            return await _decrypt(manifest, file, identity, directory, progress)
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

    async def _verified_file(self, store: Store, manifest: Manifest, directory: Path, progress: Progress) -> Path:
        """Return the archive as it is stored as a local file, after comparing its size and checksum."""
        progress(Step("verifying", 0, manifest.size, "bytes"))
        if isinstance(store, Remote):
            file = directory / "downloaded"
            digest = await store.download(manifest.file, file, progress)
        else:
            file = store.path / manifest.file
            try:
                digest = await asyncio.to_thread(pipeline.file_digest, file)
            except OSError as exc:
                raise BackupError(f"{file} cannot be read: {exc.strerror}: use another backup") from exc
        if (digest.size, digest.sha256) != (manifest.size, manifest.sha256):
            raise BackupError(
                f"{manifest.file} in {store.name} is damaged: it has {digest.size:,} bytes and SHA-256"
                f" {digest.sha256[:12]}…, expected {manifest.size:,} and {manifest.sha256[:12]}…: use another backup"
            )
        return file

    # --- drills

    async def last_drill(self, id: str) -> DrillResult | None:
        """Return the result of a backup's last drill; None if there was none, or its file is damaged."""
        for store in self.stores:
            try:
                content = await store.read(f"{id}{DRILL_SUFFIX}", MAX_DRILL_BYTES)
            except BackupError as exc:
                if store is self.local:
                    raise
                _log.debug("could not read the drill result of backup %s: %s", id, exc)
                continue
            if content is not None:
                try:
                    return parse_drill_result(content)
                except ValueError as exc:
                    _log.warning("the drill result of backup %s is damaged: %s", id, exc)
                    return None
        return None

    async def write_drill(self, result: DrillResult) -> None:
        """Store the result of a drill in every store."""
        for store in self.stores:
            try:
                await store.write(f"{result.backup}{DRILL_SUFFIX}", result.serialize())
            except BackupError as exc:
                if store is self.local:
                    raise
                _log.warning("the drill result of backup %s is stored locally only: %s", result.backup, exc)

    # --- deleting

    async def prune(self, rules: RetentionRules, *, dry_run: bool = False) -> Pruned:
        """Delete the backups that the rules do not keep, and what interrupted uploads left.

        Damaged backups are neither counted nor deleted, because somebody should look at them. With `dry_run` nothing is
        deleted. Raises `BackupError`, and deletes nothing, if a store does not answer.
        """
        now = datetime.now(UTC)
        entries, errors = await self.scan()
        if errors:
            raise BackupError(f"nothing was deleted: {'; '.join(errors)}")
        intact = {entry.id: entry.manifest for entry in entries if entry.manifest is not None and entry.problem is None}
        keep = ids_to_keep(intact.values(), rules, now)
        ids = [entry.id for entry in entries if entry.id in intact and entry.id not in keep]
        files = 0
        for store in self.stores:
            names = await store.names()
            expired = [name for name in names if _belongs_to(name, ids)]
            expired += [name for name in names if _is_orphan(name, names, now)]
            files += len(expired)
            if not dry_run:
                # The manifest first: without it the backup no longer exists, whatever happens next.
                for name in sorted(expired, key=lambda name: not name.endswith(MANIFEST_SUFFIX)):
                    await store.delete(name)
        if not dry_run:
            for id in ids:
                await asyncio.to_thread(self.plaintext_path(id).unlink, missing_ok=True)
        return Pruned(ids, files, len(entries))


async def check_contents(manifest: Manifest, file: Path, tools: Path, *, timeout: float = CONTENTS_SECONDS) -> None:
    """List an unencrypted archive with pg_restore, and check that it has the rows that the manifest counts.

    `tools` is the directory of pg_restore. Raises `BackupError`.
    """
    contents = await list_contents(file, tools, name=manifest.file, timeout=timeout)
    tables = {f"{schema}.{name}" for schema, name in _TABLE_DATA.findall(contents)}
    # Partitions appear under their own names, which start with their table's.
    missing = [
        name
        for name, rows in manifest.rows.items()
        if rows and not any(table == name or table.startswith(f"{name}_") for table in tables)
    ]
    if missing:
        raise BackupError(f"{manifest.file} has no rows of {', '.join(missing[:5])}, which the manifest counts")


@contextlib.asynccontextmanager
async def private_directory(parent: Path) -> AsyncIterator[Path]:
    """Yield a new directory in `parent` that only its owner can read, after deleting those of killed processes.

    In threads, because deleting a gigabyte can take a good part of a second. Raises `BackupError`.
    """
    directory = _private_directory(parent)
    path = await asyncio.to_thread(directory.__enter__)
    try:
        yield path
    finally:
        await asyncio.to_thread(directory.__exit__, None, None, None)


@contextlib.contextmanager
def _private_directory(parent: Path) -> Iterator[Path]:
    # Decrypted personal data is written there: it must not be left behind.
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in parent.iterdir():
            with contextlib.suppress(OSError), (leftover / "lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its owner is alive
                shutil.rmtree(leftover, ignore_errors=True)
        path = Path(tempfile.mkdtemp(dir=parent))
    except OSError as exc:
        raise BackupError(f"{parent} cannot be used: {exc.strerror}: choose another DATA_DIR") from exc
    try:
        with (path / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def _decrypt(manifest: Manifest, file: Path, identity: Path, directory: Path, progress: Progress) -> Path:
    """Decrypt an archive into a directory and return the new file. Raises `BackupError` if it is damaged."""
    out = directory / "decrypted"
    command = pipeline.Command(encryption.decrypt_command(identity), dict(os.environ))
    [digest] = await pipeline.run([command], out, source=file, progress=progress, what="decrypting")
    if digest.sha256 != manifest.plain_sha256:
        raise BackupError(f"{manifest.file} is damaged: it does not decrypt to what was encrypted")
    return out


def _check_presence(store: Store, manifest: Manifest, names: Names) -> None:
    """Raise `BackupError` unless the archive is among a store's files with the right size."""
    size = names.get(manifest.file)
    if size is None:
        raise BackupError(f"backup {manifest.id} is incomplete: its archive {manifest.file} is not in {store.name}")
    if size != manifest.size:
        raise BackupError(
            f"{manifest.file} in {store.name} is damaged: it has {size:,} bytes, expected {manifest.size:,}"
        )


def _age_key(entry: Entry) -> tuple[str, str, str]:
    """Sort key by age. Ids tell the second only, and an unreadable manifest tells nothing."""
    return entry.id[:TIMESTAMP_LENGTH], entry.manifest.created_at if entry.manifest else "", entry.id


def _is_manifest(name: str) -> bool:
    return name.endswith(MANIFEST_SUFFIX) and ID.fullmatch(name.removesuffix(MANIFEST_SUFFIX)) is not None


def _belongs_to(name: str, ids: Collection[str]) -> bool:
    return name.split(".", 1)[0] in ids


def _is_orphan(name: str, names: Names, now: datetime) -> bool:
    """Return whether a file is an old archive or drill result without a manifest."""
    id, _, suffix = name.partition(".")
    if not ID.fullmatch(id) or f"{id}{MANIFEST_SUFFIX}" in names:
        return False
    if f".{suffix}" not in (ARCHIVE_SUFFIX, ENCRYPTED_SUFFIX, DRILL_SUFFIX):
        return False
    return now - created_at(id) > timedelta(hours=ORPHAN_HOURS)

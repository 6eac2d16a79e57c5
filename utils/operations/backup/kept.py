"""The backups that the settings lead to, as a restore and a drill take them: checked, decrypted, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations.action import Progress
from utils.operations.backup import encryption, pipeline, tools
from utils.operations.backup.create import PLAIN, Places, Wanted, create
from utils.operations.backup.manifest import ID, LARGEST, SUFFIX, Manifest, unpacked
from utils.operations.backup.source import Archive, Known
from utils.operations.backup.store import Directory, Remote, Store
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Letters of an id that say the second it was made in.
SECOND = len("20260102T030405Z")
#: Bytes that a drill's result may have.
NOTE_BYTES = 1_000_000


class Kept:
    """The backups under `DATA_DIR/backups`, and those at `BACKUP_URL` that are not there."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.local = Directory(settings.data_dir / "backups")
        self._remote = None if settings.backup_url is None else Remote(settings.backup_url)
        self._stores: list[Directory | Remote] = [self.local] if self._remote is None else [self.local, self._remote]

    @contextlib.asynccontextmanager
    async def opened(self, which: str, server: int, progress: Progress) -> AsyncIterator[Archive]:
        """Lend a backup as a file; see `Backups`."""
        store, manifest = await self._find(which)
        if manifest.kind != "full":
            raise BackupError(
                f"backup {manifest.id} is partial ({manifest.kind}): only a full one can take the database's place. To"
                " bring back some tables, use pg_restore --table on its archive"
            )
        if manifest.major > server:
            raise BackupError(
                f"backup {manifest.id} was made with PostgreSQL {manifest.major}, which the tools of the server's"
                f" {server} cannot read: restore it on a server of {manifest.major} or newer"
            )
        directory = await tools.found(server)
        async with private_room(self._settings.data_dir / "opened") as place:
            file = await self._readable(store, manifest, place, progress)
            counts = {_table(name): rows for name, rows in manifest.rows.items()}
            yield Archive(manifest.id, file, directory, manifest.made_at, manifest.major, manifest.revision, counts)

    async def _readable(self, store: Store, manifest: Manifest, place: Path, progress: Progress) -> Path:
        """Return the archive on this machine as pg_restore reads it, checked."""
        if manifest.recipient is None:
            return await self._whole(store, manifest, place, progress)
        plain, identity = self.local.path / f"{PLAIN}{manifest.id}", self._settings.backup_age_identity_file
        if identity is not None:
            file = await self._whole(store, manifest, place, progress)
            plain = place / "plain.dump"
            command = pipeline.Command(encryption.decryption(identity), dict(os.environ))
            await pipeline.run([command], plain, source=file, progress=progress, what="decrypting")
        try:
            passed = await asyncio.to_thread(pipeline.checksum, plain)
        except OSError:
            raise BackupError(
                f"backup {manifest.id} is encrypted, and no copy from before the encryption is kept: set"
                " BACKUP_AGE_IDENTITY_FILE to the file with the age identity"
            ) from None
        if passed.sha256 != manifest.plain_sha256:
            raise BackupError(f"backup {manifest.id} does not decrypt to what was encrypted: use another backup")
        return plain

    async def _whole(self, store: Store, manifest: Manifest, place: Path, progress: Progress) -> Path:
        """Return the archive as it is stored, on this machine, with the size and checksum that it must have."""
        if store is self.local:
            file = self.local.path / manifest.file
            try:
                passed = await asyncio.to_thread(pipeline.checksum, file)
            except OSError as exc:
                raise BackupError(f"{file} cannot be read: {exc.strerror}: use another backup") from exc
        else:
            file = place / "fetched"
            passed = await store.fetch(manifest.file, file, progress)
        if (passed.size, passed.sha256) != (manifest.size, manifest.sha256):
            raise BackupError(
                f"backup {manifest.id} at {store.name} is damaged: {manifest.file} has {passed.size:,} bytes and"
                f" checksum {passed.sha256[:12]}…, expected {manifest.size:,} and {manifest.sha256[:12]}…. Use another"
                " backup"
            )
        return file

    async def _find(self, which: str) -> tuple[Store, Manifest]:
        """Return a backup and the nearest store that has it whole; "latest" is the newest full one that any has.

        Raises `BackupError` when there is none.
        """
        places, silent_ones = await self._places()
        if which != "latest":
            found, refused = await self._whole_one(which, places.get(which, []))
            if found is None:
                raise BackupError(refused) if refused else self._missing(f"backup {which}", silent_ones)
            return found
        best: tuple[Store, Manifest] | None = None
        damaged: list[str] = []
        for id in sorted(places, reverse=True):
            if best is not None and id[:SECOND] != best[1].id[:SECOND]:
                break
            found, refused = await self._whole_one(id, places[id])
            if found is None:
                damaged.append(refused)
            # Within one second the ids do not say which is newer.
            elif found[1].kind == "full" and (best is None or found[1].made_at > best[1].made_at):
                best = found
        if best is None:
            raise self._missing("full backup", [*damaged[:1], *silent_ones])
        if damaged:
            _log.warning("backups that are newer than %s are passed over: %s", best[1].id, "; ".join(damaged))
        return best

    async def _places(self) -> tuple[dict[str, list[tuple[Directory | Remote, dict[str, int]]]], list[str]]:
        """Return which stores have a manifest of each backup, and what stores said that could not be asked.

        Raises `BackupError` when it is the near one.
        """
        places: dict[str, list[tuple[Directory | Remote, dict[str, int]]]] = {}
        wrong: list[str] = []
        for store in self._stores:
            try:
                names = await store.names()
            except BackupError as error:
                if store is self.local:
                    raise
                _log.warning("only the backups in %s are seen: %s", self.local.name, error)
                wrong.append(str(error))
                continue
            for name in filter(_is_manifest, names):
                places.setdefault(name.removesuffix(SUFFIX), []).append((store, names))
        return places, wrong

    async def _whole_one(
        self, id: str, places: list[tuple[Directory | Remote, dict[str, int]]]
    ) -> tuple[tuple[Store, Manifest] | None, str]:
        """Return the first store where a backup's manifest can be read and its archive is there, or what is wrong."""
        wrong: list[str] = []
        for store, names in places:
            try:
                manifest = await self._read(store, id)
            except BackupError as error:
                wrong.append(str(error))
                continue
            if names.get(manifest.file) == manifest.size:
                return (store, manifest), ""
            size = names.get(manifest.file)
            seen = "is not there" if size is None else f"has {size:,} bytes, expected {manifest.size:,}"
            wrong.append(f"backup {id} at {store.name} is damaged: {manifest.file} {seen}")
        return None, "; ".join(wrong)

    def _missing(self, what: str, why: Sequence[str] = ()) -> BackupError:
        places = " or ".join(store.name for store in self._stores)
        reasons = f" ({'; '.join(why)})" if why else ""
        return BackupError(f"there is no {what} in {places}{reasons}: python bot.py backup list shows what there is")

    async def _read(self, store: Store, id: str) -> Manifest:
        content = await store.read(id + SUFFIX, LARGEST)
        if content is None:
            raise BackupError(f"backup {id} is gone from {store.name}")
        return unpacked(content, id + SUFFIX)

    async def save(self, database: Pool, reason: str, progress: Progress) -> str:
        """Back the database up and return the backup's id."""
        settings = self._settings
        places = Places(self.local, self._remote, settings.backup_age_recipient)
        manifest = await create(database, places, Wanted(reason=reason), progress=progress)
        return manifest.id

    async def newest(self) -> Known | None:
        """Return the newest full backup; None: there is none."""
        try:
            _, manifest = await self._find("latest")
        except BackupError as error:
            _log.debug("no backup to offer: %s", error)
            return None
        return Known(manifest.id, manifest.made_at, manifest.total)

    async def read_note(self, name: str) -> bytes | None:
        """Return a small file that stands beside the backups; None: there is none."""
        for store in self._stores:
            try:
                content = await store.read(name, NOTE_BYTES)
            except BackupError as error:
                if store is self.local:
                    raise
                _log.debug("%s could not be read: %s", name, error)
                continue
            if content is not None:
                return content
        return None

    async def write_note(self, name: str, content: bytes) -> None:
        """Put a small file beside the backups, wherever they are."""
        for store in self._stores:
            try:
                await store.write(name, content)
            except BackupError as error:
                if store is self.local:
                    raise
                _log.warning("%s is here alone: %s", name, error)


def _is_manifest(name: str) -> bool:
    return name.endswith(SUFFIX) and ID.fullmatch(name.removesuffix(SUFFIX)) is not None


def _table(name: str) -> tuple[str, str]:
    schema, _, table = name.partition(".")
    return schema, table


@contextlib.asynccontextmanager
async def private_room(parent: Path) -> AsyncIterator[Path]:
    """Lend an empty directory that only we can read; what killed processes left there is removed first.

    In threads: to clear a gigabyte takes a disk a good part of a second. Raises `BackupError`.
    """
    place = _place(parent)
    room = await asyncio.to_thread(place.__enter__)
    try:
        yield room
    finally:
        await asyncio.to_thread(place.__exit__, None, None, None)


@contextlib.contextmanager
def _place(parent: Path) -> Iterator[Path]:
    # What is decrypted there is people's data: it must not stay behind.
    try:
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in parent.iterdir():
            with contextlib.suppress(OSError), (left / "lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its maker lives
                shutil.rmtree(left, ignore_errors=True)
        place = Path(tempfile.mkdtemp(dir=parent))
    except OSError as exc:
        raise BackupError(f"{parent} cannot be used: {exc.strerror}: choose another DATA_DIR") from exc
    try:
        with (place / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)

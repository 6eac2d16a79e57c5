"""A local directory of backup files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias, TypeVar

from utils.exceptions import BackupError, UnknownBackup
from utils.files import create_private, sync_directory

ResultT = TypeVar("ResultT")

#: Prefix of files that are still being written.
UNFINISHED = ".unfinished-"

#: A file's content, None if the file does not exist, or why it could not be read.
Content: TypeAlias = bytes | BackupError | None


class Directory:
    """A local directory that only its owner can read. The async methods raise `BackupError`.

    `is_read_only`: nothing is created or changed in it, and it must exist.
    """

    def __init__(self, path: Path, *, is_read_only: bool = False) -> None:
        self.path: Path = path
        self.is_read_only: bool = is_read_only

    @property
    def name(self) -> str:
        """The path of the directory."""
        return str(self.path)

    async def names(self) -> dict[str, int]:
        """Return the names of its files with their sizes in bytes; hidden files are left out."""
        return await in_thread(self.blocking_names)

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file; None if it does not exist."""
        return await in_thread(lambda: self.blocking_read(name, limit))

    async def read_many(self, names: Iterable[str], limit: int) -> dict[str, Content]:
        """Return at most `limit` bytes of each file, or None, or the error of reading it. Raises nothing."""

        def read_all() -> dict[str, Content]:
            found: dict[str, Content] = {}
            for name in names:
                try:
                    found[name] = self.blocking_read(name, limit)
                except OSError as exc:
                    found[name] = _disk_error(exc)
            return found

        return await in_thread(read_all)

    async def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file: under another name, synced to disk, then renamed."""
        await in_thread(lambda: self.blocking_write(name, content))

    async def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        await in_thread(lambda: self.blocking_delete(name))

    # The following methods block: call them in a thread. They raise `OSError`, and `BackupError` if it is read-only.

    def prepare(self) -> None:
        """Create the directory and, if no other process is writing, delete what killed processes left unfinished."""
        self._require_writable()
        _make_private(self.path)
        with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB) as is_alone:
            for path in self.path.glob(f"{UNFINISHED}*") if is_alone else ():
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Yield a temporary path to write a file to; it is deleted on exit unless `finish` has renamed it."""
        path = self.path / f"{UNFINISHED}{os.getpid()}-{name}"
        with self._locked(fcntl.LOCK_SH):
            path.unlink(missing_ok=True)  # of a killed process of the same number: in a container it is often 1
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)

    def finish(self, path: Path, name: str) -> None:
        """Sync a file to disk and give it its final name, durably."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.rename(self.path / name)
        sync_directory(self.path)

    def blocking_names(self) -> dict[str, int]:
        """Return the names of its files with their sizes in bytes."""
        names: dict[str, int] = {}
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        if entry.is_file() and not entry.name.startswith("."):
                            names[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            if self.is_read_only:
                raise UnknownBackup(f"{self.path} does not exist: expected a directory with backups") from None
        except NotADirectoryError:
            if not self.is_read_only:
                raise
            raise UnknownBackup(f"{self.path}: Not a directory: expected one with backups") from None
        return names

    def blocking_read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file; None if it does not exist."""
        try:
            with (self.path / name).open("rb") as file:
                return file.read(limit)
        except FileNotFoundError:
            return None

    def blocking_write(self, name: str, content: bytes) -> None:
        """Write or replace a small file."""
        self.prepare()
        with self.unfinished(name) as path:
            with os.fdopen(create_private(path), "wb") as file:
                file.write(content)
            self.finish(path, name)

    def blocking_delete(self, name: str) -> None:
        """Delete a file if it exists."""
        self._require_writable()
        (self.path / name).unlink(missing_ok=True)

    def _require_writable(self) -> None:
        if self.is_read_only:
            raise BackupError(f"{self.path} is only read: nothing is written to it or deleted in it")

    @contextlib.contextmanager
    def _locked(self, mode: int) -> Iterator[bool]:
        lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            is_alone = True
            try:
                fcntl.flock(lock, mode)
            except OSError:  # another process writes, or the file system has no locks
                is_alone = False
            yield is_alone
        finally:
            os.close(lock)


def _make_private(directory: Path) -> None:
    """Create a directory and its parents so that only their owner can read them; existing ones are left as they are."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


async def in_thread(work: Callable[[], ResultT]) -> ResultT:
    try:
        return await asyncio.to_thread(work)
    except OSError as exc:
        raise _disk_error(exc) from exc


def _disk_error(exc: OSError) -> BackupError:
    return BackupError(f"{exc.filename or 'the disk'}: {exc.strerror or exc}")

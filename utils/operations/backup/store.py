"""Where backups are kept: a directory, and whatever obstore reaches (S3 and its like, GCS, Azure)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
from collections.abc import Awaitable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr

from utils.exceptions import BackupError
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.pipeline import Passed

ResultT = TypeVar("ResultT")

#: Seconds for one request, and after which it is not tried once more.
REQUEST_SECONDS, RETRY_SECONDS = 120.0, 150.0
#: Seconds for a small object, or for the next piece of a large one: more than obstore takes to give up by itself, as
#: what it is called off from may end the interpreter with a panic when that ends first.
ANSWER_SECONDS = 300.0
#: Seconds for a whole object on its way up.
UPLOAD_SECONDS = 6 * 3_600.0
#: Bytes of a piece, and pieces on their way at once: what an upload takes in memory.
PIECE, AT_ONCE = 8 << 20, 3
#: Of addresses: a login, and a query, which may be a signature.
_SECRET = re.compile(r"(?<=//)[^/@\s]*@|\?[^\s\"]*")
#: Files that are still being written begin so.
UNFINISHED = ".unfinished-"


class Store(Protocol):
    """A flat place for files."""

    @property
    def name(self) -> str:
        """What it is called, for people; nothing secret."""

    async def names(self) -> dict[str, int]:
        """Return what there is, and its size in bytes. Raises `BackupError`, as all of these do."""

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file, at most `limit` bytes of it; None: there is none."""

    async def write(self, name: str, content: bytes) -> None:
        """Put a small file there, whole or not at all, in place of one of that name."""

    async def fetch(self, name: str, to: Path, progress: Progress) -> Passed:
        """Bring a large file, made durable, and return what it was."""

    async def delete(self, name: str) -> None:
        """Take a file away, if it is there."""


class Directory:
    """Backups in a directory of this machine, readable by its owner only."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    @property
    def name(self) -> str:
        """The directory."""
        return str(self.path)

    async def names(self) -> dict[str, int]:
        """Return what there is but for what is unfinished."""
        found: dict[str, int] = await _in_thread(self._names)
        return found

    def _names(self) -> dict[str, int]:
        if not self.path.exists():
            return {}
        with os.scandir(self.path) as found:
            return {entry.name: entry.stat().st_size for entry in found if entry.is_file() and entry.name[0] != "."}

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file; None: there is none."""

        def read() -> bytes | None:
            try:
                with (self.path / name).open("rb") as file:
                    return file.read(limit)
            except FileNotFoundError:
                return None

        content: bytes | None = await _in_thread(read)
        return content

    async def write(self, name: str, content: bytes) -> None:
        """Put a small file there: written beside, forced to the disk, renamed."""

        def write() -> None:
            self.prepare()
            with self.unfinished(name) as path:
                path.write_bytes(content)
                path.chmod(0o600)
                self.finish(path, name)

        await _in_thread(write)

    async def fetch(self, name: str, to: Path, progress: Progress) -> Passed:
        """Not needed: what is here is read where it lies."""
        raise NotImplementedError

    async def delete(self, name: str) -> None:
        """Take a file away."""
        await _in_thread(lambda: (self.path / name).unlink(missing_ok=True))

    # What follows is for a thread.

    def prepare(self) -> None:
        """Make the directory, and take away what those left who were killed, unless somebody is at work just now."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB) as is_alone:
            for path in self.path.glob(f"{UNFINISHED}*") if is_alone else ():
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Lend the path of a file in the making; it is gone afterwards unless `finish` was called."""
        path = self.path / f"{UNFINISHED}{os.getpid()}-{name}"
        with self._locked(fcntl.LOCK_SH):
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[bool]:
        with (self.path / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, how)
            except BlockingIOError:
                yield False
            else:
                yield True

    def finish(self, path: Path, name: str) -> None:
        """Give a file its name, durably."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.rename(self.path / name)
        directory = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class Remote:
    """Backups in a bucket, container or directory that obstore reaches by its address."""

    def __init__(self, url: SecretStr) -> None:
        import obstore.store

        address = url.get_secret_value()
        parts = urlsplit(address)
        self._name = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # neither login nor query
        is_place = bool(parts.netloc) if parts.scheme != "file" else not parts.netloc and parts.path.startswith("/")
        if not parts.scheme or not is_place:
            raise BackupError(
                "BACKUP_URL is no address of a store: expected s3://bucket/path, gs://bucket/path,"
                " az://container/path or file:///path"
            )
        options: Any = {"timeout": f"{REQUEST_SECONDS:g}s", "connect_timeout": "20s"}
        if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
            options["allow_http"] = True
        try:
            if parts.scheme == "file":
                self._store: Any = obstore.store.LocalStore(parts.path, mkdir=True)
            else:
                self._store = obstore.store.from_url(
                    address, client_options=options, retry_config={"retry_timeout": timedelta(seconds=RETRY_SECONDS)}
                )
        except Exception as exc:  # obstore's errors have no root of their own for what it is given
            raise BackupError(f"BACKUP_URL {self._name} cannot be used: {_first_line(exc)}") from None

    @property
    def name(self) -> str:
        """The address without anything secret."""
        return self._name

    async def names(self) -> dict[str, int]:
        """Return what there is."""
        import obstore

        async def collect() -> dict[str, int]:
            found: dict[str, int] = {}
            async for page in obstore.list(self._store):
                found.update({item["path"]: item["size"] for item in page if "/" not in item["path"]})
            return found

        return await self._bounded("list", "backups", collect(), ANSWER_SECONDS)

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file; None: there is none."""
        import obstore

        async def read() -> bytes | None:
            try:
                size = (await obstore.head_async(self._store, name))["size"]
                content = (
                    await obstore.get_range_async(self._store, name, start=0, end=min(size, limit)) if size else b""
                )
            except FileNotFoundError:
                return None
            return bytes(content)

        return await self._bounded("read", name, read(), ANSWER_SECONDS)

    async def write(self, name: str, content: bytes) -> None:
        """Put a small file there: stores show an object whole or not at all."""
        import obstore

        await self._bounded("write", name, obstore.put_async(self._store, name, content), ANSWER_SECONDS)

    async def upload(self, path: Path, name: str) -> None:
        """Put a large file there, in pieces."""
        import obstore

        work = obstore.put_async(self._store, name, path, use_multipart=True, chunk_size=PIECE, max_concurrency=AT_ONCE)
        await self._bounded("write", name, work, UPLOAD_SECONDS)

    async def fetch(self, name: str, to: Path, progress: Progress) -> Passed:
        """Bring a large file, in pieces, and return what it was."""
        return await self._passed(name, to, progress)

    async def checksum(self, name: str, progress: Progress = ignore_progress) -> Passed:
        """Read a large file, keep nothing of it, and return what it was."""
        return await self._passed(name, None, progress)

    async def _passed(self, name: str, to: Path | None, progress: Progress) -> Passed:
        import hashlib

        import obstore

        passed, digest = Passed(), hashlib.sha256()
        try:
            about = await self._bounded("read", name, obstore.head_async(self._store, name), ANSWER_SECONDS)
            size = about["size"]
            file = None if to is None else await _in_thread(lambda: os.fdopen(_new(to), "wb", buffering=0))

            def keep(piece: Any) -> None:
                digest.update(piece)
                if file is not None:
                    file.write(piece)

            try:
                # Piece by piece: the time that one request may take is over before that of a large object is.
                while passed.size < size:
                    end = min(passed.size + PIECE, size)
                    work = obstore.get_range_async(self._store, name, start=passed.size, end=end)
                    piece = await self._bounded("read", name, work, ANSWER_SECONDS)
                    if len(piece) != end - passed.size:
                        raise BackupError(f"{self._name}: {name} changed while it was read: try again")
                    await _in_thread(lambda piece=piece: keep(piece))
                    passed.size = end
                    progress(Step("reading it back" if to is None else "fetching", end, size, "bytes"))
            finally:
                if file is not None:
                    await _in_thread(file.close)
        except FileNotFoundError:
            raise BackupError(f"{self._name}: {name} is not there") from None
        passed.sha256 = digest.hexdigest()
        return passed

    async def delete(self, name: str) -> None:
        """Take an object away."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            await self._bounded("delete", name, obstore.delete_async(self._store, name), ANSWER_SECONDS)

    async def _bounded(self, verb: str, name: str, work: Awaitable[ResultT], seconds: float) -> ResultT:
        try:
            async with asyncio.timeout(seconds):
                return await work
        except FileNotFoundError as exc:
            if verb in ("read", "delete"):
                raise
            raise BackupError(f"{self._name}: could not {verb} {name}: {_first_line(exc)}") from None  # no bucket
        except TimeoutError:
            raise BackupError(f"{self._name}: could not {verb} {name} within {seconds:g} s: try again later") from None
        except Exception as exc:  # obstore raises classes of its own, and Python's
            raise BackupError(f"{self._name}: could not {verb} {name}: {_first_line(exc)}") from None


def _new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _first_line(exc: BaseException) -> str:
    """Return what obstore says, without what addresses may hold: logins, and signatures in queries."""
    line = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return _SECRET.sub("", line)[:300]


async def _in_thread(work: Any) -> Any:
    try:
        return await asyncio.to_thread(work)
    except OSError as exc:
        raise BackupError(f"{exc.filename or 'the disk'}: {exc.strerror or exc}") from exc

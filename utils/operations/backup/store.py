"""Where backup files are stored: a local directory, or a store that obstore supports (S3, GCS, Azure, …)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr

from utils.exceptions import BackupError
from utils.files import create_private, sync_directory
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.pipeline import Digest

ResultT = TypeVar("ResultT")

#: Seconds for one request, and after which obstore no longer retries it.
REQUEST_SECONDS, RETRY_SECONDS = 120.0, 150.0
#: Seconds for a small object, or for one part of a large one. Longer than obstore takes to give up by itself, because
#: cancelling one of its futures while the interpreter shuts down can panic.
OPERATION_SECONDS = 300.0
#: Seconds for the upload of a whole object.
UPLOAD_SECONDS = 6 * 3_600.0
#: Bytes of a part, and parts in flight at once: together, the memory that an upload takes.
PART_BYTES, PARTS_IN_FLIGHT = 8 << 20, 3
#: What may be secret in a URL: a login, and a query, which may be a signature.
_SECRET = re.compile(r"(?<=//)[^/@\s]*@|\?[^\s\"]*")
#: Prefix of files that are still being written.
UNFINISHED = ".unfinished-"


class Directory:
    """A local directory that only its owner can read. The async methods raise `BackupError`."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path

    @property
    def name(self) -> str:
        """The path of the directory."""
        return str(self.path)

    async def names(self) -> dict[str, int]:
        """Return the names of its files with their sizes in bytes; hidden files are left out."""
        return await _in_thread(self._names)

    def _names(self) -> dict[str, int]:
        if not self.path.exists():
            return {}
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file() and entry.name[0] != "."}

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file; None if it does not exist."""

        def read() -> bytes | None:
            try:
                with (self.path / name).open("rb") as file:
                    return file.read(limit)
            except FileNotFoundError:
                return None

        return await _in_thread(read)

    async def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file: under another name, synced to disk, then renamed."""

        def write() -> None:
            self.prepare()
            with self.unfinished(name) as path:
                path.write_bytes(content)
                path.chmod(0o600)
                self.finish(path, name)

        await _in_thread(write)

    async def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        await _in_thread(lambda: (self.path / name).unlink(missing_ok=True))

    # The following methods block: call them in a thread.

    def prepare(self) -> None:
        """Create the directory and, if no other process is writing, delete what killed processes left unfinished."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB) as is_alone:
            for path in self.path.glob(f"{UNFINISHED}*") if is_alone else ():
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def unfinished(self, name: str) -> Iterator[Path]:
        """Yield a temporary path to write a file to; it is deleted on exit unless `finish` has renamed it."""
        path = self.path / f"{UNFINISHED}{os.getpid()}-{name}"
        with self._locked(fcntl.LOCK_SH):
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, mode: int) -> Iterator[bool]:
        with (self.path / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, mode)
            except BlockingIOError:
                yield False
            else:
                yield True

    def finish(self, path: Path, name: str) -> None:
        """Sync a file to disk and give it its final name, durably."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.rename(self.path / name)
        sync_directory(self.path)


class Remote:
    """A bucket, container or directory that obstore reaches by its URL. All methods raise `BackupError`."""

    def __init__(
        self,
        url: SecretStr,
        *,
        request_seconds: float = REQUEST_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        part_bytes: int = PART_BYTES,
    ) -> None:
        import obstore.store

        address = url.get_secret_value()
        parts = urlsplit(address)
        self._name = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # without login and query
        self._part_bytes = part_bytes
        has_place = bool(parts.netloc) if parts.scheme != "file" else not parts.netloc and parts.path.startswith("/")
        if not parts.scheme or not has_place:
            raise BackupError(
                "BACKUP_URL is not the URL of a store: expected s3://bucket/path, gs://bucket/path,"
                " az://container/path or file:///path"
            )
        options: Any = {"timeout": f"{request_seconds:g}s", "connect_timeout": "20s"}
        if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
            options["allow_http"] = True
        try:
            if parts.scheme == "file":
                self._store: Any = obstore.store.LocalStore(parts.path, mkdir=True)
            else:
                self._store = obstore.store.from_url(
                    address, client_options=options, retry_config={"retry_timeout": timedelta(seconds=retry_seconds)}
                )
        except Exception as exc:  # obstore's errors about its arguments have no common base class
            raise BackupError(f"BACKUP_URL {self._name} cannot be used: {_first_line(exc)}") from None

    @property
    def name(self) -> str:
        """The URL without secrets."""
        return self._name

    async def names(self) -> dict[str, int]:
        """Return the names of its files with their sizes in bytes."""
        import obstore

        async def collect() -> dict[str, int]:
            names: dict[str, int] = {}
            async for page in obstore.list(self._store):
                names.update({item["path"]: item["size"] for item in page if "/" not in item["path"]})
            return names

        return await self._bounded("list", "backups", collect(), OPERATION_SECONDS)

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file; None if it does not exist."""
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

        return await self._bounded("read", name, read(), OPERATION_SECONDS)

    async def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file; object stores do so atomically."""
        import obstore

        await self._bounded("write", name, obstore.put_async(self._store, name, content), OPERATION_SECONDS)

    async def upload(self, path: Path, name: str) -> None:
        """Upload a large file, in parts."""
        import obstore

        work = obstore.put_async(
            self._store, name, path, use_multipart=True, chunk_size=self._part_bytes, max_concurrency=PARTS_IN_FLIGHT
        )
        await self._bounded("write", name, work, UPLOAD_SECONDS)

    async def download(self, name: str, to: Path, progress: Progress = ignore_progress) -> Digest:
        """Download a large file to a new path, in parts, and return its digest."""
        return await self._download(name, to, progress)

    async def digest(self, name: str, progress: Progress = ignore_progress) -> Digest:
        """Read a large file without storing it, and return its digest."""
        return await self._download(name, None, progress)

    async def _download(self, name: str, to: Path | None, progress: Progress) -> Digest:
        import obstore

        digest, sha256 = Digest(), hashlib.sha256()
        try:
            head = await self._bounded("read", name, obstore.head_async(self._store, name), OPERATION_SECONDS)
            size = head["size"]
            file = None if to is None else await _in_thread(lambda: os.fdopen(create_private(to), "wb", buffering=0))

            def consume(part: Any) -> None:
                sha256.update(part)
                if file is not None:
                    file.write(part)

            try:
                # In parts, because a request may not take as long as a large object needs.
                while digest.size < size:
                    end = min(digest.size + self._part_bytes, size)
                    work = obstore.get_range_async(self._store, name, start=digest.size, end=end)
                    part = await self._bounded("read", name, work, OPERATION_SECONDS)
                    if len(part) != end - digest.size:
                        raise BackupError(f"{self._name}: {name} changed while it was read: try again")
                    await _in_thread(partial(consume, part))
                    digest.size = end
                    progress(Step("reading it back" if to is None else "downloading", end, size, "bytes"))
            finally:
                if file is not None:
                    await _in_thread(file.close)
        except FileNotFoundError:
            raise BackupError(f"{self._name}: {name} does not exist") from None
        digest.sha256 = sha256.hexdigest()
        return digest

    async def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            await self._bounded("delete", name, obstore.delete_async(self._store, name), OPERATION_SECONDS)

    async def _bounded(self, verb: str, name: str, work: Awaitable[ResultT], seconds: float) -> ResultT:
        """Await an operation of obstore's; `FileNotFoundError` is passed on where the caller expects it."""
        try:
            async with asyncio.timeout(seconds):
                return await work
        except FileNotFoundError as exc:
            if verb in ("read", "delete"):
                raise
            raise BackupError(f"{self._name}: could not {verb} {name}: {_first_line(exc)}") from None  # no bucket
        except TimeoutError:
            raise BackupError(f"{self._name}: could not {verb} {name} within {seconds:g} s: try again later") from None
        except Exception as exc:  # obstore raises its own classes and Python's
            raise BackupError(f"{self._name}: could not {verb} {name}: {_first_line(exc)}") from None


Store: TypeAlias = Directory | Remote


def _first_line(exc: BaseException) -> str:
    """Return the first line of an obstore error, without the secrets that URLs may contain."""
    line = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return _SECRET.sub("", line)[:300]


async def _in_thread(work: Callable[[], ResultT]) -> ResultT:
    try:
        return await asyncio.to_thread(work)
    except OSError as exc:
        raise BackupError(f"{exc.filename or 'the disk'}: {exc.strerror or exc}") from exc

"""Where backup files are stored: a local directory, or a store that obstore supports (S3, GCS, Azure, …)."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from utils.exceptions import BackupError, UnknownBackup
from utils.files import create_private, sync_directory
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import credentials
from utils.operations.backup.pipeline import CHUNK, Digest
from utils.tasks import run_in_daemon_thread

ResultT = TypeVar("ResultT")

#: Seconds for a store's answer about a small object, in all: connecting, and obstore's own retries.
ANSWER_SECONDS = 10.0
#: Seconds without progress after which the transfer of a large object is given up.
STALL_SECONDS = 60.0
#: Seconds for which a store that did not answer is not asked again.
AWAY_SECONDS = 30.0
#: Shares of these for one request, for retries after errors, and for the longest pause before one. They leave a rest,
#: so that obstore gives up by itself.
_REQUEST_SHARE, _RETRY_SHARE, _PAUSE_SHARE = 0.75, 0.15, 0.05
#: Seconds for a cancelled call to end. A thread that returns from obstore to an interpreter which is shutting down
#: aborts the process, so it should return before; one that hangs does not return.
LINGER_SECONDS = 1.0
#: Bytes of a part, and parts in flight at once: together, the memory that an upload takes. All of them must be sent
#: in the time of one request, which limits how slow the connection may be.
PART_BYTES, PARTS_IN_FLIGHT = 5 << 20, 2
#: Small objects that are read at once.
READS_AT_ONCE = 8
#: What may be secret in a URL: a login, and a query, which may be a signature.
_SECRET = re.compile(r"(?<=//)[^/@\s]*@|\?[^\s\"]*")
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
        return await _in_thread(self.blocking_names)

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file; None if it does not exist."""
        return await _in_thread(lambda: self.blocking_read(name, limit))

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

        return await _in_thread(read_all)

    async def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file: under another name, synced to disk, then renamed."""
        await _in_thread(lambda: self.blocking_write(name, content))

    async def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        await _in_thread(lambda: self.blocking_delete(name))

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


class Remote:
    """A bucket, container or directory at a URL. All methods raise `BackupError`, in bounded time.

    If the store does not answer, further calls fail at once for `away_seconds`.

    Parameters
    ----------
    answer_seconds: for an answer about a small object, in all.
    stall_seconds: without progress, until the transfer of a large object is given up.
    away_seconds: for which a store that did not answer is not asked again.
    part_bytes: size of the parts in which a large object is transferred.
    """

    def __init__(
        self,
        url: SecretStr,
        *,
        answer_seconds: float = ANSWER_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        away_seconds: float = AWAY_SECONDS,
        part_bytes: int = PART_BYTES,
    ) -> None:
        address = url.get_secret_value()
        parts = urlsplit(address)
        self._name = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"  # without login and query
        self._answer_seconds = answer_seconds
        self._stall_seconds = stall_seconds
        self._away_seconds = away_seconds
        self._part_bytes = part_bytes
        #: When the store did not answer last, on the monotonic clock; None if it did since.
        self._away_since: float | None = None
        has_place = bool(parts.netloc) if parts.scheme != "file" else not parts.netloc and parts.path.startswith("/")
        if not parts.scheme or not has_place:
            raise BackupError(
                "BACKUP_URL is not the URL of a store: expected s3://bucket/path, gs://bucket/path,"
                " az://container/path or file:///path"
            )
        are_given = credentials.are_given_by_machine(address)
        #: What is not set that the store needs, unless this machine gives it; and whether it cannot do without.
        self._missing = None if are_given else credentials.find_missing(address)
        self._is_useless = self._missing is not None and are_given is False
        try:
            self._store: _Store = (
                _Files(Path(unquote(parts.path)))
                if parts.scheme == "file"
                else _Objects(address, answer_seconds, stall_seconds, part_bytes)
            )
        except Exception as exc:  # obstore's errors about its arguments have no common base class
            reason = self._missing or _first_line(exc)
            raise BackupError(f"BACKUP_URL {self._name} cannot be used: {reason}") from None

    @property
    def name(self) -> str:
        """The URL without secrets."""
        return self._name

    # --- small objects

    async def names(self) -> dict[str, int]:
        """Return the names of its files with their sizes in bytes."""
        return await self._answer("list", "backups", self._store.names)

    async def read(self, name: str, limit: int) -> bytes | None:
        """Return at most `limit` bytes of a file; None if it does not exist."""
        try:
            return await self._answer("read", name, lambda: self._store.read(name, limit))
        except FileNotFoundError:
            return None

    async def read_many(self, names: Iterable[str], limit: int) -> dict[str, Content]:
        """Return at most `limit` bytes of each file, or None, or the error of reading it; several at once."""
        waiting = list(dict.fromkeys(names))
        found: dict[str, Content] = dict.fromkeys(waiting)
        remaining = iter(waiting)

        async def read_next() -> None:
            for name in remaining:
                try:
                    found[name] = await self.read(name, limit)
                except BackupError as exc:
                    found[name] = exc

        async with asyncio.TaskGroup() as group:
            for _ in range(READS_AT_ONCE):
                group.create_task(read_next())
        return found

    async def write(self, name: str, content: bytes) -> None:
        """Write or replace a small file, atomically."""
        await self._answer("write", name, lambda: self._store.write(name, content))

    async def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            await self._answer("delete", name, lambda: self._store.delete(name))

    # --- large objects

    async def upload(self, path: Path, name: str, progress: Progress = ignore_progress) -> None:
        """Upload a large file, in parts."""
        loop, size = asyncio.get_running_loop(), (await _in_thread(path.stat)).st_size

        def greet() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._store.size(name)

        await self._answer("write", name, greet)  # a store that does not answer costs less than the time for a part
        transfer = _Transfer(lambda sent: loop.call_soon_threadsafe(progress, Step("uploading", sent, size, "bytes")))

        async def watch() -> None:
            work = partial(self._store.upload, path, name, transfer)
            await self._run(work, lambda: transfer.moved_at + self._stall_seconds, abandon=transfer.abandon)

        await self._ask("write", name, None, watch)

    async def download(self, name: str, to: Path, progress: Progress = ignore_progress) -> Digest:
        """Download a large file to a new path, in parts, and return its digest."""
        return await self._download(name, to, progress)

    async def digest(self, name: str, progress: Progress = ignore_progress) -> Digest:
        """Read a large file without storing it, and return its digest."""
        return await self._download(name, None, progress)

    async def _download(self, name: str, to: Path | None, progress: Progress) -> Digest:
        digest, sha256 = Digest(), hashlib.sha256()
        try:
            size = await self._answer("read", name, lambda: self._store.size(name))
            file = None if to is None else await _in_thread(lambda: os.fdopen(create_private(to), "wb", buffering=0))

            def consume(part: bytes) -> None:
                sha256.update(part)
                if file is not None:
                    file.write(part)

            try:
                # In parts, because a request may not take as long as a large object needs.
                while digest.size < size:
                    end = min(digest.size + self._part_bytes, size)
                    read = partial(self._store.read_part, name, digest.size, end)
                    part = await self._answer("read", name, read, seconds=self._stall_seconds)
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

    # --- asking the store

    async def _answer(
        self, verb: str, what: str, work: Callable[[], ResultT], *, seconds: float | None = None
    ) -> ResultT:
        """Return the store's answer within `seconds`, by default those of a small object."""
        bound = self._answer_seconds if seconds is None else seconds
        ends_at = time.monotonic() + bound
        return await self._ask(verb, what, bound, lambda: self._run(work, lambda: ends_at))

    async def _run(
        self,
        work: Callable[[], ResultT],
        ends_at: Callable[[], float],
        *,
        abandon: Callable[[], None] = lambda: None,
    ) -> ResultT:
        """Run a call of the store in a thread until a moment that may move. Raises `_NoAnswer` after it.

        `abandon` is called if nobody waits for the call any longer.
        """
        running = asyncio.ensure_future(run_in_daemon_thread(work))
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while not running.done() and (left := ends_at() - time.monotonic()) > 0:
                await asyncio.wait({running}, timeout=left)
        finally:
            if not running.done():
                abandon()
                await asyncio.wait({running}, timeout=LINGER_SECONDS)
        if not running.done():
            raise _NoAnswer
        return running.result()

    async def _ask(
        self, verb: str, what: str, seconds: float | None, work: Callable[[], Awaitable[ResultT]]
    ) -> ResultT:
        """Await a call of the store that may take `seconds`; None: it consists of several requests.

        `FileNotFoundError` is passed on where it is expected.
        """
        cannot = f"{self._name}: could not {verb} {what}"
        if self._is_useless:
            raise BackupError(f"{cannot}: {self._missing}")
        started = time.monotonic()
        if self._away_since is not None and started < self._away_since + self._away_seconds:
            ago = started - self._away_since
            again = self._away_seconds - ago
            raise BackupError(f"{cannot}: it did not answer {ago:.0f} s ago: try again in {again:.0f} s")
        try:
            result = await work()
        except FileNotFoundError as exc:
            self._away_since = None
            if verb in ("read", "delete"):
                raise
            raise BackupError(f"{cannot}: {_first_line(exc)}") from None  # no bucket
        except BackupError:
            raise
        except Exception as exc:  # obstore raises its own classes and Python's
            taken, reason = time.monotonic() - started, _first_line(exc)
            # A refusal comes at once. What was retried, or not answered, is not worth asking again.
            is_silent = isinstance(exc, _NoAnswer) or (seconds is not None and taken >= seconds * _REQUEST_SHARE)
            is_retried = seconds is not None and taken >= seconds * _RETRY_SHARE and not isinstance(exc, OSError)
            if is_silent or is_retried:
                self._away_since = time.monotonic()
            if is_silent:
                what = (
                    f"answer within {taken:.0f}" if seconds is not None else f"progress within {self._stall_seconds:g}"
                )
                reason = f"no {what} s"
            reason = self._missing or reason
            raise BackupError(f"{cannot}: {reason}") from None
        self._away_since = None
        return result


Store: TypeAlias = Directory | Remote


class _NoAnswer(Exception):
    """A store did not answer in time."""


@dataclass(slots=True)
class _Transfer:
    """The state of an upload."""

    #: Called, in any thread, with the number of bytes that the store has taken.
    report: Callable[[int], object]
    #: When the store last took a part, on the monotonic clock.
    moved_at: float = field(default_factory=time.monotonic)
    #: Whether it shall end at the next part.
    is_abandoned: bool = False

    def abandon(self) -> None:
        """Let it end at the next part."""
        self.is_abandoned = True

    def parts(self, path: Path, size: int) -> Iterator[bytes]:
        """Yield a file's content in parts; the next one is asked for when the store has taken one."""
        sent = 0
        with path.open("rb") as file:
            while part := file.read(size):
                yield part
                if self.is_abandoned:
                    raise _NoAnswer("the transfer was abandoned")
                self.moved_at = time.monotonic()
                sent += len(part)
                self.report(sent)


class _Store(Protocol):
    """What `Remote` needs of a store. The methods block, and raise what obstore or the disk raises."""

    def names(self) -> dict[str, int]: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str, limit: int) -> bytes | None: ...
    def read_part(self, name: str, start: int, end: int) -> bytes: ...
    def write(self, name: str, content: bytes) -> None: ...
    def upload(self, path: Path, name: str, transfer: _Transfer) -> None: ...
    def delete(self, name: str) -> None: ...


class _Objects:
    """A store of objects behind a network, through obstore's blocking functions.

    Its futures are not used: they are completed by threads that need the interpreter once more afterwards, and abort
    the process if it is shutting down by then.
    """

    def __init__(self, url: str, answer_seconds: float, stall_seconds: float, part_bytes: int) -> None:
        import obstore

        self._obstore = obstore
        self._part_bytes = part_bytes
        self._small = _connect(url, answer_seconds)
        #: For parts of large objects, which may take longer.
        self._large = _connect(url, stall_seconds)

    def names(self) -> dict[str, int]:
        listed = self._obstore.list_with_delimiter(self._small)
        return {item["path"]: item["size"] for item in listed["objects"]}

    def size(self, name: str) -> int:
        return self._obstore.head(self._small, name)["size"]

    def read(self, name: str, limit: int) -> bytes | None:
        content = bytearray()
        for chunk in self._obstore.get(self._small, name).stream():
            content += chunk
            if len(content) >= limit:
                break
        return bytes(content[:limit])

    def read_part(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._obstore.get_range(self._large, name, start=start, end=end))

    def write(self, name: str, content: bytes) -> None:
        self._obstore.put(self._small, name, content, use_multipart=False)

    def upload(self, path: Path, name: str, transfer: _Transfer) -> None:
        self._obstore.put(
            self._large,
            name,
            transfer.parts(path, self._part_bytes),
            use_multipart=True,
            chunk_size=self._part_bytes,
            max_concurrency=PARTS_IN_FLIGHT,
        )

    def delete(self, name: str) -> None:
        self._obstore.delete(self._small, name)


def _connect(url: str, seconds: float) -> Any:
    """Return obstore's store at a URL, which answers or fails within `seconds`."""
    import obstore.store

    request = timedelta(seconds=seconds * _REQUEST_SHARE)
    options: Any = {"timeout": request, "connect_timeout": request}
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
        options["allow_http"] = True
    pause = seconds * _PAUSE_SHARE
    retries: Any = {
        "retry_timeout": timedelta(seconds=seconds * _RETRY_SHARE),
        "backoff": {"init_backoff": timedelta(seconds=pause / 10), "max_backoff": timedelta(seconds=pause)},
    }
    return obstore.store.from_url(url, client_options=options, retry_config=retries)


class _Files:
    """A directory, perhaps of a network's file system."""

    def __init__(self, path: Path) -> None:
        self._directory = Directory(path)
        self.names = self._directory.blocking_names
        self.read = self._directory.blocking_read
        self.write = self._directory.blocking_write
        self.delete = self._directory.blocking_delete

    def size(self, name: str) -> int:
        return (self._directory.path / name).stat().st_size

    def read_part(self, name: str, start: int, end: int) -> bytes:
        with (self._directory.path / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def upload(self, path: Path, name: str, transfer: _Transfer) -> None:
        self._directory.prepare()
        with self._directory.unfinished(name) as unfinished:
            with os.fdopen(create_private(unfinished), "wb", buffering=0) as file:
                for part in transfer.parts(path, CHUNK):
                    file.write(part)
            self._directory.finish(unfinished, name)


def _first_line(exc: BaseException) -> str:
    """Return the first line of an error of a store's, without the secrets that URLs may contain."""
    if isinstance(exc, OSError) and exc.strerror:
        return f"{exc.filename}: {exc.strerror}" if exc.filename else exc.strerror
    line = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
    return _SECRET.sub("", line)[:300]


def _make_private(directory: Path) -> None:
    """Create a directory and its parents so that only their owner can read them; existing ones are left as they are."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


async def _in_thread(work: Callable[[], ResultT]) -> ResultT:
    try:
        return await asyncio.to_thread(work)
    except OSError as exc:
        raise _disk_error(exc) from exc


def _disk_error(exc: OSError) -> BackupError:
    return BackupError(f"{exc.filename or 'the disk'}: {exc.strerror or exc}")

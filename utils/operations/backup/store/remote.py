"""A remote store of backup files at a URL, asked in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from utils.exceptions import BackupError, WrongStore
from utils.files import create_private
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive.pipeline import Digest
from utils.operations.backup.store import credentials
from utils.operations.backup.store.backends import (
    PART_BYTES,
    REQUEST_SHARE,
    RETRY_SHARE,
    Backend,
    Files,
    NoAnswer,
    Objects,
    Transfer,
    first_line,
)
from utils.operations.backup.store.directory import Content, in_thread
from utils.tasks import run_in_daemon_thread

ResultT = TypeVar("ResultT")

#: Seconds for a store's answer about a small object, in all: connecting, and obstore's own retries.
ANSWER_SECONDS = 10.0
#: Seconds without progress after which the transfer of a large object is given up.
STALL_SECONDS = 60.0
#: Seconds for which a store that did not answer is not asked again.
AWAY_SECONDS = 30.0
#: Seconds for a cancelled call to end. A thread that returns from obstore to an interpreter which is shutting down
#: aborts the process, so it should return before; one that hangs does not return.
LINGER_SECONDS = 1.0
#: Small objects that are read at once.
READS_AT_ONCE = 8


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
            raise WrongStore(
                "BACKUP_URL is not the URL of a store: expected s3://bucket/path, gs://bucket/path,"
                " az://container/path or file:///path"
            )
        are_given = credentials.are_given_by_machine(address)
        #: What is not set that the store needs, unless this machine gives it; and whether it cannot do without.
        self._missing = None if are_given else credentials.find_missing(address)
        self._is_useless = self._missing is not None and are_given is False
        #: The directory of a `file:///` address; None for other stores.
        self.path: Path | None = Path(unquote(parts.path)) if parts.scheme == "file" else None
        try:
            self._store: Backend = (
                Files(self.path)
                if self.path is not None
                else Objects(address, answer_seconds, stall_seconds, part_bytes)
            )
        except Exception as exc:  # obstore's errors about its arguments have no common base class
            reason = self._missing or first_line(exc)
            raise WrongStore(f"BACKUP_URL {self._name} cannot be used: {reason}", variables=["BACKUP_URL"]) from None

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
        loop, size = asyncio.get_running_loop(), (await in_thread(path.stat)).st_size

        def greet() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._store.size(name)

        await self._answer("write", name, greet)  # a store that does not answer costs less than the time for a part
        transfer = Transfer(lambda sent: loop.call_soon_threadsafe(progress, Step("uploading", sent, size, "bytes")))

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
            file = None if to is None else await in_thread(lambda: os.fdopen(create_private(to), "wb", buffering=0))

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
                    await in_thread(partial(consume, part))
                    digest.size = end
                    progress(Step("reading it back" if to is None else "downloading", end, size, "bytes"))
            finally:
                if file is not None:
                    await in_thread(file.close)
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
        """Run a call of the store in a thread until a moment that may move. Raises `NoAnswer` after it.

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
            raise NoAnswer
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
            raise BackupError(f"{cannot}: {first_line(exc)}") from None  # no bucket
        except BackupError:
            raise
        except Exception as exc:  # obstore raises its own classes and Python's
            taken, reason = time.monotonic() - started, first_line(exc)
            # A refusal comes at once. What was retried, or not answered, is not worth asking again.
            is_silent = isinstance(exc, NoAnswer) or (seconds is not None and taken >= seconds * REQUEST_SHARE)
            is_retried = seconds is not None and taken >= seconds * RETRY_SHARE and not isinstance(exc, OSError)
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

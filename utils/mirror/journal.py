"""The journal: an append-only queue of events on disk, one directory a process, which a crash does not take along."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import SpoolError
from utils.mirror.segments import Damage, Record, Segments

_log = logging.getLogger(__name__)

#: Held by the process whose journal it is; the kernel lets go of it when a process ends, however that happens.
LOCK = "lock"
#: Seconds before a disk that refused is tried again, doubled each time up to the second figure.
RETRY_SECONDS, RETRY_SECONDS_MAX = 0.1, 5.0
#: Records written and forced to disk at once.
BATCH = 10_000

Result = TypeVar("Result")


class Journal:
    """Records with growing stamps: appended at the end, read in order, forgotten from the front.

    Whatever touches a file happens in a thread of its own; appending never waits. What the disk does not take stays in
    memory, and is tried again.
    """

    def __init__(self, path: Path, lock: int, segments: Segments, *, max_bytes: int, is_ours: bool) -> None:
        """Use `open` or `adopt`."""
        self.id: str = path.name
        self.path: Path = path
        self.max_bytes: int = max_bytes
        #: Stamp of the newest record appended; 0: none was.
        self.last: int = 0
        #: Why the disk takes nothing just now; None when it does.
        self.trouble: str | None = None
        self._lock: int | None = lock
        self._segments = segments
        self._is_ours = is_ours
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: list[Record] = []
        #: Stamps of the records that are not forgotten, from `_first` on.
        self._stamps: array[int] = array("q")
        self._first = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._writing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Journal {self.id} records={self.records} unwritten={self.unwritten} bytes={self.size}>"

    @classmethod
    async def open(cls, directory: Path, id: str, *, max_bytes: int, segment_bytes: int = 8 * 2**20) -> Journal:
        """Make this process's journal, and hold its lock. Raises `SpoolError` when the disk refuses that."""
        path = directory / id

        def make() -> int:
            path.mkdir(parents=True, exist_ok=True)
            return _locked(path, create=True)

        try:
            lock = await asyncio.to_thread(make)
        except BlockingIOError:
            raise SpoolError(f"the journal {path} belongs to another process that runs") from None
        except OSError as error:
            raise SpoolError(
                f"no journal can be written under {directory}: {error.strerror}; expected a directory on a disk with"
                " room that this user may write to (DATA_DIR), or SPOOL=off"
            ) from error
        journal = cls(path, lock, Segments(path, segment_bytes), max_bytes=max_bytes, is_ours=True)
        journal._writing = asyncio.create_task(journal._keep_writing(), name="journal")
        return journal

    @classmethod
    async def adopt(cls, path: Path) -> Journal | None:
        """Take over a journal whose process has ended, to read and remove it; None when that process runs."""
        try:
            lock = await asyncio.to_thread(_locked, path, create=False)
        except OSError:
            return None
        return cls(path, lock, await asyncio.to_thread(Segments.found, path), max_bytes=0, is_ours=False)

    # --- figures

    @property
    def records(self) -> int:
        """Records that are not forgotten, on disk or not; of an adopted journal always 0."""
        return len(self._stamps) - self._first

    @property
    def unwritten(self) -> int:
        """Records that are in memory alone."""
        return len(self._pending)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._segments.size

    @property
    def is_full(self) -> bool:
        """Whether the disk has as many bytes of it as it may; what is appended stays in memory."""
        return self.size >= self.max_bytes

    @property
    def damage(self) -> list[Damage]:
        """What reading found broken."""
        return self._segments.damage

    # --- the queue

    def append(self, stamp: int, payload: bytes) -> None:
        """Add a record; it is written as soon as the disk takes it. Stamps only grow."""
        self._pending.append((stamp, payload))
        self._stamps.append(stamp)
        self.last = stamp
        if self._settled.is_set():
            self._settled.clear()
            self._wake.set()

    async def settled(self, timeout: float) -> bool:
        """Wait until all that was appended is safe on disk; False when `timeout` seconds were not enough."""
        try:
            async with asyncio.timeout(timeout):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    async def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with stamps above `after`, oldest first; what is damaged is left out."""
        found = await self._in_thread(self._segments.read, after, limit)
        if len(found) < limit:
            newest = max(after, found[-1][0] if found else 0)
            found += [record for record in self._pending if record[0] > newest][: limit - len(found)]
        return found

    async def trim(self, upto: int) -> None:
        """Forget the records up to this stamp; files that hold nothing newer are deleted."""
        self._first = bisect_right(self._stamps, upto, self._first)
        if self._first > 10_000 and self._first * 2 > len(self._stamps):
            del self._stamps[: self._first]
            self._first = 0
        if self._segments.can_trim(upto):
            await self._in_thread(self._segments.trim, upto)
            self._wake.set()  # there may be room again

    async def close(self, timeout: float) -> None:
        """Write what is in memory within `timeout` seconds and let go of it; an empty journal is deleted."""
        if self._lock is None:
            return
        if self._writing is not None:
            await self.settled(timeout)
            self._writing.cancel()
            await asyncio.wait({self._writing}, timeout=timeout)
        if self._is_ours and not self.records:
            await self.remove()
            return
        await self._in_thread(self._segments.close)
        self._let_go()

    async def remove(self) -> None:
        """Delete it all, the lock last: as long as a file is there, the lock says whose it is."""

        def remove() -> None:
            self._segments.remove()
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
                self.path.rmdir()

        if self._lock is not None:
            await self._in_thread(remove)
            self._let_go()

    # --- writing

    async def _keep_writing(self) -> None:
        pause = RETRY_SECONDS
        while True:
            if not self._pending:
                self._settled.set()
                self._wake.clear()
                await self._wake.wait()
                continue
            if self.is_full:
                self._begin_trouble("it has as many bytes as it may (SPOOL_MAX_MB)")
                self._wake.clear()
                await self._wake.wait()  # until something is forgotten
                continue
            batch = self._pending[:BATCH]
            try:
                await self._in_thread(self._segments.write, batch)
            except OSError as error:
                self._begin_trouble(error.strerror or str(error))
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)
                continue
            del self._pending[: len(batch)]
            pause = RETRY_SECONDS
            if self.trouble is not None:
                _log.info("the spool takes events again")
                self.trouble = None

    def _begin_trouble(self, why: str) -> None:
        if self.trouble is None:
            _log.error("the spool takes nothing, events stay in memory: %s", why, extra={"path": str(self.path)})
        self.trouble = why

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._thread.shutdown(wait=False)


def found(directory: Path, *, except_id: str | None = None) -> list[Path]:
    """Return the journals in a directory, those made first first; none where there is no such directory."""
    with contextlib.suppress(OSError):
        journals = [path for path in directory.iterdir() if path.name != except_id and (path / LOCK).exists()]
        return sorted(journals, key=lambda path: ((path / LOCK).stat().st_mtime_ns, path.name))
    return []


def is_dead(directory: Path, id: str) -> bool:
    """Return whether the process of a journal has provably ended, on this machine: nobody holds its lock."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", id):
        return False
    try:
        os.close(_locked(directory / id, create=False))
    except OSError:  # somebody holds it, or it is not here
        return False
    return True


def _locked(path: Path, *, create: bool) -> int:
    """Return the descriptor of a journal's lock, held. Raises `BlockingIOError` when a process has it."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

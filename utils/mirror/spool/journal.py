"""The journal: an append-only queue of events on disk, one directory a process, which a crash does not take along."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from utils.exceptions import SpoolError
from utils.mirror.spool.segments import LONGEST, Damage, Record, Segments, sync

_log = logging.getLogger(__name__)

#: Held by the process whose journal it is; the kernel lets go of it when a process ends, however that happens.
LOCK = "lock"
#: Seconds before a disk that refused is tried again, doubled each time up to the second figure.
RETRY_SECONDS, RETRY_SECONDS_MAX = 0.1, 5.0
#: Records written and forced to disk at once.
BATCH = 10_000
#: Seconds that closing takes at most beyond its timeout, when the disk does not answer.
CLOSE_SECONDS = 1.0

_FULL = "it has as many bytes as it may (SPOOL_MAX_MB)"
_stamp_of = itemgetter(0)
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
        #: Payload bytes of the records that are in memory alone.
        self.unwritten_bytes: int = 0
        #: Why the disk refused what it was given last; None when it did not.
        self.failure: str | None = None
        self._extra = {"path": str(path)}
        self._lock: int | None = lock
        self._segments = segments
        self._is_ours = is_ours
        self._takes = is_ours
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: list[Record] = []
        #: Records at the front of `_pending` that are being written.
        self._in_flight = 0
        #: Stamps of the records that are not forgotten, from `_first` on: eight bytes a record.
        self._stamps: array[int] = array("q")
        self._first = 0
        self._trimmed = 0
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._writing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Journal {self.id} records={self.records} unwritten={self.unwritten} bytes={self.size}>"

    @classmethod
    async def open(cls, directory: Path, id: str, *, max_bytes: int, segment_bytes: int = 8 * 2**20) -> Journal:
        """Make this process's journal, and hold its lock.

        Raises `SpoolError` when the disk refuses that, or when there is a journal of this id.
        """
        path = directory / id
        try:
            lock = await asyncio.to_thread(_made, directory, id)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise SpoolError(
                    f"the journal {path} belongs to another process, or is left to be replayed: use another id"
                ) from error
            raise SpoolError(
                f"no journal can be written under {directory}: {error.strerror}; expected a directory on a disk with"
                " room that this user may write to (DATA_DIR), or SPOOL=off"
            ) from error
        journal = cls(path, lock, Segments(path, segment_bytes, max_bytes=max_bytes), max_bytes=max_bytes, is_ours=True)
        journal._writing = asyncio.create_task(journal._keep_writing(), name="journal")
        return journal

    @classmethod
    async def adopt(cls, path: Path) -> Journal | None:
        """Take over a journal whose process has ended, to read, trim and remove it.

        None when that process runs, when it is no journal any more, or, with a line in the log, when the system refuses
        to read it just now.
        """

        def take() -> tuple[int, Segments, array[int]]:
            lock = _locked(path)
            try:
                segments = Segments.scan(path)
                return lock, segments, segments.stamps()
            except BaseException:
                os.close(lock)
                raise

        try:
            lock, segments, stamps = await asyncio.to_thread(take)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _log.warning("a journal that was left behind cannot be read now, it stays: %s", error.strerror,
                         extra={"path": str(path)})  # fmt: skip
            return None
        journal = cls(path, lock, segments, max_bytes=0, is_ours=False)
        journal._stamps = stamps
        journal.last = stamps[-1] if stamps else 0
        return journal

    # --- figures

    @property
    def records(self) -> int:
        """Records that are not forgotten, on disk or not."""
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
        """Add a record; it is written as soon as the disk takes it.

        Raises `ValueError` for a stamp that is not above `last` or a payload that is longer than any event is, and
        `SpoolError` for a journal that is closed, or another process's.
        """
        size = len(payload)
        if stamp <= self.last or size > LONGEST or not self._takes:
            raise self._refusal(stamp, size)
        self._stamps.append(stamp)
        self._pending.append((stamp, payload))
        self.last = stamp
        self.unwritten_bytes += size
        if self._settled.is_set():
            self._settled.clear()
            self._wake.set()

    def _refusal(self, stamp: int, size: int) -> Exception:
        if not self._takes:
            return SpoolError(f"the journal {self.path} is closed, or another process's: nothing is added to it")
        if size > LONGEST:
            return ValueError(f"the record {stamp} has {size} bytes, expected at most {LONGEST}")
        return ValueError(f"the stamp {stamp} is not above that of the record before, {self.last}")

    async def wait_written(self, timeout: float) -> bool:
        """Wait until all that was appended is safe on disk; False when `timeout` seconds were not enough.

        A disk that refuses is tried at once, and again until then.
        """
        self._wake.set()
        try:
            async with asyncio.timeout(timeout):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    async def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with stamps above `after`, oldest first; what is damaged is left out.

        Raises `SpoolError` when the system is in the way (too many open files, no right to read).
        """
        after = max(after, self._trimmed)
        # Before the files are read: what is written meanwhile is among the files' records then.
        start = bisect_right(self._pending, after, key=_stamp_of)
        waiting = self._pending[start : start + limit]
        try:
            found = await self._in_thread(self._segments.read, after, limit)
        except OSError as error:
            raise SpoolError(f"the journal {self.path} cannot be read now: {error.strerror}") from error
        newest = found[-1][0] if found else after
        found += [record for record in waiting if record[0] > newest][: limit - len(found)]
        return found

    async def trim(self, upto: int) -> None:
        """Forget the records up to this stamp; files that hold nothing newer are deleted."""
        self._trimmed = max(self._trimmed, min(upto, self.last))
        self._first = bisect_right(self._stamps, upto, self._first)
        if self._first > 10_000 and self._first * 2 > len(self._stamps):
            del self._stamps[: self._first]
            self._first = 0
        if self._pending and not self._in_flight:
            self._drop(bisect_right(self._pending, upto, key=_stamp_of))
            if not self._pending:
                self._wake.set()  # all that is left to write is nothing
        if self._segments.can_trim(upto):
            await self._in_thread(self._segments.trim, upto)
            self._wake.set()  # there may be room again

    async def close(self, timeout: float) -> None:
        """Write what is in memory within `timeout` seconds and let go of it; an empty journal is deleted.

        Never raises; what could not be written is logged.
        """
        if self._lock is None:
            return
        self._takes = False
        if self._writing is not None:
            await self.wait_written(timeout)
        await self._stop_writing()
        if self._pending:
            _log.error("%s events were not written to the spool: %s", len(self._pending),
                       self.failure or "the disk is slow", extra=self._extra)  # fmt: skip
        try:
            async with asyncio.timeout(timeout + CLOSE_SECONDS):
                # One that another process left, and that is damaged, is for whoever adopted it to remove.
                if not self.records and (self._is_ours or not self.damage):
                    await self.remove()
                else:
                    await self._in_thread(self._segments.close)
        except SpoolError as error:
            _log.warning("%s", error)
        except TimeoutError:
            # Its thread is in the middle of a write: the lock is kept, as long as this process lives.
            _log.error("the spool's disk does not answer", extra=self._extra)
            self._lock = None
        self._let_go()

    async def remove(self) -> None:
        """Delete it all and let go of it. Raises `SpoolError` where the disk refuses: it is still held then."""
        if self._lock is None:
            return
        self._takes = False
        await self._stop_writing()
        try:
            await self._in_thread(self._segments.remove, LOCK)
        except OSError as error:
            raise SpoolError(f"the journal {self.path} cannot be deleted: {error.strerror}") from error
        self._stamps, self._first = array("q"), 0
        self._drop(len(self._pending))
        self._let_go()

    # --- writing

    async def _keep_writing(self) -> None:
        pause = RETRY_SECONDS
        while True:
            self._drop(bisect_right(self._pending, self._trimmed, key=_stamp_of))
            if self.failure == _FULL and not self.is_full:
                self._end_trouble()
            if not self._pending:
                self._settled.set()
                await self._woken(None)
            elif self.is_full:
                self._begin_trouble(_FULL)
                await self._woken(None)  # until something is forgotten
            elif await self._write():
                pause = RETRY_SECONDS
                self._end_trouble()
            else:
                await self._woken(pause)
                pause = min(2 * pause, RETRY_SECONDS_MAX)

    async def _write(self) -> bool:
        """Write what has waited longest; False when the disk refuses it."""
        batch = self._pending[:BATCH]
        self._in_flight = len(batch)
        try:
            written = await self._in_thread(self._segments.write, batch)
        except Exception as error:  # whatever it was, the records are here, and the next try may succeed
            known = isinstance(error, OSError) and error.strerror
            self._begin_trouble(known or repr(error), None if known else error)
            return False
        finally:
            self._in_flight = 0
        self._drop(written)
        return True

    def _drop(self, count: int) -> None:
        """Take records off the front of what is in memory."""
        if count:
            self.unwritten_bytes -= sum(len(payload) for _, payload in self._pending[:count])
            del self._pending[:count]

    async def _woken(self, timeout: float | None) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wake.wait()

    def _begin_trouble(self, why: str, unknown: Exception | None = None) -> None:
        if self.failure is None:
            _log.error("the spool takes nothing, events stay in memory: %s", why, extra=self._extra, exc_info=unknown)
        self.failure = why

    def _end_trouble(self) -> None:
        if self.failure is not None:
            _log.info("the spool takes events again", extra=self._extra)
            self.failure = None

    async def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait({self._writing}, timeout=CLOSE_SECONDS)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._thread.shutdown(wait=False)


def list_journals(directory: Path, *, except_id: str | None = None) -> list[Path]:
    """Return the journals in a directory, those made first first; none where there is no such directory."""
    made: list[tuple[int, str, Path]] = []
    for lock in directory.glob(f"[!.]*/{LOCK}"):
        with contextlib.suppress(FileNotFoundError):  # removed just now
            made.append((lock.stat().st_mtime_ns, lock.parent.name, lock.parent))
    return [path for _, name, path in sorted(made) if name != except_id]


def is_dead(directory: Path, id: str) -> bool:
    """Return whether the process of a journal has provably ended, on this machine: nobody holds its lock."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", id):
        return False
    try:
        os.close(_locked(directory / id))
    except OSError:  # somebody holds it, or it is not here
        return False
    return True


def _made(directory: Path, id: str) -> int:
    """Make a journal's directory and return the descriptor of its lock, held. Raises `OSError`."""
    # It takes its name with the lock already held: at no moment does it look like one whose process has ended.
    draft = directory / f".{id}"
    draft.mkdir(parents=True, exist_ok=True)
    lock = None
    try:
        (draft / LOCK).touch(mode=0o600)
        lock = _locked(draft)
        draft.rename(directory / id)
        sync(directory)
    except BaseException:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return lock


def _locked(path: Path) -> int:
    """Return the descriptor of a journal's lock, held.

    Raises `BlockingIOError` when a process has it, `FileNotFoundError` when there is none or it was deleted meanwhile.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(path / LOCK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

"""The journal: an append-only queue of events on disk, one directory per process, that survives a crash."""

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
from typing import Any, NamedTuple, TypeVar

from utils.exceptions import SpoolError
from utils.files import sync_directory
from utils.mirror.spool.segments import MAX_RECORD_BYTES, READ_BYTES, TAIL_BYTES, Damage, Record, Segments, Tail
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: Lock file, held by the process that owns the journal; the kernel releases it however the process ends.
LOCK = "lock"
#: Records written and flushed to disk at once.
BATCH_RECORDS = 10_000

_FULL = "it has reached its size limit (SPOOL_MAX_MB)"
_stamp_of = itemgetter(0)
Result = TypeVar("Result")


class DiskPolicy(NamedTuple):
    """How to access the disk; times are seconds."""

    #: Pause after a failed write, doubled after each further one.
    retry_seconds: float = 0.1
    retry_max_seconds: float = 5.0
    #: How much longer than its timeout closing may take if the disk does not respond.
    close_seconds: float = 1.0
    #: Bytes read from a segment at once.
    read_bytes: int = READ_BYTES


_DEFAULT_POLICY = DiskPolicy()


class Journal:
    """Records with increasing stamps: appended at the end, read in order, trimmed at the front.

    All file access happens in a thread of its own, and appending never waits. Records that the disk refuses stay in
    memory and are written again later.
    """

    def __init__(
        self,
        path: Path,
        lock: int,
        segments: Segments,
        *,
        max_bytes: int,
        is_ours: bool,
        policy: DiskPolicy,
        tail: Tail | None = None,
    ) -> None:
        """Use `open` or `adopt` instead."""
        self.id: str = path.name
        self.path: Path = path
        self.max_bytes: int = max_bytes
        #: Stamp of the newest record appended; 0 if there was none.
        self.last: int = 0
        #: Payload bytes of the records that are in memory only.
        self.unwritten_bytes: int = 0
        #: Why the last write failed; None if it succeeded.
        self.failure: str | None = None
        self._extra = {"path": str(path)}
        self._lock: int | None = lock
        self._segments = segments
        self._tail = tail
        self._policy = policy
        self._is_ours = is_ours
        self._is_open = is_ours
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: list[Record] = []
        #: Number of records at the front of `_pending` that are being written.
        self._in_flight = 0
        #: Stamps of the records; those before index `_first` are trimmed. Eight bytes per record.
        self._stamps: array[int] = array("q")
        self._first = 0
        self._trimmed = 0
        self._wake = asyncio.Event()
        self._all_written = asyncio.Event()
        self._all_written.set()
        self._writing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Journal {self.id} records={self.records} unwritten={self.unwritten} bytes={self.size}>"

    @classmethod
    async def open(
        cls,
        directory: Path,
        id: str,
        *,
        max_bytes: int,
        segment_bytes: int = 8 * 2**20,
        has_tail: bool = False,
        tail_bytes: int = TAIL_BYTES,
        policy: DiskPolicy = _DEFAULT_POLICY,
    ) -> Journal:
        """Create this process's journal and lock it.

        `has_tail`: a record survives a kill -9 from the moment that `append` returns, see `Tail`; `tail_bytes`
        bounds the size of its files. Raises `SpoolError` if the disk refuses, or if a journal with this id exists.
        """
        path = directory / id
        try:
            lock = await asyncio.to_thread(_create, directory, id)
            tail = Tail(path, tail_bytes) if has_tail else None
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise SpoolError(
                    f"the journal {path} belongs to another process or waits to be replayed: use another id"
                ) from error
            raise SpoolError(
                f"cannot create a journal under {directory}: {error.strerror}; point DATA_DIR to a writable directory"
                " on a disk with free space, or set SPOOL=off"
            ) from error
        segments = Segments(path, segment_bytes, max_bytes=max_bytes)
        journal = cls(path, lock, segments, max_bytes=max_bytes, is_ours=True, policy=policy, tail=tail)
        journal._writing = asyncio.create_task(journal._keep_writing(), name="journal")
        return journal

    @classmethod
    async def adopt(cls, path: Path, *, policy: DiskPolicy = _DEFAULT_POLICY) -> Journal | None:
        """Take over a journal whose process has ended, to read, trim and remove it.

        Returns None if that process still runs, if the journal was removed, or (logged) if it cannot be read now.
        """

        def take() -> tuple[int, Segments, array[int], list[Record]]:
            lock = _acquire_lock(path)
            try:
                segments = Segments.scan(path, read_bytes=policy.read_bytes)
                stamps = segments.stamps()
                return lock, segments, stamps, Tail.read(path, stamps[-1] if stamps else 0)
            except BaseException:
                os.close(lock)
                raise

        try:
            lock, segments, stamps, tail = await asyncio.to_thread(take)
        except (BlockingIOError, FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            _log.warning("cannot read an abandoned journal now, leaving it: %s", error.strerror,
                         extra={"path": str(path)})  # fmt: skip
            return None
        journal = cls(path, lock, segments, max_bytes=0, is_ours=False, policy=policy)
        stamps.extend(stamp for stamp, _ in tail)
        journal._stamps = stamps
        journal._pending = tail
        journal.unwritten_bytes = sum(len(payload) for _, payload in tail)
        journal.last = stamps[-1] if stamps else 0
        return journal

    # --- figures

    @property
    def records(self) -> int:
        """Records that are not trimmed, on disk or in memory."""
        return len(self._stamps) - self._first

    @property
    def unwritten(self) -> int:
        """Records that are in memory only."""
        return len(self._pending)

    @property
    def volatile(self) -> int:
        """Records that a restart would not find: in memory only, and not in a tail either."""
        return 0 if self._tail is not None else self.unwritten

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self._segments.size

    @property
    def is_full(self) -> bool:
        """Whether the journal has reached `max_bytes`; new records then stay in memory."""
        return self.size >= self.max_bytes

    @property
    def damage(self) -> list[Damage]:
        """The damage found while reading."""
        return self._segments.damage

    # --- the queue

    def append(self, stamp: int, payload: bytes) -> None:
        """Add a record, to be written as soon as the disk accepts it.

        Raises `ValueError` if the stamp is not greater than `last` or the payload exceeds `MAX_RECORD_BYTES`, and
        `SpoolError` if the journal is closed or adopted, or if it has a tail and the disk refuses the record.
        """
        size = len(payload)
        if stamp <= self.last or size > MAX_RECORD_BYTES or not self._is_open:
            raise self._refusal(stamp, size)
        if self._tail is not None:
            try:
                self._tail.append(stamp, payload)
            except OSError as error:
                raise SpoolError(f"cannot write to the journal {self.path}: {error.strerror}") from error
        self._stamps.append(stamp)
        self._pending.append((stamp, payload))
        self.last = stamp
        self.unwritten_bytes += size
        if self._all_written.is_set():
            self._all_written.clear()
            self._wake.set()

    def _refusal(self, stamp: int, size: int) -> Exception:
        if not self._is_open:
            return SpoolError(f"the journal {self.path} is closed or belongs to another process: cannot append to it")
        if size > MAX_RECORD_BYTES:
            return ValueError(f"record {stamp} has {size} bytes, the limit is {MAX_RECORD_BYTES}")
        return ValueError(f"stamp {stamp} is not greater than the previous record's, {self.last}")

    async def wait_written(self, timeout: float) -> bool:
        """Wait until every record is on disk; return False if that takes longer than `timeout` seconds.

        A failing disk is retried at once.
        """
        self._wake.set()
        try:
            async with asyncio.timeout(timeout):
                await self._all_written.wait()
        except TimeoutError:
            return False
        return True

    async def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with stamps greater than `after`, oldest first, skipping damaged ones.

        Raises `SpoolError` if the system prevents reading (too many open files, missing permissions).
        """
        after = max(after, self._trimmed)
        # Taken before the files are read: records written meanwhile are then found in the files.
        start = bisect_right(self._pending, after, key=_stamp_of)
        waiting = self._pending[start : start + limit]
        try:
            records = await self._in_thread(self._segments.read, after, limit)
        except OSError as error:
            raise SpoolError(f"cannot read the journal {self.path}: {error.strerror}") from error
        newest = records[-1][0] if records else after
        records += [record for record in waiting if record[0] > newest][: limit - len(records)]
        return records

    async def trim(self, upto: int) -> None:
        """Remove the records up to this stamp; segments without newer ones are deleted."""
        self._trimmed = max(self._trimmed, min(upto, self.last))
        self._first = bisect_right(self._stamps, upto, self._first)
        if self._first > 10_000 and self._first * 2 > len(self._stamps):
            del self._stamps[: self._first]
            self._first = 0
        if self._pending and not self._in_flight:
            self._drop(bisect_right(self._pending, upto, key=_stamp_of))
            if not self._pending:
                self._wake.set()  # nothing is left to write
        if self._segments.can_trim(upto):
            await self._in_thread(self._segments.trim, upto)
            self._wake.set()  # there may be room again

    async def close(self, timeout: float) -> None:
        """Write what is in memory within `timeout` seconds and release the lock; an empty journal is deleted.

        Never raises; records that could not be written are logged.
        """
        if self._lock is None:
            return
        self._is_open = False
        if self._writing is not None:
            await self.wait_written(timeout)
        await self._stop_writing()
        if self.volatile and self._is_ours:
            _log.error("%s events were not written to the spool: %s", self.volatile,
                       self.failure or "the disk is slow", extra=self._extra)  # fmt: skip
        try:
            async with asyncio.timeout(timeout + self._policy.close_seconds):
                # Whoever adopted a damaged journal decides whether to remove it.
                if not self.records and (self._is_ours or not self.damage):
                    await self.remove()
                else:
                    await self._in_thread(self._segments.close)
        except SpoolError as error:
            _log.warning("%s", error)
        except TimeoutError:
            # The thread is still writing: the lock stays held as long as this process lives.
            _log.error("the spool's disk does not respond", extra=self._extra)
            self._lock = None
        self._release()

    async def remove(self) -> None:
        """Delete the journal and release the lock. Raises `SpoolError` if the disk refuses; it then stays locked."""
        if self._lock is None:
            return
        self._is_open = False
        await self._stop_writing()
        try:
            await self._in_thread(self._segments.remove, LOCK)
        except OSError as error:
            raise SpoolError(f"cannot delete the journal {self.path}: {error.strerror}") from error
        self._stamps, self._first = array("q"), 0
        self._drop(len(self._pending))
        self._release()

    # --- writing

    async def _keep_writing(self) -> None:
        # Not stamina: the pause ends early if a record is trimmed or `wait_written` asks for another attempt.
        pause = self._policy.retry_seconds
        while True:
            self._drop(bisect_right(self._pending, self._trimmed, key=_stamp_of))
            if self.failure == _FULL and not self.is_full:
                self._end_failure()
            if not self._pending:
                self._all_written.set()
                await self._wait_for_wake(None)
            elif self.is_full:
                self._begin_failure(_FULL)
                await self._wait_for_wake(None)  # until something is trimmed
            elif await self._write():
                pause = self._policy.retry_seconds
                self._end_failure()
            else:
                await self._wait_for_wake(pause)
                pause = min(2 * pause, self._policy.retry_max_seconds)

    async def _write(self) -> bool:
        """Write the oldest pending records; return False if the disk refuses."""
        batch = self._pending[:BATCH_RECORDS]
        self._in_flight = len(batch)
        try:
            written = await self._in_thread(self._segments.write, batch)
        except Exception as error:  # the records are still in memory, and the next attempt may succeed
            expected = isinstance(error, OSError) and error.strerror
            self._begin_failure(expected or repr(error), None if expected else error)
            return False
        finally:
            self._in_flight = 0
        self._drop(written)
        if self._tail is not None:
            self._tail.trim(batch[written - 1][0])
        return True

    def _drop(self, count: int) -> None:
        """Remove records from the front of `_pending`."""
        if count:
            self.unwritten_bytes -= sum(len(payload) for _, payload in self._pending[:count])
            del self._pending[:count]

    async def _wait_for_wake(self, timeout: float | None) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wake.wait()

    def _begin_failure(self, why: str, unexpected: Exception | None = None) -> None:
        if self.failure is None:
            _log.error("spool write failed, events stay in memory: %s", why, extra=self._extra, exc_info=unexpected)
        self.failure = why

    def _end_failure(self) -> None:
        if self.failure is not None:
            _log.info("spool accepts events again", extra=self._extra)
            self.failure = None

    async def _stop_writing(self) -> None:
        if self._writing is not None:
            await cancel_and_wait((self._writing,), self._policy.close_seconds)

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _release(self) -> None:
        if self._tail is not None:
            self._tail.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._thread.shutdown(wait=False)


def list_journals(directory: Path, *, except_id: str | None = None) -> list[Path]:
    """Return the journals in a directory, oldest first; an empty list if the directory does not exist."""
    journals: list[tuple[int, str, Path]] = []
    for lock in directory.glob(f"[!.]*/{LOCK}"):
        with contextlib.suppress(FileNotFoundError):  # removed just now
            journals.append((lock.stat().st_mtime_ns, lock.parent.name, lock.parent))
    return [path for _, name, path in sorted(journals) if name != except_id]


def newest_first_stamp(directory: Path) -> int:
    """Return the greatest stamp that a journal in the directory begins with, of live processes too; 0 without any.

    It has the newest lease epoch in the spool, because all stamps of a journal have the same one. Blocking.
    """
    newest = 0
    for path in list_journals(directory):
        with contextlib.suppress(OSError):  # removed just now, or unreadable: `replay_journals` compares the epochs
            tail = Tail.read(path, 0)
            newest = max(newest, Segments.scan(path).first_stamp(), tail[0][0] if tail else 0)
    return newest


def is_dead(directory: Path, id: str) -> bool:
    """Return whether the process of a journal on this machine has provably ended: nobody holds its lock."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", id):
        return False
    try:
        os.close(_acquire_lock(directory / id))
    except OSError:  # held, or not on this machine
        return False
    return True


def _create(directory: Path, id: str) -> int:
    """Create a journal's directory and return the descriptor of its lock, held. Raises `OSError`."""
    # Renamed with the lock already held, so that it never looks like the journal of a process that has ended.
    draft = directory / f".{id}"
    draft.mkdir(parents=True, exist_ok=True)
    lock = None
    try:
        (draft / LOCK).touch(mode=0o600)
        lock = _acquire_lock(draft)
        draft.rename(directory / id)
        sync_directory(directory)
    except BaseException:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return lock


def _acquire_lock(path: Path) -> int:
    """Lock a journal and return the lock's descriptor.

    Raises `BlockingIOError` if another process holds it, `FileNotFoundError` if it does not exist (any more).
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(path / LOCK)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor

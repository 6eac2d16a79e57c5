"""The files of a journal: segments of checksummed records. Blocking code, to be run in a thread."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import zlib
from array import array
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from utils.files import sync_directory

_log = logging.getLogger(__name__)

#: Stamp and payload.
Record = tuple[int, bytes]

#: First bytes of a segment: name and version of the format; the journal's id and a newline follow.
MAGIC = b"guildbook journal 1 "
#: The rest of the header: number of the previous segment and where its valid part ends; CRC-32 of the whole header.
_PREVIOUS = struct.Struct(">QQ")
_CHECKSUM = struct.Struct(">I")
#: A record: length of the payload and stamp; the payload; CRC-32 of both.
_HEAD = struct.Struct(">Iq")
#: No event is nearly as long, so a greater length in a file is damage.
MAX_RECORD_BYTES = 2**20
#: Bytes read from a segment at once.
READ_BYTES = 2**18
#: Bytes after which a batch is flushed to disk although more records wait.
BATCH_BYTES = 2**21
#: Fraction of its maximum size from which the newest segment is deleted once all of it is trimmed.
EARLY = 1 / 8
#: Files of records that are not in a segment yet, see `Tail`.
TAILS = ("tail-1", "tail-2")
#: Bytes from which a tail is emptied.
TAIL_BYTES = 2**20
#: Last stamp of a segment that has not been read: it may contain any.
_UNKNOWN = 2**63 - 1


class Damage(NamedTuple):
    """An unreadable part of a segment: from the first broken byte to its end."""

    segment: Path
    bytes_lost: int
    why: str


class _DamagedError(Exception):
    """A record or header is damaged: why, and the offset where it starts."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.offset: int = offset


@dataclass(slots=True)
class _Segment:
    number: int
    path: Path
    #: Bytes known to be on disk; bytes behind them were never confirmed.
    size: int
    #: Where reading ends: less than `size` if the segment is damaged.
    end: int
    #: Stamp of the last record; 0 if there is none.
    last: int = 0


class Segments:
    """Writes records to one segment after the other, reads them in order, and deletes fully trimmed segments."""

    def __init__(
        self,
        directory: Path,
        segment_bytes: int = 8 * 2**20,
        *,
        max_bytes: int = 2**63,
        read_bytes: int = READ_BYTES,
    ) -> None:
        self.damage: list[Damage] = []
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._read_bytes = read_bytes
        #: Size from which the newest segment may be deleted; a full one must be, however small it is.
        self._early: float = min(segment_bytes * EARLY, max_bytes)
        self._segments: list[_Segment] = []
        self._number = 0
        #: Descriptor of the newest segment while it is open for writing.
        self._open: int | None = None
        #: Where reading continues: segment (None: unknown), offset, and the last stamp read in the segment and overall.
        self._current: _Segment | None = None
        self._offset = 0
        self._last_stamp = 0
        self._last_read = 0

    @classmethod
    def scan(cls, directory: Path, *, read_bytes: int = READ_BYTES) -> Segments:
        """Open the segments that another process left in a directory. Raises `OSError`."""
        segments = cls(directory, read_bytes=read_bytes)
        ends: dict[int, int] = {}
        for path in sorted(directory.glob("*.journal")):
            if path.stem.isdecimal():
                size = path.stat().st_size
                segments._segments.append(_Segment(int(path.stem), path, size, size, _UNKNOWN))
                with contextlib.suppress(_DamagedError), path.open("rb") as file:
                    previous, end = segments._parse_header(file.read(segments._header_size))
                    ends[previous] = end
        for segment in segments._segments:
            segment.size = segment.end = ends.get(segment.number, segment.size)
        return segments

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments)

    # --- writing

    def write(self, records: list[Record]) -> int:
        """Append records, oldest first, and flush them to disk; return how many were written, at least one.

        Raises `OSError`; none of them counts as written then.
        """
        if self._open is None or self._segments[-1].size >= self._segment_bytes:
            self._start_segment()
        assert self._open is not None
        frames: list[bytes] = []
        size = count = 0
        room = min(BATCH_BYTES, self._segment_bytes)
        for stamp, payload in records:
            frame = _frame(stamp, payload)
            frames.append(frame)
            size += len(frame)
            count += 1
            if size >= room:
                break
        try:
            _write_all(self._open, b"".join(frames))
        except OSError:
            self._truncate()
            raise
        try:
            os.fdatasync(self._open)
        except OSError:
            # The kernel may have discarded the pages that it could not write, and reports that only once, so this file
            # is not used any further. The batch goes to a new segment, whose header says where the valid part of this
            # one ends; if that header becomes unreadable, reading skips stamps that it has seen.
            self._truncate()
            self._abandon()
            raise
        segment = self._segments[-1]
        segment.size = segment.end = segment.size + size
        segment.last = records[count - 1][0]
        return count

    def _truncate(self) -> None:
        """Cut off what a failed write left behind; if that fails too, append nothing to this segment."""
        if self._open is not None:
            try:
                os.ftruncate(self._open, self._segments[-1].size)
            except OSError:
                self._abandon()

    def _abandon(self) -> None:
        """Stop writing to the newest segment; delete it if it has no records, or each retry would leave one behind."""
        self.close()
        if self._segments and not self._segments[-1].last:
            segment = self._segments.pop()
            self._current = None if self._current is segment else self._current
            _delete(segment.path)

    def _start_segment(self) -> None:
        """Start a new segment atomically: it has its name only once its header is on disk."""
        self.close()
        self._number += 1
        path = self._directory / f"{self._number:020d}.journal"
        draft = path.with_suffix(".tmp")
        previous = self._segments[-1] if self._segments else None
        header = self._header(previous.number, previous.size) if previous is not None else self._header(0, 0)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, header)
            os.fsync(descriptor)
            draft.rename(path)
            sync_directory(self._directory)
        except BaseException:
            os.close(descriptor)
            _delete(draft)
            _delete(path)
            raise
        self._open = descriptor
        self._segments.append(_Segment(self._number, path, len(header), len(header)))

    def close(self) -> None:
        """Close the newest segment."""
        descriptor, self._open = self._open, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # everything confirmed was flushed before
                os.close(descriptor)

    # --- headers

    @property
    def _prefix(self) -> bytes:
        return MAGIC + os.fsencode(self._directory.name) + b"\n"

    @property
    def _header_size(self) -> int:
        return len(self._prefix) + _PREVIOUS.size + _CHECKSUM.size

    def _header(self, previous: int, end: int) -> bytes:
        header = self._prefix + _PREVIOUS.pack(previous, end)
        return header + _CHECKSUM.pack(zlib.crc32(header))

    def _parse_header(self, header: bytes) -> tuple[int, int]:
        """Return the number of the previous segment and where its valid part ends."""
        if len(header) == self._header_size:
            previous, end = _PREVIOUS.unpack_from(header, len(self._prefix))
            if header == self._header(previous, end):
                return previous, end
        raise _DamagedError("invalid segment header", 0)

    # --- reading

    def stamps(self) -> array[int]:
        """Read everything and return the stamps of the intact records. Raises `OSError` like `read`."""
        stamps = array("q")
        for segment in self._segments:
            segment.last = 0
            for stamp, _, _ in self._records(segment, 0, 0):
                if not stamps or stamp > stamps[-1]:
                    stamps.append(stamp)
                    segment.last = stamp
        return stamps

    def first_stamp(self) -> int:
        """Return the stamp of the first intact record, from the start of each segment; 0 if there is none."""
        for segment in self._segments:
            with contextlib.suppress(_DamagedError, OSError), contextlib.closing(self._frames(segment, 0)) as frames:
                for stamp, _, _ in frames:
                    return stamp
        return 0

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with stamps greater than `after`, oldest first.

        A damaged record ends its segment, which is logged and added to `damage`. Raises `OSError` if not the file but
        the system fails (too many open files, missing permissions): the same call may succeed later.
        """
        if after < self._last_read:
            self._current, self._last_read = None, 0
        records: list[Record] = []
        if self._current is None:
            self._seek(next((segment for segment in self._segments if segment.last > after), None))
        while self._current is not None:
            self._read_segment(self._current, after, limit, records)
            if len(records) >= limit:
                break
            number = self._current.number
            following = next((segment for segment in self._segments if segment.number > number), None)
            if following is None:
                break
            self._seek(following)
        return records

    def _seek(self, segment: _Segment | None) -> None:
        self._current, self._offset, self._last_stamp = segment, 0, 0

    def _read_segment(self, segment: _Segment, after: int, limit: int, found: list[Record]) -> None:
        """Continue reading a segment until its end or until `found` has `limit` records."""
        with contextlib.closing(self._records(segment, self._offset, self._last_stamp)) as records:
            for stamp, payload, self._offset in records:
                self._last_stamp = stamp
                if stamp <= self._last_read:
                    continue  # written twice, see `write`
                self._last_read = stamp
                if stamp > after:
                    found.append((stamp, payload))
                    if len(found) >= limit:
                        return

    def _records(self, segment: _Segment, offset: int, previous: int) -> Generator[tuple[int, bytes, int], None, None]:
        """Yield stamp, payload and end offset of a segment's records from `offset` on, up to the first damaged one."""
        try:
            if offset < segment.end:
                for stamp, payload, end in self._frames(segment, offset):
                    if stamp <= previous:
                        raise _DamagedError("a record is older than its predecessor", offset)  # noqa: TRY301
                    previous, offset = stamp, end
                    yield stamp, payload, end
        except _DamagedError as damaged:
            self._note_damage(segment, damaged.offset, str(damaged))
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):
                raise
            self._note_damage(segment, offset, error.strerror or str(error))

    def _frames(self, segment: _Segment, offset: int) -> Generator[tuple[int, bytes, int], None, None]:
        with segment.path.open("rb", buffering=0) as file:
            if offset == 0:
                self._parse_header(file.read(self._header_size))
                offset = self._header_size
            file.seek(offset)
            data, position = b"", 0
            while offset < segment.end:
                if len(data) - position < _HEAD.size:
                    data, position = data[position:] + file.read(self._read_bytes), 0
                    if len(data) < _HEAD.size:
                        raise _DamagedError("the segment ends in the middle of a record", offset)
                length, stamp = _HEAD.unpack_from(data, position)
                if length > MAX_RECORD_BYTES:
                    raise _DamagedError(f"invalid record length: {length} bytes", offset)
                record_size = _HEAD.size + length + _CHECKSUM.size
                while len(data) - position < record_size:
                    more = file.read(max(self._read_bytes, record_size))
                    if not more:
                        raise _DamagedError("the segment ends in the middle of a record", offset)
                    data, position = data[position:] + more, 0
                payload_end = position + record_size - _CHECKSUM.size
                if zlib.crc32(data[position:payload_end]) != _CHECKSUM.unpack_from(data, payload_end)[0]:
                    raise _DamagedError("checksum mismatch", offset)
                payload = data[position + _HEAD.size : payload_end]
                position += record_size
                offset += record_size
                yield stamp, payload, offset

    def _note_damage(self, segment: _Segment, offset: int, why: str) -> None:
        damage = Damage(segment.path, segment.size - offset, why)
        self.damage.append(damage)
        segment.end = offset
        _log.warning(
            "journal segment damaged, its last %s bytes are lost: %s", damage.bytes_lost, why,
            extra={"segment": str(segment.path), "offset": offset},
        )  # fmt: skip

    # --- deleting

    def can_trim(self, upto: int) -> bool:
        """Return whether `trim` would delete anything; safe to call from any thread."""
        segments = self._segments[:2]
        if not segments or segments[0].last > upto:
            return False
        return len(segments) > 1 or self._open is None or segments[0].size >= self._early

    def trim(self, upto: int) -> None:
        """Delete the oldest segments, as far as they hold no stamp greater than `upto`."""
        while self.can_trim(upto):
            if len(self._segments) == 1:
                self.close()
            segment = self._segments.pop(0)
            self._current = None if self._current is segment else self._current
            _delete(segment.path)

    def remove(self, lock: str) -> None:
        """Delete all segments and drafts, then the lock, then the directory. Raises `OSError`.

        The lock goes last because it marks the owner of the segments.
        """
        self.close()
        self._segments.clear()
        self._current = None
        for pattern in ("*.journal", "*.tmp", *TAILS):
            for path in self._directory.glob(pattern):
                path.unlink(missing_ok=True)
        sync_directory(self._directory)
        (self._directory / lock).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # contains foreign files; without a lock it is no longer a journal
            self._directory.rmdir()


class Tail:
    """Records that a segment does not have yet, written by the caller's own thread: a kill -9 does not lose them.

    A segment is written and flushed to disk by another thread, a moment later. The tail is never flushed, so it does
    not outlive a crash of the machine. Writing takes a few microseconds, because the kernel only copies the bytes.

    There are two files: one is written while the segments catch up with the other, which is then emptied.
    """

    def __init__(self, directory: Path, max_bytes: int = TAIL_BYTES) -> None:
        """Create the files. One of at least `max_bytes` is emptied as soon as it can be. Raises `OSError`."""
        self._max_bytes = max_bytes
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._files = [_TailFile(os.open(directory / name, flags, 0o600)) for name in TAILS]

    def append(self, stamp: int, payload: bytes) -> None:
        """Write a record. Raises `OSError`; the record is not written then."""
        current, other = self._files
        if current.size >= self._max_bytes and not other.size:
            self._files.reverse()
            current = other
        frame = _frame(stamp, payload)
        try:
            written = os.write(current.descriptor, frame)
            if written < len(frame):
                _write_all(current.descriptor, frame[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(current.descriptor, current.size)
            raise
        current.size += len(frame)
        current.last = stamp

    def trim(self, upto: int) -> None:
        """Empty the files whose records up to this stamp are all in segments, once they are large."""
        for file in self._files:
            if file.size >= self._max_bytes and file.last <= upto:
                with contextlib.suppress(OSError):  # reading skips what segments have
                    os.ftruncate(file.descriptor, 0)
                    file.size = 0

    def close(self) -> None:
        """Close the files."""
        files, self._files = self._files, []
        for file in files:
            os.close(file.descriptor)

    @staticmethod
    def read(directory: Path, after: int) -> list[Record]:
        """Return the intact records with stamps greater than `after`, oldest first. Raises `OSError`."""
        records: list[Record] = []
        for name in TAILS:
            with contextlib.suppress(FileNotFoundError):
                records += _intact_records((directory / name).read_bytes())
        return sorted(record for record in records if record[0] > after)


@dataclass(slots=True)
class _TailFile:
    descriptor: int
    size: int = 0
    #: Stamp of the last record.
    last: int = 0


def _intact_records(data: bytes) -> Generator[Record, None, None]:
    """Yield the records of a tail up to the first damaged one, which a kill has cut off."""
    offset = 0
    while offset + _HEAD.size <= len(data):
        length, stamp = _HEAD.unpack_from(data, offset)
        end = offset + _HEAD.size + length
        if end + _CHECKSUM.size > len(data) or zlib.crc32(data[offset:end]) != _CHECKSUM.unpack_from(data, end)[0]:
            return
        yield stamp, data[offset + _HEAD.size : end]
        offset = end + _CHECKSUM.size


def _frame(stamp: int, payload: bytes) -> bytes:
    data = _HEAD.pack(len(payload), stamp) + payload
    return data + _CHECKSUM.pack(zlib.crc32(data))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # its records are below the replay position, so reading them again is harmless
        path.unlink()

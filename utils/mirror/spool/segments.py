"""The files of a journal: segments of records with checksums. Nothing here knows an event loop."""

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

_log = logging.getLogger(__name__)

#: Stamp and payload.
Record = tuple[int, bytes]

#: What a segment begins with: name of the format and its version; the journal's id and a newline follow.
MAGIC = b"guildbook journal 1 "
#: The rest of a segment's header: number of the segment before it and where its good part ends; CRC-32 of it all.
_BEFORE = struct.Struct(">QQ")
_CHECKSUM = struct.Struct(">I")
#: A record: length of the payload, stamp; the payload; CRC-32 of them.
_HEAD = struct.Struct(">Iq")
#: No event is nearly as long, in bytes: a length above is a broken one.
LONGEST = 2**20
#: Bytes read from a segment at once.
CHUNK = 2**18
#: Bytes after which a batch is forced to disk, though more waits.
BATCH_BYTES = 2**21
#: The segment that is written to is deleted early, when all of it is forgotten, from this part of a full one on.
EARLY = 1 / 8


#: Last stamp of a segment that nobody has read: it may hold anything.
_UNKNOWN = 2**63 - 1


class Damage(NamedTuple):
    """What could not be read: from the first broken byte to the end of that segment."""

    segment: Path
    bytes_lost: int
    why: str


class _Broken(Exception):
    """A record, or a header, is not as it was written: why, and at which offset it begins."""

    def __init__(self, why: str, offset: int) -> None:
        super().__init__(why)
        self.offset: int = offset


@dataclass(slots=True)
class _Segment:
    number: int
    path: Path
    #: Bytes that are on disk for good; what may follow was never said to be written.
    size: int
    #: Where reading ends: before `size` when it is damaged.
    end: int
    #: Stamp of its last record; 0 when it has none.
    last: int = 0


class Segments:
    """Writes records to one segment after the other, reads them in order, and deletes segments that are done with."""

    def __init__(self, directory: Path, segment_bytes: int = 8 * 2**20, *, max_bytes: int = 2**63) -> None:
        self.damage: list[Damage] = []
        self._directory = directory
        self._segment_bytes = segment_bytes
        #: Bytes of the segment written to from which it may go: one that is full has to, however small it is.
        self._early: float = min(segment_bytes * EARLY, max_bytes)
        self._segments: list[_Segment] = []
        self._number = 0
        #: Descriptor of the last segment while it is written to.
        self._open: int | None = None
        #: Where reading goes on: segment (None: to be looked for), offset, stamps before it in the segment and in all.
        self._at: _Segment | None = None
        self._offset = 0
        self._previous = 0
        self._passed = 0

    @classmethod
    def scan(cls, directory: Path) -> Segments:
        """Return the segments that another process left in a directory. Raises `OSError`."""
        segments = cls(directory)
        ends: dict[int, int] = {}
        for path in sorted(directory.glob("*.journal")):
            if path.stem.isdecimal():
                size = path.stat().st_size
                segments._segments.append(_Segment(int(path.stem), path, size, size, _UNKNOWN))
                with contextlib.suppress(_Broken), path.open("rb") as file:
                    before, end = segments._before(file.read(segments._header_size))
                    ends[before] = end
        for segment in segments._segments:
            segment.size = segment.end = ends.get(segment.number, segment.size)
        return segments

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments)

    # --- writing

    def write(self, records: list[Record]) -> int:
        """Append records from the first on and force them to disk; return how many it were, at least one.

        Raises `OSError`; none of them counts as written then.
        """
        if self._open is None or self._segments[-1].size >= self._segment_bytes:
            self._begin()
        assert self._open is not None
        frames: list[bytes] = []
        size = count = 0
        room = min(BATCH_BYTES, self._segment_bytes)
        for stamp, payload in records:
            head = _HEAD.pack(len(payload), stamp)
            frames += head, payload, _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head)))
            size += _HEAD.size + len(payload) + _CHECKSUM.size
            count += 1
            if size >= room:
                break
        try:
            _write_all(self._open, b"".join(frames))
        except OSError:
            self._take_back()
            raise
        try:
            os.fdatasync(self._open)
        except OSError:
            # The kernel may have dropped what it could not write, and it says so only once: this file is not to be
            # trusted with more. The batch is written again, to a new segment, whose header says where the good part of
            # this one ends; should that be unreadable, reading skips stamps that it has seen.
            self._take_back()
            self._abandon()
            raise
        segment = self._segments[-1]
        segment.size = segment.end = segment.size + size
        segment.last = records[count - 1][0]
        return count

    def _take_back(self) -> None:
        """Cut off what a failed write left; where that fails too, nothing may come behind it."""
        if self._open is not None:
            try:
                os.ftruncate(self._open, self._segments[-1].size)
            except OSError:
                self._abandon()

    def _abandon(self) -> None:
        """Write to the last segment no more; one without records goes, or every further try would leave one."""
        self.close()
        if self._segments and not self._segments[-1].last:
            segment = self._segments.pop()
            self._at = None if self._at is segment else self._at
            _delete(segment.path)

    def _begin(self) -> None:
        """Begin a segment: whole with its header under its name, or not there at all."""
        self.close()
        self._number += 1
        path = self._directory / f"{self._number:020d}.journal"
        draft = path.with_suffix(".tmp")
        before = self._segments[-1] if self._segments else None
        header = self._header(before.number, before.size) if before is not None else self._header(0, 0)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, header)
            os.fsync(descriptor)
            draft.rename(path)
            sync(self._directory)
        except BaseException:
            os.close(descriptor)
            _delete(draft)
            _delete(path)
            raise
        self._open = descriptor
        self._segments.append(_Segment(self._number, path, len(header), len(header)))

    def close(self) -> None:
        """Write to this segment no more."""
        descriptor, self._open = self._open, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # what counts was forced to disk before
                os.close(descriptor)

    # --- headers

    @property
    def _prefix(self) -> bytes:
        return MAGIC + os.fsencode(self._directory.name) + b"\n"

    @property
    def _header_size(self) -> int:
        return len(self._prefix) + _BEFORE.size + _CHECKSUM.size

    def _header(self, before: int, end: int) -> bytes:
        header = self._prefix + _BEFORE.pack(before, end)
        return header + _CHECKSUM.pack(zlib.crc32(header))

    def _before(self, header: bytes) -> tuple[int, int]:
        """Return the number of the segment before that with this header, and where its good part ends."""
        if len(header) == self._header_size:
            before, end = _BEFORE.unpack_from(header, len(self._prefix))
            if header == self._header(before, end):
                return before, end
        raise _Broken("it does not begin as a segment of this journal does", 0)

    # --- reading

    def stamps(self) -> array[int]:
        """Read it all, and return the stamps of what is whole. Raises `OSError` like `read`."""
        stamps = array("q")
        for segment in self._segments:
            segment.last = 0
            for stamp, _, _ in self._records(segment, 0, 0):
                if not stamps or stamp > stamps[-1]:
                    stamps.append(stamp)
                    segment.last = stamp
        return stamps

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with stamps above `after`, oldest first.

        A broken record costs the rest of its segment, which is logged and noted in `damage`. Raises `OSError` where the
        system, not the file, is in trouble (too many open files, no right to read): the same call may succeed later.
        """
        if after < self._passed:
            self._at, self._passed = None, 0
        found: list[Record] = []
        if self._at is None:
            self._go_to(next((segment for segment in self._segments if segment.last > after), None))
        while self._at is not None:
            self._read_on(self._at, after, limit, found)
            if len(found) >= limit:
                break
            number = self._at.number
            following = next((segment for segment in self._segments if segment.number > number), None)
            if following is None:
                break
            self._go_to(following)
        return found

    def _go_to(self, segment: _Segment | None) -> None:
        self._at, self._offset, self._previous = segment, 0, 0

    def _read_on(self, segment: _Segment, after: int, limit: int, found: list[Record]) -> None:
        """Read on in a segment, to its end or until enough was found."""
        with contextlib.closing(self._records(segment, self._offset, self._previous)) as records:
            for stamp, payload, self._offset in records:
                self._previous = stamp
                if stamp <= self._passed:
                    continue  # written twice, see `write`
                self._passed = stamp
                if stamp > after:
                    found.append((stamp, payload))
                    if len(found) >= limit:
                        return

    def _records(self, segment: _Segment, offset: int, previous: int) -> Generator[tuple[int, bytes, int], None, None]:
        """Yield stamp, payload and end of a segment's records from `offset` on, as far as it is whole."""
        try:
            if offset < segment.end:
                for stamp, payload, end in self._frames(segment, offset):
                    if stamp <= previous:
                        raise _Broken("a record is older than the one before it", offset)  # noqa: TRY301
                    previous, offset = stamp, end
                    yield stamp, payload, end
        except _Broken as broken:
            self._lose(segment, broken.offset, str(broken))
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):
                raise
            self._lose(segment, offset, error.strerror or str(error))

    def _frames(self, segment: _Segment, offset: int) -> Generator[tuple[int, bytes, int], None, None]:
        with segment.path.open("rb", buffering=0) as file:
            if offset == 0:
                self._before(file.read(self._header_size))
                offset = self._header_size
            file.seek(offset)
            data, position = b"", 0
            while offset < segment.end:
                if len(data) - position < _HEAD.size:
                    data, position = data[position:] + file.read(CHUNK), 0
                    if len(data) < _HEAD.size:
                        raise _Broken("it ends in the middle of a record", offset)
                length, stamp = _HEAD.unpack_from(data, position)
                if length > LONGEST:
                    raise _Broken(f"a record has a length of {length} bytes, which none has", offset)
                whole = _HEAD.size + length + _CHECKSUM.size
                while len(data) - position < whole:
                    more = file.read(max(CHUNK, whole))
                    if not more:
                        raise _Broken("it ends in the middle of a record", offset)
                    data, position = data[position:] + more, 0
                checked = position + whole - _CHECKSUM.size
                if zlib.crc32(data[position:checked]) != _CHECKSUM.unpack_from(data, checked)[0]:
                    raise _Broken("a record's checksum is wrong", offset)
                payload = data[position + _HEAD.size : checked]
                position += whole
                offset += whole
                yield stamp, payload, offset

    def _lose(self, segment: _Segment, offset: int, why: str) -> None:
        damage = Damage(segment.path, segment.size - offset, why)
        self.damage.append(damage)
        segment.end = offset
        _log.warning(
            "a segment of a journal is damaged, its last %s bytes are lost: %s", damage.bytes_lost, why,
            extra={"segment": str(segment.path), "offset": offset},
        )  # fmt: skip

    # --- forgetting

    def can_trim(self, upto: int) -> bool:
        """Return whether `trim` would delete anything; may be asked from any thread."""
        segments = self._segments[:2]
        if not segments or segments[0].last > upto:
            return False
        return len(segments) > 1 or self._open is None or segments[0].size >= self._early

    def trim(self, upto: int) -> None:
        """Delete the segments at the front that hold nothing with a stamp above `upto`."""
        while self.can_trim(upto):
            if len(self._segments) == 1:
                self.close()
            segment = self._segments.pop(0)
            self._at = None if self._at is segment else self._at
            _delete(segment.path)

    def remove(self, lock: str) -> None:
        """Delete all segments and drafts, then the lock, then the directory. Raises `OSError`.

        As long as a segment is there, the lock says whose it is.
        """
        self.close()
        self._segments.clear()
        self._at = None
        for path in (*self._directory.glob("*.journal"), *self._directory.glob("*.tmp")):
            path.unlink(missing_ok=True)
        sync(self._directory)
        (self._directory / lock).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody put something into it: without a lock it is no journal any more
            self._directory.rmdir()


def sync(directory: Path) -> None:
    """Force a directory's entries to disk. Raises `OSError`."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):  # what stays is older than the position: reading it again is without harm
        path.unlink()

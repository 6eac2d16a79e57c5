"""The files of a journal: segments of records with checksums. Nothing here knows an event loop."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)

#: Stamp and payload.
Record = tuple[int, bytes]

#: What a segment begins with: name of the format and its version.
MAGIC = b"guildbook journal 1\n"
#: Length of the payload, CRC-32 of stamp and payload, stamp.
_HEAD = struct.Struct(">IIq")
_STAMP = struct.Struct(">q")
#: No event is nearly as long: a length above is a broken one.
LONGEST = 2**16
#: Bytes read from a segment at once: at least one whole record.
CHUNK = 2**18
#: The segment that is written to is deleted early, when all of it is forgotten, from this part of a full one on.
EARLY = 1 / 8


class Damage(NamedTuple):
    """What could not be read: from the first broken byte to the end of that segment."""

    segment: Path
    bytes_lost: int
    why: str


@dataclass(slots=True)
class _Segment:
    path: Path
    #: Bytes that are good.
    size: int
    #: Stamp of the last record that was written to it.
    last: int = 0


class Segments:
    """Writes records to one segment after the other, reads them in order, and deletes segments that are done with."""

    def __init__(self, directory: Path, segment_bytes: int = 8 * 2**20) -> None:
        self.damage: list[Damage] = []
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segments: list[_Segment] = []
        self._number = 0
        #: Descriptor of the last segment while it is written to.
        self._open: int | None = None
        #: Where reading goes on: segment, offset, and the stamp of the last record returned.
        self._at: _Segment | None = None
        self._offset = 0
        self._read = 0

    @classmethod
    def found(cls, directory: Path) -> Segments:
        """Return the segments that another process left in a directory."""
        segments = cls(directory)
        for path in sorted(directory.glob("*.journal")):
            with contextlib.suppress(OSError):  # another process that had adopted it has removed it
                segments._segments.append(_Segment(path, path.stat().st_size))
        return segments

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments)

    # --- writing

    def write(self, records: list[Record]) -> None:
        """Append records and force them to disk. Raises `OSError`; none of them counts as written then."""
        if self._open is None or self._segments[-1].size >= self._segment_bytes:
            self._begin()
        assert self._open is not None
        frames = []
        for stamp, payload in records:
            checksum = zlib.crc32(payload, zlib.crc32(_STAMP.pack(stamp)))
            frames.append(_HEAD.pack(len(payload), checksum, stamp))
            frames.append(payload)
        data = b"".join(frames)
        segment = self._segments[-1]
        try:
            _write_all(self._open, data)
            os.fdatasync(self._open)
        except OSError:
            # What was written of them is taken back. They go to a new segment: should taking back fail, the rest of
            # this one is broken; should they be on disk all the same, reading skips stamps that it has seen.
            with contextlib.suppress(OSError):
                os.ftruncate(self._open, segment.size)
            self.close()
            raise
        segment.size += len(data)
        segment.last = records[-1][0]

    def _begin(self) -> None:
        """Begin a segment: whole with its header under its name, or not there at all."""
        self.close()
        self._number += 1
        path = self._directory / f"{self._number:020d}.journal"
        draft = path.with_suffix(".tmp")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, MAGIC)
            os.fsync(descriptor)
            draft.rename(path)
            _sync(self._directory)
        except BaseException:
            os.close(descriptor)
            raise
        self._open = descriptor
        self._segments.append(_Segment(path, len(MAGIC)))

    def close(self) -> None:
        """Write to this segment no more."""
        descriptor, self._open = self._open, None
        if descriptor is not None:
            os.close(descriptor)

    # --- reading

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with stamps above `after`, oldest first.

        A broken record costs the rest of its segment, which is logged and noted in `damage`.
        """
        if after < self._read:
            self._at, self._offset, self._read = None, 0, 0
        found: list[Record] = []
        while len(found) < limit and (segment := self._at or self._next(None)) is not None:
            self._at = segment
            self._read_segment(segment, after, limit, found)
            if len(found) >= limit:
                break
            following = self._next(segment)
            if following is None:
                break
            self._at, self._offset = following, 0
        return found

    def _next(self, segment: _Segment | None) -> _Segment | None:
        if segment is None:
            self._offset = 0
            return self._segments[0] if self._segments else None
        number = next((index for index, other in enumerate(self._segments) if other is segment), -1)
        return self._segments[number + 1] if number + 1 < len(self._segments) else None

    def _read_segment(self, segment: _Segment, after: int, limit: int, found: list[Record]) -> None:
        """Read on in a segment, to its end or until enough was found."""
        if self._offset >= segment.size:
            return
        try:
            with segment.path.open("rb") as file:
                if self._offset == 0:
                    if file.read(len(MAGIC)) != MAGIC:
                        self._lose(segment, "it does not begin as a segment does")
                        return
                    self._offset = len(MAGIC)
                while len(found) < limit and self._offset < segment.size:
                    file.seek(self._offset)
                    self._take(segment, file.read(min(CHUNK, segment.size - self._offset)), after, limit, found)
        except OSError as error:
            self._lose(segment, error.strerror or str(error))

    def _take(self, segment: _Segment, data: bytes, after: int, limit: int, found: list[Record]) -> None:
        """Take whole records off a piece of a segment; one that is not whole at its front is broken."""
        position = 0
        while len(found) < limit and len(data) - position >= _HEAD.size:
            length, checksum, stamp = _HEAD.unpack_from(data, position)
            end = position + _HEAD.size + length
            if length > LONGEST:
                self._lose(segment, "a record has a length that none has")
                return
            if end > len(data):
                break
            payload = data[position + _HEAD.size : end]
            if zlib.crc32(payload, zlib.crc32(_STAMP.pack(stamp))) != checksum:
                self._lose(segment, "a record's checksum is wrong")
                return
            if stamp > max(after, self._read):
                found.append((stamp, payload))
                self._read = stamp
            self._offset += end - position
            position = end
        if position == 0:
            self._lose(segment, "it ends in the middle of a record")

    def _lose(self, segment: _Segment, why: str) -> None:
        offset, lost = self._offset, segment.size - self._offset
        self.damage.append(Damage(segment.path, lost, why))
        self._offset = segment.size
        _log.error(
            "a journal is damaged, what its segment holds from there on is lost: %s", why,
            extra={"segment": str(segment.path), "offset": offset, "bytes_lost": lost},
        )  # fmt: skip

    # --- forgetting

    def can_trim(self, upto: int) -> bool:
        """Return whether `trim` would delete anything."""
        if not self._segments or self._segments[0].last > upto:
            return False
        first = self._segments[0]
        return len(self._segments) > 1 or self._open is None or first.size >= self._segment_bytes * EARLY

    def trim(self, upto: int) -> None:
        """Delete the segments that hold nothing with a stamp above `upto`."""
        while self.can_trim(upto):
            if len(self._segments) == 1:
                self.close()
            segment = self._segments.pop(0)
            if self._at is segment:
                self._at, self._offset = None, 0
            with contextlib.suppress(OSError):
                segment.path.unlink()

    def remove(self) -> None:
        """Delete all segments, and drafts of segments."""
        self.close()
        self._segments.clear()
        for path in (*self._directory.glob("*.journal"), *self._directory.glob("*.tmp")):
            with contextlib.suppress(OSError):
                path.unlink()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

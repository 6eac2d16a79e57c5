"""The queue of events: oldest first, in memory while the database answers, on disk when it does not."""

from __future__ import annotations

import logging
import time
from collections import deque
from itertools import islice
from typing import Literal, NamedTuple

from utils.exceptions import ValidationError
from utils.mirror.records.events import Event, packed, unpacked
from utils.mirror.spool.journal import Journal
from utils.service import metrics

_log = logging.getLogger(__name__)

Spool = Literal["outage", "always", "off"]
#: How many times as much memory a disk that is slow, and not in trouble, may cost for a moment.
SLOW = 3
#: Seconds between two marks of when events came: the accuracy of `age`.
_MARK_SECONDS = 0.1


class Oldest(NamedTuple):
    """The events at the front of the queue, and the stamp up to which they reach."""

    events: list[Event]
    #: Stamp of the last one, readable or not; 0 when there is none.
    upto: int


class EventQueue:
    """Events that were accepted and are not committed yet, in the order in which they came.

    `journal` None: all of them are in memory (`SPOOL=off`).
    """

    def __init__(self, journal: Journal | None, *, spool: Spool, max_rows: int) -> None:
        self.journal: Journal | None = journal
        #: Events that memory may hold.
        self.max_rows: int = max_rows
        #: Stamp of the newest event; 0 when none ever came.
        self.last: int = 0
        #: Events given up because neither disk nor memory had room for them.
        self.dropped: int = 0
        self._always: bool = spool == "always" and journal is not None
        self._recent: deque[Event] = deque()
        #: True while the journal, and not memory, holds what waits.
        self._spilled: bool = False
        self._is_dropping: bool = False
        #: (stamp, `time.monotonic()`) of events, one every so often.
        self._marks: deque[tuple[int, float]] = deque()

    def __len__(self) -> int:
        return self.journal.records if self._spilled and self.journal is not None else len(self._recent)

    @property
    def in_memory(self) -> int:
        """Events in memory that no disk holds, and copies of those that it does."""
        return len(self._recent) + (self.journal.unwritten if self.journal is not None else 0)

    @property
    def is_crowded(self) -> bool:
        """Whether memory holds more than half of what it may, and the disk will take it: there is use in waiting."""
        journal = self.journal
        if journal is None or (len(self._recent) + journal.unwritten) * 2 <= self.max_rows:
            return False
        return journal.trouble is None

    @property
    def age(self) -> float:
        """Seconds that the oldest event has waited; 0 when none does."""
        return time.monotonic() - self._marks[0][1] if self._marks else 0.0

    @property
    def is_spilled(self) -> bool:
        """Whether what waits is on disk."""
        return self._spilled

    def add(self, event: Event) -> None:
        """Accept an event."""
        self.last = event.stamp
        now = time.monotonic()
        if not self._marks or now - self._marks[-1][1] > _MARK_SECONDS:
            self._marks.append((event.stamp, now))
        journal = self.journal
        if journal is not None and (self._always or self._spilled):
            if journal.unwritten >= self.max_rows * (SLOW if journal.trouble is None else 1):
                self._drop(f"memory is full, and the spool takes nothing ({journal.trouble or 'SPOOL_MAX_MB'})")
                return
            journal.append(event.stamp, packed(event))
        if not self._spilled:
            self._recent.append(event)
            if len(self._recent) > self.max_rows:
                self._overflow()

    def spill(self) -> None:
        """Leave to the disk what waits and what follows, until all of it is committed; nothing with `SPOOL=off`."""
        journal = self.journal
        if journal is None or self._spilled:
            return
        if not self._always:
            for event in self._recent:
                journal.append(event.stamp, packed(event))
        self._recent.clear()
        self._spilled = True

    async def oldest(self, limit: int, after: int = 0) -> Oldest:
        """Return up to `limit` events with stamps after `after`; they stay in the queue until `forget`."""
        if self._spilled and self.journal is not None:
            return read_events(await self.journal.read(after, limit))
        recent = self._recent
        later = iter(recent) if not recent or recent[0].stamp > after else (it for it in recent if it.stamp > after)
        events = list(islice(later, limit))
        return Oldest(events, events[-1].stamp if events else 0)

    async def forget(self, position: int) -> None:
        """Let go of all events up to this stamp: they are committed."""
        recent, marks = self._recent, self._marks
        if recent and recent[-1].stamp <= position:
            recent.clear()
        while recent and recent[0].stamp <= position:
            recent.popleft()
        if self.journal is not None and self.journal.records:
            await self.journal.trim(position)
        if self._spilled and self.journal is not None and not self.journal.records:
            self._spilled = self._is_dropping = False
        while len(marks) > 1 and marks[1][0] <= position:
            marks.popleft()
        if not len(self):
            marks.clear()

    def _overflow(self) -> None:
        if self.journal is not None:
            self.spill()
        else:
            self._recent.popleft()
            self._drop("memory is full (BUFFER_MAX_ROWS), and SPOOL is off")

    def _drop(self, why: str) -> None:
        self.dropped += 1
        metrics.dropped.labels("event").inc()
        if not self._is_dropping:
            self._is_dropping = True
            _log.error("events are lost: %s; further ones are only counted", why)


def read_events(records: list[tuple[int, bytes]]) -> Oldest:
    """Return the events of a journal's records; what is none is logged and left out."""
    events: list[Event] = []
    for stamp, payload in records:
        try:
            events.append(unpacked(stamp, payload))
        except ValidationError as error:
            _log.error("%s: it is left out", error)
    return Oldest(events, records[-1][0] if records else 0)

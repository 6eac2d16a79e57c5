"""The queue of events: oldest first, in memory while the database answers, on disk when it does not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Literal, NamedTuple

from utils.exceptions import ValidationError
from utils.mirror.records.events import Event, Message, decode_event, encode_event
from utils.mirror.spool.journal import Journal
from utils.service import metrics

_log = logging.getLogger(__name__)

SpoolMode = Literal["outage", "always", "off"]
#: How many times as much memory a disk that is slow, and not in trouble, may cost for a moment.
SLOW = 3
#: Seconds between two marks of when events came: the accuracy of `age`.
_MARK_SECONDS = 0.1


class PendingEvents(NamedTuple):
    """The events at the front of the queue, and the stamp up to which they reach."""

    events: list[Event]
    #: Stamp of the last one, readable or not; 0 when there is none.
    upto: int


class EventQueue:
    """Events that were accepted and are not committed yet, in the order in which they came.

    `journal` None: all of them are in memory (`SPOOL=off`).
    """

    def __init__(self, journal: Journal | None, *, spool: SpoolMode, max_rows: int) -> None:
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
        return journal.failure is None

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
            if journal.unwritten >= self.max_rows * (SLOW if journal.failure is None else 1):
                self._drop(f"memory is full, and the spool takes nothing ({journal.failure or 'SPOOL_MAX_MB'})")
                return
            journal.append(event.stamp, encode_event(event))
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
                journal.append(event.stamp, encode_event(event))
        self._recent.clear()
        self._spilled = True

    async def peek(self, limit: int, after: int = 0) -> PendingEvents:
        """Return up to `limit` events with stamps after `after`; they stay in the queue until `forget`."""
        if self._spilled and self.journal is not None:
            return decode_records(await self.journal.read(after, limit))
        recent = self._recent
        later = iter(recent) if not recent or recent[0].stamp > after else (it for it in recent if it.stamp > after)
        events = list(islice(later, limit))
        return PendingEvents(events, events[-1].stamp if events else 0)

    async def discard(self, position: int) -> None:
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


def decode_records(records: list[tuple[int, bytes]]) -> PendingEvents:
    """Return the events of a journal's records; what is none is logged and left out."""
    events: list[Event] = []
    for stamp, payload in records:
        try:
            events.append(decode_event(stamp, payload))
        except ValidationError as error:
            _log.error("%s: it is left out", error)
    return PendingEvents(events, records[-1][0] if records else 0)


#: Events kept back; beyond it memory counts more than the time of a leave.
MOST = 20_000
#: Seconds between two looks whether the lease has been asked for.
LOOK_SECONDS = 0.1


class HeldEvents:
    """Keeps events back while it is open whether this process still acts.

    If it does they are told as ever. If it does not, messages are told all the same: their ids say which are counted.
    Joins and leaves are not: the time at which they were heard is wrong by as long as the process was stopped, which is
    how two processes' leaves are told apart; the one that acts has heard them, or its listing proves them.
    """

    __slots__ = ("_events", "_has_slept", "_settled", "_tell", "_timer")

    def __init__(self, tell: Callable[[Event], None], has_slept: Callable[[], bool]) -> None:
        self._tell = tell
        self._has_slept = has_slept
        self._events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self._settled.set()

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: Event) -> None:
        """Tell of an event, now or when the doubt is settled."""
        if not self._events and not self._has_slept():
            self._tell(event)
            return
        self._events.append(event)
        self._settled.clear()
        if self._timer is None:
            self._look()

    def release(self, *, is_lost: bool) -> None:
        """Settle it: `is_lost` when another process acts."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._events = self._events, []
        for event in events:
            if not is_lost or isinstance(event, Message):
                self._tell(event)
        self._settled.set()

    async def wait_released(self) -> None:
        """Wait until nothing is in doubt: for as long as the database does not answer, at most until memory is full."""
        await self._settled.wait()

    def _look(self) -> None:
        if not self._has_slept() or len(self._events) >= MOST:
            self.release(is_lost=False)
        else:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

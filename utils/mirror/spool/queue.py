"""The event queue: oldest first, in memory while the database is reachable, on disk while it is not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from utils.exceptions import ValidationError
from utils.mirror.records.events import Event, Message, decode_event, encode_event
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.segments import Record
from utils.service import metrics

_log = logging.getLogger(__name__)

SpoolMode = Literal["outage", "always", "off"]
#: How many times `max_rows` a disk that is slow, but not failing, may keep in memory for a moment.
SLOW_DISK_FACTOR = 3
#: Seconds between two samples of when events were added: the accuracy of `age`.
_AGE_SECONDS = 0.1
#: Events that `HeldEvents` keeps; beyond that, saving memory matters more than the time of a leave.
MAX_HELD = 20_000
#: Seconds between two checks whether the lease has been confirmed.
CHECK_SECONDS = 0.1


class Stamped(Protocol):
    """What a queue holds: an event, or a row of a batch."""

    @property
    def stamp(self) -> int: ...


ItemT = TypeVar("ItemT", bound=Stamped)


class Pending(NamedTuple, Generic[ItemT]):
    """Events at the front of the queue."""

    events: list[ItemT]
    #: Stamp of the last record read, valid event or not; 0 if there was none.
    upto: int


PendingEvents = Pending[Event]


class SpooledQueue(Generic[ItemT]):
    """Accepted events that are not committed yet, in the order of their arrival."""

    def __init__(
        self,
        journal: Journal | None,
        encode: Callable[[ItemT], bytes],
        decode: Callable[[int, bytes], ItemT],
        *,
        spool: SpoolMode,
        max_rows: int,
    ) -> None:
        """Create a queue; `journal` is None with `SPOOL=off`, and all events are then kept in memory.

        `encode` and `decode` turn an event into the payload of a record, and a record's stamp and payload into an event
        (or raise `ValidationError`).
        """
        self.journal: Journal | None = journal
        self.spool: SpoolMode = spool
        #: Events that memory may hold.
        self.max_rows: int = max_rows
        self._encode = encode
        self._decode = decode
        #: Stamp of the newest event; 0 if there never was one.
        self.last: int = 0
        #: Events lost because neither disk nor memory had room for them.
        self.dropped: int = 0
        self._always: bool = spool == "always" and journal is not None
        self._recent: deque[ItemT] = deque()
        #: True while the queue's contents are in the journal and not in `_recent`.
        self._spilled: bool = False
        self._is_dropping: bool = False
        #: Samples of (stamp, `time.monotonic()`) of added events.
        self._arrivals: deque[tuple[int, float]] = deque()

    def __len__(self) -> int:
        return self.journal.records if self._spilled and self.journal is not None else len(self._recent)

    @property
    def in_memory(self) -> int:
        """Events in memory, including those that the journal has yet to write."""
        return len(self._recent) + (self.journal.unwritten if self.journal is not None else 0)

    @property
    def is_crowded(self) -> bool:
        """Whether memory is more than half full and the disk accepts events, so that waiting helps."""
        journal = self.journal
        if journal is None or (len(self._recent) + journal.unwritten) * 2 <= self.max_rows:
            return False
        return journal.failure is None

    @property
    def age(self) -> float:
        """Seconds that the oldest event has waited; 0 if the queue is empty."""
        return time.monotonic() - self._arrivals[0][1] if self._arrivals else 0.0

    @property
    def is_spilled(self) -> bool:
        """Whether the queue's contents are on disk."""
        return self._spilled

    @property
    def is_full(self) -> bool:
        """Whether neither disk nor memory has room for another event: `add` would drop one."""
        journal = self.journal
        if journal is None:
            return len(self._recent) >= self.max_rows
        if not (self._always or self._spilled):
            return False
        return journal.unwritten >= self.max_rows * (SLOW_DISK_FACTOR if journal.failure is None else 1)

    def attach(self, journal: Journal) -> None:
        """Use a journal that was opened after the first events came."""
        self.journal, self._always = journal, self.spool == "always"
        if self._always:
            for event in self._recent:
                journal.append(event.stamp, self._encode(event))

    def add(self, event: ItemT) -> None:
        """Append an event; it is dropped and counted if neither disk nor memory has room.

        Raises `SpoolError` if the journal refuses it; it is not in the queue then.
        """
        journal = self.journal
        if journal is not None and (self._always or self._spilled):
            if self.is_full:
                self._drop(f"memory is full, and the spool is not writable ({journal.failure or 'SPOOL_MAX_MB'})")
                return
            journal.append(event.stamp, self._encode(event))
        self.last = event.stamp
        now = time.monotonic()
        if not self._arrivals or now - self._arrivals[-1][1] > _AGE_SECONDS:
            self._arrivals.append((event.stamp, now))
        if not self._spilled:
            self._recent.append(event)
            if len(self._recent) > self.max_rows:
                self._overflow()

    def spill(self) -> None:
        """Move the queue to disk until all of it is committed; does nothing with `SPOOL=off`."""
        journal = self.journal
        if journal is None or self._spilled:
            return
        if not self._always:
            for event in self._recent:
                journal.append(event.stamp, self._encode(event))
        self._recent.clear()
        self._spilled = True

    async def spill_at_stop(self, timeout: float) -> tuple[int, str]:
        """Move the queue to disk within `timeout` seconds; return how many events are lost, and why."""
        waiting, journal = len(self), self.journal
        self.spill()
        if journal is None:
            return waiting, "SPOOL is off" if self.spool == "off" else "there is no spool"
        if await journal.wait_written(timeout):
            return 0, ""
        return journal.volatile, journal.failure or "the disk is slow"

    async def peek(self, limit: int, after: int = 0) -> Pending[ItemT]:
        """Return up to `limit` events with stamps greater than `after`, oldest first, without removing them."""
        if self._spilled and self.journal is not None:
            return _decode_records(await self.journal.read(after, limit), self._decode)
        recent = self._recent
        later = iter(recent) if not recent or recent[0].stamp > after else (it for it in recent if it.stamp > after)
        events = list(islice(later, limit))
        return Pending(events, events[-1].stamp if events else 0)

    async def discard(self, upto: int) -> None:
        """Remove all events up to this stamp: they are committed."""
        recent, arrivals = self._recent, self._arrivals
        if recent and recent[-1].stamp <= upto:
            recent.clear()
        while recent and recent[0].stamp <= upto:
            recent.popleft()
        if self.journal is not None and self.journal.records:
            await self.journal.trim(upto)
        if self._spilled and self.journal is not None and not self.journal.records:
            self._spilled = self._is_dropping = False
        while len(arrivals) > 1 and arrivals[1][0] <= upto:
            arrivals.popleft()
        if not len(self):
            arrivals.clear()

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


class EventQueue(SpooledQueue[Event]):
    """The mirror's queue: joins, leaves, bans, and messages to be counted."""

    def __init__(self, journal: Journal | None, *, spool: SpoolMode, max_rows: int) -> None:
        super().__init__(journal, encode_event, decode_event, spool=spool, max_rows=max_rows)


def decode_records(records: list[Record]) -> PendingEvents:
    """Decode a journal's records; invalid ones are logged and skipped."""
    return _decode_records(records, decode_event)


def _decode_records(records: list[Record], decode: Callable[[int, bytes], ItemT]) -> Pending[ItemT]:
    events: list[ItemT] = []
    for stamp, payload in records:
        try:
            events.append(decode(stamp, payload))
        except ValidationError as error:
            _log.error("journal record skipped: %s", error, extra={"stamp": stamp})
    return Pending(events, records[-1][0] if records else 0)


class HeldEvents:
    """Holds events back while it is unknown whether this process still owns the lease, after it was suspended.

    If it does, all of them are passed on. If another process took over, only messages are passed on: their ids prevent
    double counting. Joins and leaves are dropped: the time at which this process received them is wrong by the length
    of the suspension, and the other process has received them itself or finds them in its listing.
    """

    __slots__ = ("_check_seconds", "_deliver", "_events", "_has_slept", "_max_held", "_released", "_timer")

    def __init__(
        self,
        deliver: Callable[[Event], None],
        has_slept: Callable[[], bool],
        *,
        max_held: int = MAX_HELD,
        check_seconds: float = CHECK_SECONDS,
    ) -> None:
        self._deliver = deliver
        self._has_slept = has_slept
        self._max_held = max_held
        self._check_seconds = check_seconds
        self._events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._released = asyncio.Event()
        self._released.set()

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: Event) -> None:
        """Deliver an event now, or hold it until `release`."""
        if not self._events and not self._has_slept():
            self._deliver(event)
            return
        self._events.append(event)
        self._released.clear()
        if self._timer is None:
            self._check()

    def release(self, *, is_lost: bool) -> None:
        """Deliver the held events; with `is_lost` (another process owns the lease) only messages."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._events = self._events, []
        for event in events:
            if not is_lost or isinstance(event, Message):
                self._deliver(event)
        self._released.set()

    async def wait_released(self) -> None:
        """Wait until no event is held: until the database answers, at most until `max_held` events wait."""
        await self._released.wait()

    def _check(self) -> None:
        if not self._has_slept() or len(self._events) >= self._max_held:
            self.release(is_lost=False)
        else:
            self._timer = asyncio.get_running_loop().call_later(self._check_seconds, self._check)

"""The one write path: what waits in buffer and queue and what listings proved, committed together, batch by batch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import stamina

from utils.database import Pool
from utils.exceptions import DatabaseUnavailable, GuildbookError, LeaseLost, SyncError
from utils.mirror.records.events import Event
from utils.mirror.records.rows import Absence, Group, Observation, Row
from utils.mirror.spool.queue import EventQueue, HeldEvents
from utils.mirror.write.apply import Batch, Told, Written, apply
from utils.mirror.write.buffer import Buffer
from utils.mirror.write.dead_letters import is_about_rows
from utils.mirror.write.isolation import write_isolated
from utils.mirror.write.overlay import LiveOverlay
from utils.service import metrics
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Records of listings in one transaction.
BATCH_RECORDS = 4_000
#: Events in one transaction.
BATCH_EVENTS = 5_000
#: Seconds for the disk to take what still waits at the end.
SPOOL_SECONDS = 3.0
#: Seconds between two flushes that their size brings about: larger ones cost less an event.
APART_SECONDS = 0.05
#: Part of the memory that is made free at once when it is full.
ROOM = 0.05


class FlushPolicy(NamedTuple):
    """When rows are written, and when it is tried again; times are seconds."""

    flush_rows: int = 500
    flush_seconds: float = 1.0
    retry_seconds: float = 0.2
    #: The pause between two tries grows up to this.
    retry_max_seconds: float = 5.0


class MirrorWriter:
    """Owns the buffer and the queue and writes them, together with small listings, in order and one at a time.

    `on_lost` is called when another process was found to act; `on_dropped` with guilds whose members had to be given up
    for want of memory, once the database takes rows again. `has_slept` tells whether another process may act since this
    one was stopped. `on_written` is called after each commit with the tables that it may have changed.
    """

    def __init__(
        self,
        database: Pool,
        fence: Fence,
        queue: EventQueue,
        rhythm: FlushPolicy,
        *,
        on_lost: Callable[[], None],
        on_dropped: Callable[[set[int]], None],
        has_slept: Callable[[], bool] = lambda: False,
        on_written: Callable[[frozenset[str]], None] = lambda _: None,
    ) -> None:
        self.database: Pool = database
        self.fence: Fence = fence
        self.queue: EventQueue = queue
        self.rhythm: FlushPolicy = rhythm
        self.buffer: Buffer = Buffer(flush_rows=rhythm.flush_rows, flush_seconds=rhythm.flush_seconds)
        self.touched: LiveOverlay = LiveOverlay()
        #: Held by whoever is in a transaction that writes mirrored tables.
        self.writing: asyncio.Lock = asyncio.Lock()
        #: Held by whoever is in a transaction that writes users; taken last, and for that transaction alone.
        self.users_writing: asyncio.Lock = asyncio.Lock()
        #: Events and rows committed, and rows given up for want of memory, since the start.
        self.events_written: int = 0
        self.rows_written: int = 0
        self.rows_dropped: int = 0
        self._doubtful = HeldEvents(self._queue, has_slept)
        #: Takes an event.
        self.tell: Callable[[Event], None] = self._doubtful.add
        self._on_lost = on_lost
        self._on_dropped = on_dropped
        #: Called after each commit with the tables that may have changed.
        self.on_written = on_written
        self._observations: deque[Observation] = deque()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        #: Whether more events wait than one transaction takes.
        self._is_behind = False
        #: Whether events that the queue still has may be committed: an answer was lost.
        self._in_doubt = True
        self._dropped_guilds: set[int] = set()
        #: `time.monotonic()` of the last commit.
        self._flushed_at: float = 0.0
        #: Size of the buffer below which nothing can be dropped any more.
        self._undroppable = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be written."""
        return not (len(self.buffer) or len(self.queue) or self._observations)

    def start(self) -> None:
        """Start to write."""
        self._task = asyncio.create_task(self._run(), name="mirror-writer")

    async def stop(self, timeout: float, *, flush: bool = True) -> None:
        """Write what still waits, for at most `timeout` seconds, and leave the rest of the events to the disk.

        Without `flush` nothing more is written: another process acts.
        """
        self._stopping = True
        self._doubtful.release(is_lost=not flush)
        self.buffer.release_all()
        self.buffer.wake()
        if self._task is not None:
            if not flush:
                self._task.cancel()
            await asyncio.wait({self._task}, timeout=timeout)
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=1.0)
        for observation in self._observations:
            observation.done.cancel()
            self.touched.close(observation)
        if len(self.buffer):
            _log.warning("%s rows could not be written: the next start's reconcile restores them", len(self.buffer))
        if len(self.queue):
            await self._leave_to_disk()

    async def _leave_to_disk(self) -> None:
        waiting, journal = len(self.queue), self.queue.journal
        self.queue.spill()
        if journal is not None and await journal.wait_written(SPOOL_SECONDS):
            _log.warning("%s events could not be written: they are in the spool, for the next start", waiting)
        else:
            lost = waiting if journal is None else journal.unwritten
            why = "SPOOL is off" if journal is None else journal.failure or "the disk is slow"
            _log.error("%s of %s events that could not be written are lost: %s", lost, waiting, why)

    def put(self, row: Row, stamp: int) -> None:
        """Take a live observation."""
        self.buffer.put(row, stamp)
        self.touched.add(row, stamp)
        self._make_room()

    def _queue(self, event: Event) -> None:
        queue = self.queue
        queue.add(event)
        waiting = len(queue)
        if waiting >= self.rhythm.flush_rows:
            self.buffer.wake()
            if waiting >= queue.max_rows:
                self._make_room()

    def submit(self, observation: Observation) -> asyncio.Future[None]:
        """Take an observation to be written; the future ends with the commit, or with why there was none.

        What comes live from now on beats it.
        """
        self.touched.open(observation, people=observation.has_people)
        self._observations.append(observation)
        self.buffer.wake()
        return observation.done

    async def flush(self) -> None:
        """Write what waits now; raises `DatabaseError` when it cannot be written."""
        async with self.writing:
            await self._commit([])
        while self._is_behind:
            async with self.writing:
                await self._commit([])

    async def flush_before(self) -> None:
        """Write what waits in the buffer; the caller holds `writing`."""
        await self._commit([])

    def again(self, guild_id: int, stamp: int) -> None:
        """Say again what live events after `stamp` said of rows that a listing has only now brought."""
        self.buffer.give_back(dict(self.touched.again(guild_id, stamp)))

    # --- the loop

    async def _run(self) -> None:
        rhythm = self.rhythm
        try:
            while not (self._stopping and self.is_idle):
                if not (self._stopping or self._observations or self._is_behind):
                    await self.buffer.due()
                    await self._keep_apart()
                if self.is_idle:
                    continue
                async for attempt in stamina.retry_context(
                    on=self._worth_another_try, attempts=None, timeout=None,
                    wait_initial=rhythm.retry_seconds, wait_max=rhythm.retry_max_seconds,
                    wait_jitter=rhythm.retry_seconds,
                ):  # fmt: skip
                    with attempt:
                        await self._write_next(attempt.num)
        except LeaseLost as error:
            _log.error("%s: nothing more is written", error)
            self._on_lost()

    async def _keep_apart(self) -> None:
        """Wait a little when the last flush was a moment ago, unless memory fills or somebody waits for a row."""
        wait = self._flushed_at + APART_SECONDS - time.monotonic()
        queue = self.queue
        if wait > 0 and not (self._stopping or self._observations or queue.in_memory * 4 > queue.max_rows):
            await asyncio.sleep(wait)

    def _worth_another_try(self, error: BaseException) -> bool:
        if not isinstance(error, Exception) or isinstance(error, LeaseLost):
            return False  # a cancellation, or another process acts: the writer is to end
        if isinstance(error, DatabaseUnavailable):
            self.queue.spill()
        _log.warning(
            "%s rows and %s events wait, the database cannot take them: %s", len(self.buffer), len(self.queue), error,
            exc_info=None if isinstance(error, GuildbookError) else error,
        )  # fmt: skip
        metrics.flush_failures.inc()
        return True

    async def _write_next(self, attempt: int) -> None:
        observations = self._next_observations()
        try:
            await self._write(observations)
            observations.clear()
        except Exception as error:
            # No row at fault (an outage, a missing table, a right withdrawn): all is held until that is mended.
            if not is_about_rows(error):
                raise
            await write_isolated(self, observations)
        finally:
            self._observations.extendleft(reversed(observations))
        if attempt > 1:
            _log.info("the database takes rows again")

    async def _write(self, observations: list[Observation]) -> None:
        async with self.writing:
            await self._commit(observations)
        for observation in observations:
            self.end(observation, None)

    def _next_observations(self) -> list[Observation]:
        taken: list[Observation] = []
        size = 0
        while self._observations and size < BATCH_RECORDS:
            observation = self._observations.popleft()
            if observation.has_people and not self.touched.knows_since(observation.stamp):
                self.end(observation, SyncError(f"guild {observation.guild_id}: too much changed while it waited"))
                continue
            taken.append(observation)
            size += observation.size
        return taken

    def end(self, observation: Observation, error: Exception | None) -> None:
        """Tell whoever waits for an observation how it ended: `error` None, it is committed."""
        if error is None:
            self.again(observation.guild_id, observation.stamp)
        self.touched.close(observation)
        if observation.done.done():
            return
        if error is None:
            observation.done.set_result(None)
        else:
            observation.done.set_exception(error)

    async def _commit(self, observations: list[Observation]) -> None:
        await self._doubtful.wait_released()  # a row without the event that goes with it would prove what was heard
        entries, newest = self.buffer.take(), self.queue.last
        try:
            told = await self.told()
            while told is not None and self._is_behind and told.upto < newest:
                # More than one transaction takes: rows wait for the events that go with them.
                self.count(await apply(self.database, Batch(told=told), self.fence))
                self._in_doubt = True
                await self.queue.discard(told.upto)
                self._in_doubt = False
                told = await self.told()
            batch = Batch(entries=entries, told=told)
            for observation in observations:
                batch.groups += self.older_than_live(observation)
                batch.absences += self.sparing_live(observation)
                if observation.run is not None:
                    batch.runs.append(observation.run)
                if observation.ready is not None:
                    batch.ready.append((*observation.ready, observation.stamp))
            with metrics.flush_seconds.time():
                written = await apply(self.database, batch, self.fence, self.users_writing)
        except BaseException:
            self._in_doubt = True
            self.buffer.give_back(entries)
            self._make_room()
            raise
        self._flushed_at = time.monotonic()
        self.count(written)
        if batch.told is not None:
            self._in_doubt = True  # until it is forgotten
            await self.queue.discard(batch.told.upto)
        self._in_doubt = False

    async def told(self) -> Told | None:
        """Return the events at the front of the queue; None when there is none."""
        if not len(self.queue):
            self._is_behind = False
            return None
        oldest = await self.queue.peek(BATCH_EVENTS)
        self._is_behind = len(oldest.events) == BATCH_EVENTS
        return Told(self.fence.holder, oldest.events, oldest.upto, self._in_doubt) if oldest.upto else None

    def older_than_live(self, observation: Observation) -> Iterator[Group]:
        """Split an observation's groups: of rows touched live since, only what nobody spoke of may be written."""
        for group in observation.groups:
            scope = 0 if group.table == "users" else observation.guild_id
            yield from self.touched.behind(group, scope, observation.stamp)

    def sparing_live(self, observation: Observation) -> list[Absence]:
        """Return an observation's absences without those who were touched live since."""
        return [
            absence._replace(
                present={*absence.present, *self.touched.since(absence.table, absence.guild_id, absence.stamp)}
            )
            for absence in observation.absences
        ]

    def count(self, written: Written) -> None:
        """Count what was committed; the database takes rows, so what had to be dropped can be restored."""
        self.events_written += written.events
        self.rows_written += written.total
        metrics.events_written.inc(written.events)
        for counter in (written.inserted, written.updated, written.removed):
            for table, rows in counter.items():
                metrics.rows_written.labels(table).inc(rows)
        if tables := written.tables:
            self.on_written(tables)
        self._undroppable = 0
        if self._dropped_guilds:
            guilds, self._dropped_guilds = self._dropped_guilds, set()
            self._on_dropped(guilds)

    def _make_room(self) -> None:
        """Drop the members that have waited longest when memory is full: a reconcile restores them."""
        most = self.queue.max_rows
        over = len(self.buffer) + self.queue.in_memory - most
        if over <= 0 or len(self.buffer) <= self._undroppable:
            return
        rows, guilds = self.buffer.drop_oldest(over + int(most * ROOM))
        self.touched.give_up_people()
        self._undroppable = 0 if rows else len(self.buffer)
        if rows and not self._dropped_guilds:
            _log.error("memory is full (BUFFER_MAX_ROWS): rows are dropped, a reconcile will restore them")
        self._dropped_guilds |= guilds
        self.rows_dropped += rows
        metrics.dropped.labels("row").inc(rows)

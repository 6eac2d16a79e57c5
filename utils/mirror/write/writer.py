"""The one write path: commits events, buffered rows and observations in order, one batch at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from typing import NamedTuple

import stamina

from utils.database import Pool
from utils.exceptions import DatabaseUnavailable, GuildbookError, LeaseLost, SyncError
from utils.mirror.records.events import Event
from utils.mirror.records.rows import Absence, Group, Observation, Row
from utils.mirror.spool.queue import EventQueue, HeldEvents
from utils.mirror.write.batch import Batch, EventBatch, WriteCounts, write_batch
from utils.mirror.write.buffer import Buffer
from utils.mirror.write.dead_letters import may_be_row_error, write_isolated
from utils.mirror.write.live_events import LiveEvents
from utils.mirror.write.overlay import LiveOverlay
from utils.service import metrics
from utils.service.lease import Fence
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: Seconds for the disk to take what is still queued when the writer stops.
SPOOL_SECONDS = 3.0
#: Seconds for what is being written to end once it is cancelled.
CANCEL_SECONDS = 2.0
#: Share of the memory limit that is freed at once when it is reached.
FREED_SHARE = 0.05


class FlushPolicy(NamedTuple):
    """When rows and events are written, how many in one transaction, and when a failed write is retried."""

    #: A flush is due when this many rows or events wait, or this many seconds after the last one.
    flush_rows: int = 500
    flush_seconds: float = 1.0
    #: Seconds between two flushes that are due by size: larger transactions cost less for each event.
    spacing_seconds: float = 0.05
    #: Seconds before the first retry of a failed write; the delay doubles up to the maximum.
    retry_seconds: float = 0.2
    retry_max_seconds: float = 5.0
    #: Events in one transaction.
    transaction_events: int = 5_000
    #: Records of observations in one transaction.
    transaction_records: int = 4_000
    #: Seconds between two searches for journals of processes that have ended.
    replay_seconds: float = 5.0

    def attempts(self, should_retry: Callable[[Exception], bool]) -> AsyncIterable[stamina.Attempt]:
        """Return the attempts at a write, without end; `should_retry` is called with each error."""
        return stamina.retry_context(
            on=should_retry, attempts=None, timeout=None, wait_initial=self.retry_seconds,
            wait_max=self.retry_max_seconds, wait_jitter=self.retry_seconds,
        )  # fmt: skip


class MirrorWriter:
    """Owns the buffer and the event queue, and writes them in order, together with small observations.

    `on_lost` is called when another process was found to hold the lease. `on_dropped` is called with the guilds whose
    members were dropped because memory was full, once the database takes rows again. `has_slept` returns whether this
    process was suspended for so long that another one may hold the lease. `on_written` is called after each commit with
    the tables that it may have changed. `live_events` hands on what dispatches changed; None if nobody wants it.
    """

    def __init__(
        self,
        pool: Pool,
        fence: Fence,
        queue: EventQueue,
        policy: FlushPolicy,
        *,
        on_lost: Callable[[], None],
        on_dropped: Callable[[set[int]], None],
        has_slept: Callable[[], bool] = lambda: False,
        on_written: Callable[[frozenset[str]], None] = lambda _: None,
        live_events: LiveEvents | None = None,
    ) -> None:
        self.pool: Pool = pool
        self.fence: Fence = fence
        self.queue: EventQueue = queue
        self.policy: FlushPolicy = policy
        self.buffer: Buffer = Buffer(flush_rows=policy.flush_rows, flush_seconds=policy.flush_seconds)
        self.overlay: LiveOverlay = LiveOverlay()
        #: Held during every transaction that writes mirrored tables.
        self.write_lock: asyncio.Lock = asyncio.Lock()
        #: Held during every transaction that writes users; acquired last, and for that transaction alone.
        self.users_lock: asyncio.Lock = asyncio.Lock()
        #: Events and rows committed, and rows dropped because memory was full, since the start.
        self.events_written: int = 0
        self.rows_written: int = 0
        self.rows_dropped: int = 0
        self._held_events = HeldEvents(self._queue_event, has_slept)
        #: Accept an event.
        self.add_event: Callable[[Event], None] = self._held_events.add
        self._on_lost = on_lost
        self._on_dropped = on_dropped
        self.on_written = on_written
        self.live_events: LiveEvents | None = live_events
        self._observations: deque[Observation] = deque()
        #: Observations that are not committed yet: those that wait and those that are being written.
        self._unfinished: set[Observation] = set()
        #: Futures of `wait_committed`.
        self._waiters: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        #: Whether more events wait than fit into one transaction.
        self._is_behind = False
        #: Whether the queue may hold events that are committed: a commit was not confirmed.
        self._may_be_committed = True
        self._dropped_guilds: set[int] = set()
        #: `time.monotonic()` of the last commit.
        self._flushed_at: float = 0.0
        #: Why the last write failed, and `time.monotonic()` of the first failure since one succeeded.
        self._error: Exception | None = None
        self._refused_at: float = 0.0
        #: Buffer size at which nothing could be dropped any more; 0 if unknown.
        self._undroppable_rows = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be written, and nobody for a commit."""
        return not (len(self.buffer) or len(self.queue) or self._observations or self._waiters)

    def delay(self) -> tuple[float, str] | None:
        """Return for how many seconds rows or events have been refused, and the last error; None if they are not."""
        if self._error is None:
            return None
        return time.monotonic() - self._refused_at, str(self._error)

    # --- what comes in

    def put(self, row: Row, stamp: int) -> None:
        """Accept a live row, from a dispatch."""
        self.buffer.put(row, stamp)
        self.overlay.add(row, stamp)
        self._free_memory()

    def submit(self, observation: Observation) -> asyncio.Future[None]:
        """Accept an observation; the future is done with the commit, or fails with the reason why there was none.

        Live rows that come from now on are newer than the observation.
        """
        self.overlay.open(observation, people=observation.has_people)
        self._observations.append(observation)
        self._unfinished.add(observation)
        self.buffer.request_flush()
        return observation.done

    async def wait_committed(self, guild_id: int) -> None:
        """Wait until what was accepted for a guild before the call is committed, or stored as dead letters.

        Has no limit of its own: it lasts as long as the database takes no rows. Raises what prevented the commit of an
        observation, and `SyncError` when the writer stops.
        """
        observed = [each.done for each in self._unfinished if each.guild_id in (0, guild_id)]
        while True:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            self.buffer.request_flush()
            try:
                await waiter
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
            if guild_id not in self.buffer.held_guilds:
                break
            await asyncio.sleep(self.policy.spacing_seconds)  # members wait for the COPY of their guild
        for done in observed:
            await asyncio.wait((done,))
            if done.cancelled():
                raise SyncError(f"guild {guild_id}: what was received before was not written: the bot stops")
            done.result()

    def _release_waiters(self, waiters: Iterable[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            if not waiter.done():
                waiter.set_result(None)

    def _queue_event(self, event: Event) -> None:
        queue = self.queue
        queue.add(event)
        waiting = len(queue)
        if waiting >= self.policy.flush_rows:
            self.buffer.request_flush()
            if waiting >= queue.max_rows:
                self._free_memory()

    def _free_memory(self) -> None:
        """Drop the oldest members when memory is full: a reconcile restores them."""
        limit = self.queue.max_rows
        excess = len(self.buffer) + self.queue.in_memory - limit
        if excess <= 0 or len(self.buffer) <= self._undroppable_rows:
            return
        rows, guilds = self.buffer.drop_oldest_members(excess + int(limit * FREED_SHARE))
        self.overlay.forget_people()
        self._undroppable_rows = 0 if rows else len(self.buffer)
        if rows and not self._dropped_guilds:
            _log.error("memory is full (BUFFER_MAX_ROWS): dropping rows; a reconcile will restore them")
        self._dropped_guilds |= guilds
        self.rows_dropped += rows
        metrics.dropped.labels("row").inc(rows)

    # --- start and stop

    def start(self) -> None:
        """Start writing."""
        self._task = asyncio.create_task(self._keep_writing(), name="mirror-writer")

    async def stop(self, timeout: float, *, flush: bool = True) -> None:
        """Write what waits, for at most `timeout` seconds, and leave the remaining events to the spool.

        Without `flush` nothing more is written: another process holds the lease.
        """
        self._stopping = True
        self._held_events.release(is_lost=not flush)
        self.buffer.release_all()
        self.buffer.request_flush()
        if self._task is not None:
            if flush:
                await asyncio.wait({self._task}, timeout=timeout)
            await cancel_and_wait((self._task,), CANCEL_SECONDS)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(SyncError("what was received before was not written: the bot stops"))
        self._waiters.clear()
        for observation in self._observations:
            observation.done.cancel()
            self.overlay.close(observation)
        if len(self.buffer):
            _log.warning("%s rows were not written; the next start's reconcile restores them", len(self.buffer))
        if len(self.queue):
            await self._spill_events()

    async def _spill_events(self) -> None:
        waiting = len(self.queue)
        lost, reason = await self.queue.spill_at_stop(SPOOL_SECONDS)
        if lost:
            _log.error("%s of %s unwritten events are lost: %s", lost, waiting, reason)
        else:
            _log.warning("%s events were not written; they are in the spool, for the next start", waiting)

    # --- the loop

    async def _keep_writing(self) -> None:
        try:
            while not (self._stopping and self.is_idle):
                if not (self._stopping or self._observations or self._is_behind):
                    await self.buffer.wait_until_due()
                    await self._space_out()
                if self.is_idle:
                    continue
                async for attempt in self.policy.attempts(self._should_retry):
                    with attempt:
                        await self._write_next(attempt.num)
        except LeaseLost as error:
            _log.error("%s; nothing more is written", error)
            self._on_lost()

    async def _space_out(self) -> None:
        """Wait if the last flush has just ended, unless memory fills up or an observation waits."""
        wait = self._flushed_at + self.policy.spacing_seconds - time.monotonic()
        queue = self.queue
        if wait > 0 and not (self._stopping or self._observations or queue.in_memory * 4 > queue.max_rows):
            await asyncio.sleep(wait)

    def _should_retry(self, error: BaseException) -> bool:
        if not isinstance(error, Exception) or isinstance(error, LeaseLost):
            return False  # cancelled, or another process holds the lease: the writer ends
        if isinstance(error, DatabaseUnavailable):
            self.queue.spill()
        if self._error is None:
            self._refused_at = time.monotonic()
        self._error = error
        _log.warning(
            "could not write to the database; %s rows and %s events wait: %s", len(self.buffer), len(self.queue),
            error, exc_info=None if isinstance(error, GuildbookError) else error,
        )  # fmt: skip
        metrics.flush_failures.inc()
        return True

    async def _write_next(self, attempt: int) -> None:
        """Commit what waits, with as many observations as fit into one transaction."""
        observations, waiters = self._next_observations(), list(self._waiters)
        try:
            async with self.write_lock:
                await self._commit(observations)
            for observation in observations:
                self.finish(observation, None)
            observations.clear()
        except Exception as error:
            # If no row can be at fault (an outage), everything waits for the retry.
            if not may_be_row_error(error):
                raise
            await write_isolated(self, observations)
            self._release_waiters(waiters)
        finally:
            self._observations.extendleft(reversed(observations))
        self._error = None
        if attempt > 1:
            _log.info("the database accepts rows again")

    def _next_observations(self) -> list[Observation]:
        observations: list[Observation] = []
        size = 0
        while self._observations and size < self.policy.transaction_records:
            observation = self._observations.popleft()
            if observation.has_people and not self.overlay.covers(observation.stamp):
                self.finish(observation, SyncError(f"guild {observation.guild_id}: too much changed while it waited"))
                continue
            observations.append(observation)
            size += observation.size
        return observations

    def finish(self, observation: Observation, error: Exception | None) -> None:
        """Resolve an observation's future: `error` None means that it is committed."""
        if error is None:
            self.reapply_live(observation.guild_id, observation.stamp)
        self.overlay.close(observation)
        self._unfinished.discard(observation)
        if observation.done.done():
            return
        if error is None:
            observation.done.set_result(None)
        else:
            observation.done.set_exception(error)

    # --- one commit

    async def flush(self) -> None:
        """Write the buffer and the queue now. Raises `DatabaseError` when they cannot be written."""
        async with self.write_lock:
            await self._commit([])
        while self._is_behind:
            async with self.write_lock:
                await self._commit([])

    async def flush_locked(self) -> None:
        """Write the buffer; the caller holds `write_lock`."""
        await self._commit([])

    def reapply_live(self, guild_id: int, stamp: int) -> None:
        """Buffer again what dispatches after `stamp` reported of rows that only a listing has inserted."""
        self.buffer.give_back(dict(self.overlay.entries_to_reapply(guild_id, stamp)))

    async def _commit(self, observations: list[Observation]) -> None:
        # A row must not be committed before its event: the merge would infer what the held event reports.
        await self._held_events.wait_released()
        entries, newest, waiters = self.buffer.take(), self.queue.last, list(self._waiters)
        try:
            if self.live_events is not None:
                self.live_events.keep_only(entries, self.buffer.held_guilds)
            events = await self.next_events()
            while events is not None and self._is_behind and events.position < newest:
                # More events than fit into one transaction: the rows wait for the last of their events.
                self.count(await write_batch(self.pool, Batch(events=events), self.fence))
                await self._forget_events(events.position)
                events = await self.next_events()
            batch = self._batch_of(observations)
            batch.entries, batch.events = entries, events
            with metrics.flush_seconds.time():
                counts = await self.write(batch)
        except BaseException:
            self._may_be_committed = True
            self.buffer.give_back(entries)
            self._free_memory()
            raise
        self._flushed_at = time.monotonic()
        self.count(counts)
        if events is not None:
            await self._forget_events(events.position)
        self._may_be_committed = False
        self._release_waiters(waiters)

    async def write(self, batch: Batch) -> WriteCounts:
        """Commit a batch and return what it changed; the caller holds `write_lock`. Raises like `write_batch`."""
        if self.live_events is not None:
            await self.live_events.prepare(batch.entries)
        counts = await write_batch(self.pool, batch, self.fence, self.users_lock)
        if self.live_events is not None:
            self.live_events.finish(batch.entries)
        return counts

    async def _forget_events(self, position: int) -> None:
        self._may_be_committed = True  # until the queue has forgotten them
        await self.queue.discard(position)
        self._may_be_committed = False

    def _batch_of(self, observations: list[Observation]) -> Batch:
        batch = Batch()
        for observation in observations:
            batch.groups += self.without_stale_columns(observation)
            batch.absences += self.absences_without_live(observation)
            if observation.run is not None:
                batch.runs.append(observation.run)
            if observation.ready is not None:
                batch.ready.append((*observation.ready, observation.stamp))
        return batch

    async def next_events(self) -> EventBatch | None:
        """Return the events at the front of the queue; None when it is empty."""
        if not len(self.queue):
            self._is_behind = False
            return None
        limit = self.policy.transaction_events
        oldest = await self.queue.peek(limit)
        self._is_behind = len(oldest.events) == limit
        if not oldest.upto:
            return None
        return EventBatch(self.fence.holder, oldest.events, oldest.upto, self._may_be_committed)

    def without_stale_columns(self, observation: Observation) -> Iterator[Group]:
        """Return an observation's groups without the columns that dispatches have named since it was requested."""
        for group in observation.groups:
            guild_id = 0 if group.table == "users" else observation.guild_id
            yield from self.overlay.split_stale(group, guild_id, observation.stamp)

    def absences_without_live(self, observation: Observation) -> list[Absence]:
        """Return an observation's absences, with the rows that dispatches have named since counted as present."""
        return [
            absence._replace(
                present={*absence.present, *self.overlay.touched_since(absence.table, absence.guild_id, absence.stamp)}
            )
            for absence in observation.absences
        ]

    def count(self, counts: WriteCounts) -> None:
        """Count what was committed, and ask for the rows that were dropped: the database takes rows again."""
        self.events_written += counts.events
        self.rows_written += counts.total
        metrics.events_written.inc(counts.events)
        for counter in (counts.inserted, counts.updated, counts.removed):
            for table, rows in counter.items():
                metrics.rows_written.labels(table).inc(rows)
        if tables := counts.tables:
            self.on_written(tables)
        self._undroppable_rows = 0
        if self._dropped_guilds:
            guilds, self._dropped_guilds = self._dropped_guilds, set()
            self._on_dropped(guilds)

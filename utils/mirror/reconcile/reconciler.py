"""Reconciles guilds: requests complete member listings, over REST and the gateway at once, and writes them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple

from utils.exceptions import GuildbookError, SyncError
from utils.mirror.discord.source import DiscordSource
from utils.mirror.reconcile.guild_queue import GuildQueue, GuildState
from utils.mirror.reconcile.listing import Listing, PageSink
from utils.mirror.reconcile.staging import USER_BATCH_PAGES, StagedListing
from utils.mirror.records.rows import Absence, Group, Mode, Observation, Run, Stamps
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page
from utils.mirror.write.batch import HISTORY_TABLES, insert_sync_run
from utils.mirror.write.dead_letters import may_be_row_error
from utils.mirror.write.writer import MirrorWriter
from utils.retrying import backoff_seconds
from utils.service import metrics
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

REST_WORKERS = 8
GATEWAY_WORKERS = 3
#: Large listings written at once: each holds two connections.
STAGED_AT_ONCE = 2
#: Listings of up to this many pages are written as one small batch; larger ones go through staging.
SMALL_PAGES = 2
#: Gateway commands of the current minute reserved for guilds that only op 8 suits.
RESERVED_COMMANDS = 20
#: New members of one guild after which the tables are analysed. Measured on 2,000,000 members that were never analysed:
#: a merge of 1,000 rows took 450 ms, and 14 ms afterwards.
ANALYZE_ROWS = 5_000
ANALYZE_SECONDS = 300.0


class ReconcilePolicy(NamedTuple):
    """How member lists are requested, and when a failed reconcile is retried; times are seconds."""

    #: How long to wait for the next page of a listing over the gateway.
    page_timeout: float = 10.0
    #: Pause between two full member requests of one guild; Discord allows one in 30 seconds.
    cooldown: float = 30.0
    #: Delay before the first retry of a failed reconcile; it doubles up to the maximum.
    retry_seconds: float = 2.0
    retry_max_seconds: float = 300.0
    #: Pages of a large listing after which its users are merged and committed.
    user_batch_pages: int = USER_BATCH_PAGES
    #: Archived threads: requests in a second, and the delay before a failed guild is retried, likewise.
    thread_requests_per_second: int = 20
    thread_retry_seconds: float = 5.0
    thread_retry_max_seconds: float = 600.0
    #: From a change of permissions until it is checked whether archived threads can be read now.
    permissions_seconds: float = 1.0


class Reconciler:
    """Runs the reconciles of all guilds, small ones first, and retries those that failed."""

    def __init__(
        self,
        writer: MirrorWriter,
        source: DiscordSource,
        stamps: Stamps,
        policy: ReconcilePolicy,
        *,
        open_sink: Callable[[int, int], PageSink | None] = lambda guild_id, stamp: None,
    ) -> None:
        """`open_sink` returns what also gets the pages of a listing, given its guild id and stamp."""
        self.policy = policy
        self.queue: GuildQueue = GuildQueue(
            cooldown=policy.cooldown, rest_workers=REST_WORKERS, members_page=source.members_page
        )
        self.guilds: dict[int, GuildState] = {}
        #: Listings that the gateway answers, by nonce.
        self.listings: dict[str, Listing] = {}
        self._writer = writer
        self._source = source
        self._stamps = stamps
        self._open_sink = open_sink
        pool = writer.pool
        # Staging takes two connections for each listing, and the flush between them a third one.
        self._can_stage: bool = not pool.target.pooled and pool.pool_max > 2
        self._staging_slots = asyncio.Semaphore(max(1, min(STAGED_AT_ONCE, (pool.pool_max - 1) // 2)))
        self._analyze_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    # --- for the mirror

    def start(self) -> None:
        """Start the lanes."""
        for _ in range(REST_WORKERS):
            self.spawn(self._rest_lane())
        for _ in range(GATEWAY_WORKERS):
            self.spawn(self._gateway_lane())

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a coroutine in the background until `stop`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_unexpected_end)

    async def stop(self) -> None:
        """Cancel every reconcile; nothing is tombstoned."""
        while running := {task for task in self._tasks if not task.done()}:  # ending may start others
            await cancel_and_wait(running)

    async def wait_until_idle(self) -> None:
        """Wait until no reconcile runs and none waits."""
        await self._idle.wait()

    def request(self, state: GuildState, reason: str, *, delay: float = 0.0) -> None:
        """Request a reconcile of a guild, `delay` seconds from now."""
        self._idle.clear()
        self.spawn(self._enqueue(state, reason, delay))

    async def sync(self, guild_id: int) -> Run:
        """Reconcile one guild now and return the finished run. Raises `SyncError` if it fails."""
        state = self.guilds.get(guild_id)
        if state is None or not state.available:
            raise SyncError(f"guild {guild_id} cannot be read now: the bot is not in it, or Discord has an outage")
        waiter: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
        state.waiters.append(waiter)
        self.request(state, "request")
        return await waiter

    async def wait_reconciled(self, guild_id: int) -> None:
        """Wait until a guild has been reconciled in this session, without requesting anything.

        Raises `SyncError` if the bot is not in it, Discord has an outage, or the next attempt fails.
        """
        state = self.guilds.get(guild_id)
        if state is None or not state.available:
            raise SyncError(f"guild {guild_id} cannot be read now: the bot is not in it, or Discord has an outage")
        if not state.is_reconciled:
            waiter: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
            state.waiters.append(waiter)
            await waiter

    def cancel(self, state: GuildState, reason: str) -> None:
        """End a guild's reconcile and fail its waiters; nothing is tombstoned."""
        error = SyncError(f"guild {state.id}: {reason}")
        self.queue.remove(state)
        if state.listing is not None:
            state.listing.fail(error)
        _resolve_waiters(state, error)
        self._update_idle()

    def progress(self) -> Counter[str]:
        """Return how many guilds are available, unavailable, reconciled, waiting and running."""
        states = [state for state in self.guilds.values() if state.available]
        return Counter(
            available=len(states),
            unavailable=len(self.guilds) - len(states),
            reconciled=sum(state.is_reconciled and state.has_snapshot for state in states),
            waiting=len(self.queue),
            running=self._running,
        )

    def is_current(self, state: GuildState) -> bool:
        """Return whether a guild is still available in the same session."""
        return state.available and self.guilds.get(state.id) is state

    async def _enqueue(self, state: GuildState, reason: str, delay: float) -> None:
        if delay:
            await asyncio.sleep(delay)
        if self.is_current(state):
            await self.queue.add(state, reason)
        self._update_idle()

    def _update_idle(self) -> None:
        metrics.guilds_waiting.set(len(self.queue))
        if not self._running and not len(self.queue):
            self._idle.set()

    # --- the lanes

    async def _rest_lane(self) -> None:
        while True:
            state = await self.queue.take_for_rest()
            await self._reconcile(state, "rest")

    async def _gateway_lane(self) -> None:
        while True:
            state = await self.queue.take_for_gateway(self._has_spare_commands)
            await self._reconcile(state, "gateway")

    def _has_spare_commands(self) -> bool:
        return self._source.commands_remaining > RESERVED_COMMANDS

    async def _reconcile(self, state: GuildState, source: str) -> None:
        reason, state.reason = state.reason or "request", None
        self._running += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                if source == "gateway":
                    if not self.queue.is_small(state):
                        # Wait here: pages that cannot be written yet would keep the gateway from being read.
                        await stack.enter_async_context(self._staging_slots)
                    await self._source.acquire_command(state.shard_id)
                    state.requested_at = time.monotonic()
                if self.is_current(state):  # it may have become unavailable while it waited
                    await self._run_listing(state, source, reason)
        finally:
            self._running -= 1
            await self.queue.release(state)
            self._update_idle()

    async def _run_listing(self, state: GuildState, source: str, reason: str) -> None:
        started = time.monotonic()
        listing = state.listing = self._open_listing(state, source, reason)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if source == "gateway":
                    await self._request_chunks(listing, stack)
                else:
                    reading = asyncio.create_task(self._read_rest_pages(listing))
                    stack.push_async_callback(cancel_and_wait, (reading,))
                has_slot = source == "gateway" and not self.queue.is_small(state)
                run = await self._write(listing, state, has_slot=has_slot)
        except Exception as error:  # whatever it was: this guild is retried, and the lane goes on with others
            await self._record_failure(state, listing, reason, _root_cause(error))
        else:
            self._record_success(state, run, time.monotonic() - started)
        finally:
            if listing.unreadable:
                _log.warning(
                    "%s of %s members of a listing could not be read and were left out; the first: %s",
                    len(listing.unreadable), listing.seen, listing.first_problem, extra={"guild_id": state.id},
                )  # fmt: skip
            listing.close()
            state.listing = None
            self._writer.on_written(frozenset(("users", "members", *HISTORY_TABLES)))
            self._writer.overlay.close(listing)

    # --- reading a listing

    def _open_listing(self, state: GuildState, source: str, reason: str) -> Listing:
        stamp = self._stamps.next()
        listing = Listing(
            state.id,
            stamp=stamp,
            source=source,
            reason=reason,
            started_at=self._writer.pool.now(),
            overlay=self._writer.overlay,
            on_malformed=_on_malformed_member,
            sink=self._open_sink(state.id, stamp),
        )
        self._writer.overlay.open(listing)
        return listing

    async def _request_chunks(self, listing: Listing, stack: contextlib.AsyncExitStack) -> None:
        nonce = secrets.token_hex(12)
        self.listings[nonce] = listing
        stack.callback(self.listings.pop, nonce, None)
        await self._source.request_members(listing.guild_id, nonce)

    async def _read_rest_pages(self, listing: Listing) -> None:
        try:
            pages = self._source.members(listing.guild_id)
            async for payloads, last in pages:
                await listing.wait_for_room(SMALL_PAGES)
                listing.add_page(payloads, last=last)
        except SyncError as error:
            listing.fail(error)
        except Exception as error:
            listing.fail(SyncError(f"guild {listing.guild_id}: could not read its member list: {error!r}"))

    # --- writing a listing

    async def _write(self, listing: Listing, state: GuildState, *, has_slot: bool) -> Run:
        timeout = self.policy.page_timeout if listing.source == "gateway" else self._source.timeout
        pages: list[Page] = []
        while len(pages) <= SMALL_PAGES:
            page = await listing.next_page(timeout)
            if page is None:
                return await self._write_small(listing, pages)
            pages.append(page)
        async with contextlib.nullcontext() if has_slot else self._staging_slots:
            if not self._can_stage or state.has_bad_row:
                return await self._write_page_by_page(listing, pages, timeout)
            staged = StagedListing(
                self._writer, listing, page_timeout=timeout, user_batch_pages=self.policy.user_batch_pages
            )
            run = await staged.write(pages)
        if run.rows_inserted >= ANALYZE_ROWS:
            self.spawn(self._analyze())
        self._writer.reapply_live(listing.guild_id, listing.stamp)
        return run

    async def _write_small(self, listing: Listing, pages: list[Page]) -> Run:
        run = _run_of(listing)
        present = [record[1] for page in pages for record in page.members]
        await self._writer.submit(_observation_of(listing, pages, self._absences(listing, present), run))
        return run

    async def _write_page_by_page(self, listing: Listing, pages: list[Page], timeout: float) -> Run:
        """Write a large listing without staging: each page as arrays, then what is absent.

        For poolers, through which COPY is known to hang; for a pool of two, which has no connection to spare; and
        after a bad row, which cannot be isolated among staged rows.
        """
        present: set[int] = set()
        page: Page | None
        while (page := pages.pop(0) if pages else await listing.next_page(timeout)) is not None:
            present.update(record[1] for record in page.members)
            await self._writer.submit(_observation_of(listing, [page], [], None))
        run = _run_of(listing)
        await self._writer.submit(_observation_of(listing, [], self._absences(listing, present), run))
        return run

    def _absences(self, listing: Listing, present: Iterable[int]) -> list[Absence]:
        protected = listing.protected_ids()
        if protected is None:
            _log.warning(
                "could not read the id of a member: nothing is tombstoned", extra={"guild_id": listing.guild_id}
            )
            return []
        return [Absence("members", listing.guild_id, listing.stamp, protected.union(present))]

    async def _analyze(self) -> None:
        """Refresh the planner's statistics: until autovacuum does, merges of live rows would be planned badly."""
        if self._analyze_lock.locked():
            return
        async with self._analyze_lock:
            try:
                await self._writer.pool.execute("ANALYZE users, members", timeout=ANALYZE_SECONDS)
            except GuildbookError as error:
                _log.warning("could not analyze users and members: %s", error)

    # --- outcomes

    def _record_success(self, state: GuildState, run: Run, seconds: float) -> None:
        state.failures, state.needs_rest, state.is_reconciled, state.last_run = 0, False, True, run
        metrics.sync_runs.labels(run.source, "complete").inc()
        metrics.sync_seconds.labels(run.source).observe(seconds)
        _log.info(
            "guild reconciled",
            extra={
                "guild_id": state.id,
                "source": run.source,
                "reason": run.reason,
                "seen": run.rows_seen,
                "inserted": run.rows_inserted,
                "updated": run.rows_updated,
                "left": run.rows_left,
                "seconds": round(seconds, 3),
            },
        )
        _resolve_waiters(state, run)

    async def _record_failure(self, state: GuildState, listing: Listing, reason: str, error: Exception) -> None:
        state.failures += 1
        state.needs_rest = listing.source == "gateway"
        state.has_bad_row = state.has_bad_row or may_be_row_error(error)
        metrics.sync_runs.labels(listing.source, "failed").inc()
        delay = 0.0  # REST is another way: no need to wait
        if not state.needs_rest:
            delay = backoff_seconds(
                state.failures, first=self.policy.retry_seconds, longest=self.policy.retry_max_seconds
            )
        is_current = self.is_current(state)
        announcement = f"; next attempt {'over REST ' if state.needs_rest else ''}in {delay:.1f} s"
        _log.warning(
            "guild not reconciled: %s%s",
            error,
            announcement if is_current else "",
            extra={
                "guild_id": state.id, "source": listing.source, "pages": listing.pages, "failures": state.failures,
            },
        )  # fmt: skip
        run = state.last_run = _run_of(listing)
        run.error = str(error)
        try:
            async with self._writer.pool.transaction() as connection:
                await self._writer.fence.check(connection)
                await insert_sync_run(connection, self._writer.pool, run)
        except GuildbookError as failure:
            _log.warning("could not record the failed reconcile: %s", failure, extra={"guild_id": state.id})
        if is_current:
            self.request(state, "retry", delay=delay)
        if not is_current or not state.needs_rest:  # no other way is left: tell the waiters
            _resolve_waiters(state, SyncError(str(error)))


def _resolve_waiters(state: GuildState, outcome: Run | SyncError) -> None:
    for waiter in state.waiters:
        if waiter.done():
            continue
        if isinstance(outcome, SyncError):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
    state.waiters.clear()


def _run_of(listing: Listing) -> Run:
    return Run(
        listing.guild_id,
        listing.started_at,
        listing.source,
        listing.reason,
        listing.stamp,
        pages=listing.pages,
        rows_seen=listing.seen,
    )


def _observation_of(listing: Listing, pages: list[Page], absences: list[Absence], run: Run | None) -> Observation:
    users = {record[0]: record for page in pages for record in page.users}
    members = {record[1]: record for page in pages for record in page.members}
    return Observation(
        listing.guild_id,
        listing.stamp,
        [
            Group("users", LISTED_USER_COLUMNS, Mode.MERGE, [users[id] for id in sorted(users)]),
            Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, [members[id] for id in sorted(members)]),
        ],
        absences,
        run,
    )


def _on_malformed_member(error: Exception) -> None:
    metrics.malformed_payloads.labels("member listing").inc()


def _root_cause(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _log_unexpected_end(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a background task of the mirror failed: %r", error, exc_info=error)

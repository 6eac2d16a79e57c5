"""Reconciles guilds: asks for complete listings, over two lanes at once, and writes what they prove."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from utils.exceptions import GuildbookError, SyncError
from utils.mirror.discord.source import DiscordSource
from utils.mirror.reconcile.guild_queue import GuildState, Queue
from utils.mirror.reconcile.listing import Listing
from utils.mirror.reconcile.staging import StagedListing
from utils.mirror.records.rows import Absence, Group, Mode, Observation, Run, Stamps
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page
from utils.mirror.write.apply import HISTORY, record
from utils.mirror.write.dead_letters import is_about_rows
from utils.mirror.write.writer import MirrorWriter
from utils.service import metrics

_log = logging.getLogger(__name__)

REST_WORKERS = 8
GATEWAY_WORKERS = 3
#: Large listings written at once: each holds two connections.
STAGED_AT_ONCE = 2
#: Up to so many pages are written as one small batch; more go through staging.
SMALL_PAGES = 2
#: Gateway commands of the current minute kept back for guilds that only op 8 is good for.
KEPT_FOR_LARGE = 20
#: New members of one guild after which the tables are analysed. Measured on 2,000,000 members never analysed: 450 ms a
#: merge of 1,000 rows, 14 ms afterwards.
ANALYSED_ROWS = 5_000
ANALYSE_SECONDS = 300.0
#: Seconds before the retry of a failed reconcile, doubled each time up to the second figure.
RETRY_SECONDS = 2.0
RETRY_SECONDS_MAX = 300.0


class Reconciler:
    """Runs the reconciles of all guilds, small ones first, and tries again what failed."""

    def __init__(
        self,
        writer: MirrorWriter,
        source: DiscordSource,
        stamps: Stamps,
        *,
        page_timeout: float,
        cooldown: float,
    ) -> None:
        self._writer = writer
        self._source = source
        self._stamps = stamps
        #: Seconds that the next page of a listing may be awaited.
        self.page_timeout = page_timeout
        self.queue: Queue = Queue(cooldown=cooldown, rest_workers=REST_WORKERS)
        self.guilds: dict[int, GuildState] = {}
        #: Listings that the gateway answers, by nonce.
        self.listings: dict[str, Listing] = {}
        database = writer.database
        # Staging takes two connections a listing, and the flush between them one more.
        self._stages: bool = not database.target.pooled and database.pool_max > 2
        self._staging = asyncio.Semaphore(max(1, min(STAGED_AT_ONCE, (database.pool_max - 1) // 2)))
        self._analysing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._busy = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    def start(self) -> None:
        """Start the lanes."""
        for _ in range(REST_WORKERS):
            self.spawn(self._rest_lane())
        for _ in range(GATEWAY_WORKERS):
            self.spawn(self._gateway_lane())

    def spawn(self, work: Any) -> None:
        """Run a coroutine beside the others until `stop`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_report)

    async def stop(self) -> None:
        """End every reconcile without proof."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def quiet(self) -> None:
        """Wait until no reconcile runs and none waits."""
        await self._quiet.wait()

    def request(self, state: GuildState, reason: str, *, after: float = 0.0) -> None:
        """Ask for a reconcile of a guild, `after` seconds from now."""
        self._quiet.clear()
        self.spawn(self._add(state, reason, after))

    async def sync(self, guild_id: int) -> Run:
        """Reconcile one guild now and return the finished run; `SyncError` when it failed or the guild is unknown."""
        state = self.guilds.get(guild_id)
        if state is None or not state.available:
            raise SyncError(f"guild {guild_id} cannot be read now: the bot is not in it, or Discord has an outage")
        waiter: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
        state.waiters.append(waiter)
        self.request(state, "request")
        return await waiter

    def forget(self, state: GuildState, why: str) -> None:
        """End what is under way for a guild, and tell whoever waits for it; nothing is tombstoned."""
        error = SyncError(f"guild {state.id}: {why}")
        self.queue.remove(state)
        if state.listing is not None:
            state.listing.fail(error)
        _tell(state, error)
        self._settle()

    async def _add(self, state: GuildState, reason: str, after: float) -> None:
        if after:
            await asyncio.sleep(after)
        if state.available and self.guilds.get(state.id) is state:
            await self.queue.add(state, reason)
        self._settle()

    def _settle(self) -> None:
        metrics.guilds_waiting.set(len(self.queue))
        if not self._busy and not len(self.queue):
            self._quiet.set()

    async def _rest_lane(self) -> None:
        while True:
            state = await self.queue.take_for_rest()
            await self._reconcile(state, "rest")

    async def _gateway_lane(self) -> None:
        while True:
            state = await self.queue.take_for_gateway(self._may_help)
            await self._reconcile(state, "gateway")

    def _may_help(self) -> bool:
        return self._source.commands_remaining > KEPT_FOR_LARGE

    async def _reconcile(self, state: GuildState, source: str) -> None:
        reason, state.reason = state.reason or "request", None
        self._busy += 1
        try:
            async with contextlib.AsyncExitStack() as stack:
                if source == "gateway":
                    if not state.is_small:  # pages that nobody may write yet would keep the gateway from being read
                        await stack.enter_async_context(self._staging)
                    await self._source.acquire_command(state.shard_id)
                    state.asked_at = time.monotonic()
                if self.guilds.get(state.id) is state and state.available:  # it may have gone while it waited
                    await self._list(state, source, reason)
        finally:
            self._busy -= 1
            await self.queue.done(state)
            self._settle()

    async def _list(self, state: GuildState, source: str, reason: str) -> None:
        started = time.monotonic()
        listing = state.listing = self._open(state, source, reason)
        try:
            async with contextlib.AsyncExitStack() as stack:
                if source == "gateway":
                    await self._ask(listing, stack)
                else:
                    feeding = asyncio.create_task(self._feed(listing))
                    stack.push_async_callback(_end, feeding)
                run = await self._write(listing, state, may_wait=source != "gateway" or state.is_small)
        except Exception as error:  # whatever it was, the lane has other guilds to serve, and this one is tried again
            await self._failed(state, listing, source, reason, _reason_of(error))
        else:
            self._succeeded(state, run, time.monotonic() - started)
        finally:
            listing.close()
            state.listing = None
            self._writer.on_written(frozenset(("users", "members", *HISTORY)))
            self._writer.touched.close(listing)

    def _open(self, state: GuildState, source: str, reason: str) -> Listing:
        listing = Listing(
            state.id,
            stamp=self._stamps.next(),
            source=source,
            reason=reason,
            started_at=self._writer.database.now(),
            touched=self._writer.touched,
            refuse=_refuse,
        )
        self._writer.touched.open(listing)
        return listing

    async def _ask(self, listing: Listing, stack: contextlib.AsyncExitStack) -> None:
        nonce = secrets.token_hex(12)
        self.listings[nonce] = listing
        stack.callback(self.listings.pop, nonce, None)
        await self._source.request_members(listing.guild_id, nonce)

    async def _feed(self, listing: Listing) -> None:
        try:
            pages = self._source.members(listing.guild_id)
            async for payloads, last in pages:
                await listing.room(SMALL_PAGES)
                listing.page(payloads, last=last)
        except SyncError as error:
            listing.fail(error)
        except Exception as error:
            listing.fail(SyncError(f"guild {listing.guild_id}: its member list could not be read: {error!r}"))

    async def _write(self, listing: Listing, state: GuildState, *, may_wait: bool) -> Run:
        timeout = self.page_timeout if listing.source == "gateway" else self._source.timeout
        pages: list[Page] = []
        while len(pages) <= SMALL_PAGES:
            page = await listing.next(timeout)
            if page is None:
                return await self._write_small(listing, pages)
            pages.append(page)
        async with self._staging if may_wait else contextlib.nullcontext():
            if not self._stages or state.has_bad_row:
                return await self._write_page_by_page(listing, pages, timeout)
            staged = StagedListing(self._writer, listing, page_timeout=timeout)
            run = await staged.write(pages)
        if run.rows_inserted >= ANALYSED_ROWS:
            self.spawn(self._analyse())
        self._writer.again(listing.guild_id, listing.stamp)
        return run

    async def _analyse(self) -> None:
        """Tell the planner what is there now: until autovacuum comes round, the merges of live events would guess."""
        if self._analysing.locked():
            return
        async with self._analysing:
            try:
                await self._writer.database.execute("ANALYZE users, members", timeout=ANALYSE_SECONDS)
            except GuildbookError as error:
                _log.warning("the tables could not be analysed: %s", error)

    async def _write_page_by_page(self, listing: Listing, pages: list[Page], timeout: float) -> Run:
        """Write a large listing without staging: pages as arrays, then what is absent.

        Through a pooler COPY is known to hang, a pool of two has no connection to spare, and of staged rows the bad one
        cannot be told.
        """
        run = _run_of(listing)
        present: set[int] = set()
        page: Page | None
        while (page := pages.pop(0) if pages else await listing.next(timeout)) is not None:
            present.update(record[1] for record in page.members)
            await self._writer.submit(_observed(listing, [page], [], None))
        run.pages, run.rows_seen = listing.pages, listing.seen
        await self._writer.submit(_observed(listing, [], self._absence(listing, present), run))
        return run

    def _absence(self, listing: Listing, present: Iterable[int]) -> list[Absence]:
        spared = listing.spared()
        if spared is None:
            _log.warning("a member's id could not be read: nobody is tombstoned", extra={"guild_id": listing.guild_id})
            return []
        return [Absence("members", listing.guild_id, listing.stamp, spared.union(present))]

    async def _write_small(self, listing: Listing, pages: list[Page]) -> Run:
        run = _run_of(listing)
        run.pages, run.rows_seen = listing.pages, listing.seen
        present = [record[1] for page in pages for record in page.members]
        await self._writer.submit(_observed(listing, pages, self._absence(listing, present), run))
        return run

    def _succeeded(self, state: GuildState, run: Run, seconds: float) -> None:
        state.failures, state.rest_next, state.is_reconciled, state.last_run = 0, False, True, run
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
        _tell(state, run)

    async def _failed(self, state: GuildState, listing: Listing, source: str, reason: str, error: Exception) -> None:
        state.failures += 1
        state.rest_next = source == "gateway"
        state.has_bad_row = state.has_bad_row or is_about_rows(error)
        metrics.sync_runs.labels(source, "failed").inc()
        wait = 0.0 if state.rest_next else min(RETRY_SECONDS * 2 ** (state.failures - 1), RETRY_SECONDS_MAX)
        wait *= random.uniform(0.8, 1.2)
        _log.warning(
            "guild not reconciled: %s; next try %sin %.1f s",
            error,
            "over REST " if state.rest_next else "",
            wait,
            extra={"guild_id": state.id, "source": source, "pages": listing.pages, "failures": state.failures},
        )
        run = _run_of(listing)
        run.error = str(error)
        run.pages, run.rows_seen = listing.pages, listing.seen
        state.last_run = run
        try:
            async with self._writer.database.transaction() as connection:
                await self._writer.fence.check(connection)
                await record(connection, self._writer.database, run)
        except GuildbookError as trouble:
            _log.warning("the failed reconcile could not be recorded: %s", trouble, extra={"guild_id": state.id})
        is_there = self.guilds.get(state.id) is state and state.available
        if is_there:
            self.request(state, "retry", after=wait)
        if not is_there or not state.rest_next:  # both ways were tried: whoever waits hears of it
            _tell(state, SyncError(str(error)))

    def progress(self) -> Counter[str]:
        """Return how many guilds are available, not available, reconciled, waiting and running."""
        states = [state for state in self.guilds.values() if state.available]
        return Counter(
            available=len(states),
            unavailable=len(self.guilds) - len(states),
            reconciled=sum(state.is_reconciled and state.has_snapshot for state in states),
            waiting=len(self.queue),
            running=self._busy,
        )


def _tell(state: GuildState, outcome: Run | SyncError) -> None:
    for waiter in state.waiters:
        if waiter.done():
            continue
        if isinstance(outcome, SyncError):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
    state.waiters.clear()


def _run_of(listing: Listing) -> Run:
    return Run(listing.guild_id, listing.started_at, listing.source, listing.reason, listing.stamp)


def _observed(listing: Listing, pages: list[Page], absences: list[Absence], run: Run | None) -> Observation:
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


def _refuse(error: Exception) -> None:
    metrics.malformed_payloads.labels("member listing").inc()
    _log.warning("a member was left out of a listing: %s", error)


def _reason_of(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _report(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("a task of the reconcile ended: %r", error, exc_info=error)

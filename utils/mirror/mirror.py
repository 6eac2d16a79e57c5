"""The mirror: receives dispatches of the gateway and keeps the tables equal to Discord's state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.exceptions import SyncError
from utils.logs import log_once
from utils.mirror.batches import Batches
from utils.mirror.discord.member_cache import LiveRows, MemberCache
from utils.mirror.discord.source import DiscordSource
from utils.mirror.reconcile.archived_threads import ArchivedThreads
from utils.mirror.reconcile.guild_queue import GuildState
from utils.mirror.reconcile.listing import PageSink
from utils.mirror.reconcile.reconciler import ReconcilePolicy, Reconciler
from utils.mirror.records.rows import Mode, Observation, ReadyGuilds, Row, Run, Stamps
from utils.mirror.records.validation import validate_row
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate import objects
from utils.mirror.translate.live import MEMBERSHIP_PARSERS, ROW_PARSERS, parse_message
from utils.mirror.translate.objects import MALFORMED, Payload
from utils.mirror.translate.snapshots import read_snapshot
from utils.mirror.write import replay
from utils.mirror.write.live_events import Kind, LiveEvents
from utils.mirror.write.writer import FlushPolicy, MirrorWriter
from utils.service import metrics
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Pages of a listing that may wait for the database before the gateway is paused.
MAX_WAITING_PAGES = 6
#: Longest pause of the gateway, in seconds: well below the 41 s between heartbeats.
PAUSE_SECONDS = 10.0
#: Seconds between two checks whether the event queue has room.
ROOM_SECONDS = 0.005
#: Seconds that `settled` waits.
SETTLE_SECONDS = 10.0
#: Dispatches that may change what the bot is allowed to do; GUILD_MEMBER_UPDATE only if it is about the bot.
PERMISSION_DISPATCHES = frozenset(("GUILD_MEMBER_UPDATE", "GUILD_ROLE_UPDATE", "GUILD_ROLE_DELETE", "CHANNEL_UPDATE"))
#: Dispatches that `LiveEvents` hands on once they are committed.
LIVE_KINDS: dict[str, Kind] = {
    "GUILD_MEMBER_ADD": "join",
    "GUILD_MEMBER_UPDATE": "update",
    "GUILD_MEMBER_REMOVE": "leave",
}
#: Seconds after the last READY or GUILD_CREATE from which a missing guild counts as unavailable. READY lists all guilds
#: as unavailable, and one GUILD_CREATE after the other follows; discord.py waits as long for the next one.
ARRIVAL_SECONDS = 2.0


class Mirror:
    """Translates raw gateway payloads; owns the writer, the reconciler and the archived-thread lane behind it."""

    def __init__(
        self,
        pool: Pool,
        source: DiscordSource,
        fence: Fence,
        queue: EventQueue,
        *,
        shards: int,
        flush_policy: FlushPolicy,
        reconcile_policy: ReconcilePolicy,
        spool: Path | None = None,
        pause_seconds: float = PAUSE_SECONDS,
        arrival_seconds: float = ARRIVAL_SECONDS,
        on_lost: Callable[[], None] = lambda: None,
        has_slept: Callable[[], bool] = lambda: False,
        on_written: Callable[[frozenset[str]], None] = lambda _: None,
        member_cache: Callable[[LiveRows], MemberCache] | None = None,
        live_events: LiveEvents | None = None,
    ) -> None:
        """Create a mirror; `spool` is the directory of journals, or None without a spool.

        `on_lost` is called when the lease is lost. `has_slept` returns whether another process may have taken it over
        since this one was suspended. `on_written` is called after each commit with the tables that it may have changed;
        the first error that it raises is logged.
        `member_cache` creates what keeps discord.py's member cache; None if it is not to be filled.
        `live_events` hands on what dispatches changed.
        """
        self.pool = pool
        self.fence = fence
        self.stamps = Stamps(fence.epoch)
        self.shards = shards
        self.pause_seconds = pause_seconds
        self.arrival_seconds = arrival_seconds
        on_written = partial(_announce, on_written)
        self.writer = MirrorWriter(
            pool, fence, queue, flush_policy, on_lost=on_lost, on_dropped=self._on_dropped, has_slept=has_slept,
            on_written=on_written, live_events=live_events,
        )  # fmt: skip
        self._member_cache = None if member_cache is None else member_cache(self.writer.overlay)
        self.reconciler = Reconciler(self.writer, source, self.stamps, reconcile_policy, open_sink=self._open_sink)
        #: Rows that cogs add to tables of their own.
        self.batches = Batches(
            pool, fence, queue, flush_policy, directory=spool, on_lost=on_lost, on_written=on_written
        )
        self.archived = ArchivedThreads(self.writer, source, self.stamps, self.reconciler)
        if self._member_cache is not None:
            self._member_cache.install(self.reconciler.wait_reconciled)
        self._source = source
        self._on_lost = on_lost
        self._spool = spool
        #: `time.monotonic()` of the last READY or GUILD_CREATE.
        self._last_arrival: float = 0.0
        #: Messages received since `update_metrics`: incrementing the metric costs as much as the rest of a message.
        self._messages: int = 0
        #: The bot's user id; 0 before READY.
        self._own_id: int = 0
        #: By shard that sent READY, the guilds that Discord listed or sent since.
        self._ready: dict[int, set[int]] = {}

    def start(self) -> None:
        """Start writing and reconciling."""
        self.writer.start()
        self.reconciler.start()
        self.reconciler.spawn(self.archived.run())
        self.reconciler.spawn(replay.keep_pruning(self.pool, self.fence))
        if self._spool is not None:
            writer = self.writer
            self.reconciler.spawn(
                replay.keep_replaying(
                    self.pool,
                    self.fence,
                    self._spool,
                    writer.write_lock,
                    writer.flush,
                    seconds=writer.policy.replay_seconds,
                    on_lost=self._on_lost,
                )
            )

    async def replay(self) -> int:
        """Write the journals of ended processes, before any new event; return how many events were new.

        Raises `DatabaseError` if they cannot be written.
        """
        if self._spool is None:
            return 0
        writer = self.writer
        return await replay.replay_journals(self.pool, self.fence, self._spool, writer.write_lock, writer.flush)

    async def stop(self, timeout: float, *, flush: bool = True) -> None:
        """Stop reconciling and, with `flush`, write what is buffered, for at most `timeout` seconds."""
        ends_at = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout / 2):
                await self.reconciler.stop()
        except TimeoutError:
            _log.warning("reconciles did not stop within %g s", timeout / 2)
        left = max(0.1, ends_at - time.monotonic())
        await asyncio.gather(self.writer.stop(left, flush=flush), self.batches.stop(left, flush=flush))

    def is_ready(self) -> tuple[bool, dict[str, Any]]:
        """Return whether every available guild has been reconciled in this session, and the progress by figure."""
        progress = self.reconciler.progress()
        ready = (
            len(self._ready) == self.shards
            and progress["reconciled"] == progress["available"]
            and (progress["unavailable"] == 0 or time.monotonic() - self._last_arrival > self.arrival_seconds)
        )
        return ready, {"shards_ready": len(self._ready), **progress}

    def update_metrics(self) -> None:
        """Update the metrics that are not updated by each dispatch."""
        messages, self._messages = self._messages, 0
        metrics.dispatches_received.labels("MESSAGE_CREATE").inc(messages)

    async def settled(self, guild_id: int, timeout: float = SETTLE_SECONDS) -> None:
        """Wait until everything received for a guild before the call is in the tables: to read what an event wrote.

        A member list that is still being received is not waited for. Raises `SyncError` if it takes longer than
        `timeout` seconds, for example because the database is away.

        Example::

            @commands.Cog.listener()
            async def on_member_join(self, member: discord.Member) -> None:
                await self.bot.mirror.settled(member.guild.id)
                row = await self.members.get((member.guild.id, member.id))
        """
        try:
            async with asyncio.timeout(timeout):
                await self.writer.wait_committed(guild_id)
        except TimeoutError as error:
            delay = self.writer.delay()
            why = "the database is slow, or a guild's first member list is written" if delay is None else delay[1]
            raise SyncError(f"guild {guild_id}: what was received is not written after {timeout:g} s: {why}") from error

    async def sync(self, guild_id: int) -> Run:
        """Reconcile a guild now: settings, roles and channels over REST, members by a complete listing.

        Returns the run of the listing. Raises `SyncError` if a request fails, `DatabaseError` if it cannot be written.
        """
        state = self.reconciler.guilds.get(guild_id)
        with self.writer.overlay.tracking(people=False):
            stamp = self.stamps.next()
            payload = await self._source.guild(guild_id)
            payload["channels"] = await self._source.channels(guild_id)
            if self.reconciler.guilds.get(guild_id) is not state:  # a new session: the response may be outdated
                raise SyncError(f"guild {guild_id}: it became available again, which reconciles it anyway")
            try:
                observation = read_snapshot(payload, stamp, self._malformed_reporter("GET /guilds"), is_gateway=False)
            except MALFORMED as error:
                raise SyncError(f"guild {guild_id}: malformed response: {error!r}") from error
            done = self.writer.submit(observation)
        await done
        return await self.reconciler.sync(guild_id)

    # --- dispatches

    def receive(self, name: str, data: Any, shard_id: int, session: str) -> bool | None:
        """Process one dispatch, see `Receiver.receive`. Never raises."""
        stamp = self.stamps.next()
        try:
            if name == "MESSAGE_CREATE":
                self._on_message_create(data, stamp)
                return False
            if name == "GUILD_MEMBERS_CHUNK":
                return self._on_members_chunk(data)
            if name == "RATE_LIMITED":
                return self._on_rate_limited(data)
            if name == "READY":
                self._on_ready(data, shard_id, stamp)
            elif name == "GUILD_CREATE":
                self._on_guild_create(data, stamp)
            elif name in ROW_PARSERS or name in MEMBERSHIP_PARSERS:
                self._on_row_dispatch(name, data, stamp)
                if self._member_cache is not None:
                    self._member_cache.prepare(name, data)
        except MALFORMED as error:
            self.report_malformed(name, error)
            return None
        return False

    def report_malformed(self, name: str, error: Exception, *, is_part: bool = False) -> None:
        """Count a payload that could not be parsed, or a part of it; log the first of its kind."""
        metrics.malformed_payloads.labels(name).inc()
        log_once(
            _log,
            ("malformed", name, type(error).__name__),
            "malformed %s skipped (%s: %.200s); further ones are only counted",
            f"part of {name}" if is_part else name,
            type(error).__name__,
            error,
        )

    def report_unparsed(self, name: str, error: Exception) -> None:
        """Count a payload that the mirror has and discord.py could not parse; log the first of its kind."""
        metrics.malformed_payloads.labels(name).inc()
        log_once(
            _log,
            ("unparsed", name, type(error).__name__),
            "discord.py could not parse %s (%s: %.200s), so that cogs miss it; further ones are only counted",
            name,
            type(error).__name__,
            error,
        )

    def backpressure(self) -> Awaitable[None] | None:
        """Return what to await before the next message is read; None if there is room for more."""
        listings = self.reconciler.listings
        if listings and any(listing.pages_waiting >= MAX_WAITING_PAGES for listing in listings.values()):
            return self._wait_for_listings()
        if self.writer.queue.is_crowded:
            return self._wait_for_queue()
        return asyncio.sleep(0) if listings else None

    async def _wait_for_queue(self) -> None:
        """Pause until the database or the disk has caught up with the event queue."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.pause_seconds):
                while self.writer.queue.is_crowded:  # noqa: ASYNC110 - both the disk and the database free room
                    await asyncio.sleep(ROOM_SECONDS)

    async def _wait_for_listings(self) -> None:
        """Pause until the full listings have room; give up those that the database takes no page of."""
        full = [listing for listing in self.reconciler.listings.values() if listing.pages_waiting >= MAX_WAITING_PAGES]
        try:
            async with asyncio.timeout(self.pause_seconds):
                for listing in full:
                    await listing.wait_for_room(MAX_WAITING_PAGES)
        except TimeoutError:
            for listing in full:
                if listing.pages_waiting >= MAX_WAITING_PAGES:
                    why = f"guild {listing.guild_id}: the database accepted no page for {self.pause_seconds:g} s"
                    listing.abandon(SyncError(why))

    def _on_members_chunk(self, data: Payload) -> bool:
        """Add a page to the listing that requested it."""
        listing = self.reconciler.listings.get(data.get("nonce") or "")
        if listing is None:
            return False
        try:
            listing.add_chunk(data)
        except MALFORMED as error:
            listing.fail(SyncError(f"guild {listing.guild_id}: malformed page: {error!r}"))
            self.report_malformed("GUILD_MEMBERS_CHUNK", error)
        return True

    def _on_rate_limited(self, data: Payload) -> bool:
        """Fail the listing whose op 8 Discord refused; discord.py ignores this dispatch and would wait forever."""
        listing = self.reconciler.listings.get((data.get("meta") or {}).get("nonce") or "")
        if listing is not None:
            listing.fail(SyncError(f"guild {listing.guild_id}: op 8 is rate limited for {data.get('retry_after')} s"))
        return True

    def _on_ready(self, data: Payload, shard_id: int, stamp: int) -> None:
        ids = {int(guild["id"]) for guild in data["guilds"]}
        self._last_arrival = time.monotonic()
        self._own_id = int(data["user"]["id"])
        self._put_rows([validate_row(objects.user(data["user"], own=True))], stamp)
        guilds = self.reconciler.guilds
        requested = {state.id: state.requested_at for state in guilds.values()}
        self.reconciler.queue.remove_shard(shard_id)
        for state in [state for state in guilds.values() if state.shard_id == shard_id]:
            self.reconciler.cancel(state, "a new gateway session started, dispatches were missed")
            del guilds[state.id]
        for id in ids:
            guilds[id] = GuildState(id, shard_id, requested_at=requested.get(id))
        self._ready[shard_id] = ids
        observation = Observation(0, stamp, [], ready=ReadyGuilds(shard_id, self.shards, ids))
        self.reconciler.spawn(self._wait_written(self.writer.submit(observation), "the guild list of READY"))

    def _on_guild_create(self, data: Payload, stamp: int) -> None:
        if data.get("unavailable"):
            self._on_row_dispatch("GUILD_DELETE", data, stamp)
            return
        guild_id = int(data["id"])
        self._last_arrival = time.monotonic()
        observation = read_snapshot(data, stamp, self._malformed_reporter("GUILD_CREATE"), is_gateway=True)
        known = self.reconciler.guilds.get(guild_id)
        shard_id = (guild_id >> 22) % self.shards
        if known is None and shard_id in self._ready:  # READY did not list it: the bot was added just now
            for group in observation.groups:
                group.mode = Mode.CREATE if group.table == "guilds" else group.mode
        state = GuildState(guild_id, shard_id, size=data.get("member_count"), available=True)
        if known is not None:
            self.reconciler.cancel(known, "it became available again")
            state.requested_at = known.requested_at
        for group in observation.groups:
            if group.table == "threads":
                for record in group.records:
                    values = dict(zip(group.columns, record[2:], strict=False))
                    state.active_threads[record[1]] = values.get("parent_id")
        self.reconciler.guilds[guild_id] = state
        self._ready.setdefault(shard_id, set()).add(guild_id)
        # Submitted before the task starts, so that whatever the next message says counts as newer.
        self.reconciler.spawn(self._finish_snapshot(state, self.writer.submit(observation)))
        self.reconciler.request(state, "available")

    async def _finish_snapshot(self, state: GuildState, written: asyncio.Future[None]) -> None:
        if await self._wait_written(written, f"guild {state.id}"):
            state.has_snapshot = True
            self.archived.add(state.id)

    async def _wait_written(self, written: asyncio.Future[None], what: str) -> bool:
        """Wait for an observation's commit; log a failure and return False."""
        try:
            await written
        except Exception as error:
            _log.error("could not write %s: %s", what, error)
            return False
        return True

    def _on_message_create(self, data: Payload, stamp: int) -> None:
        """Queue a message to be counted."""
        message = parse_message(data, stamp)
        if message is not None:
            self.writer.add_event(message)
        self._messages += 1

    def _on_row_dispatch(self, name: str, data: Payload, stamp: int) -> None:
        """Write the rows and queue the membership of a dispatch."""
        now = self.pool.now()
        membership = MEMBERSHIP_PARSERS[name](data, stamp, now) if name in MEMBERSHIP_PARSERS else None
        rows = [validate_row(row) for row in ROW_PARSERS[name](data, now)] if name in ROW_PARSERS else []
        if membership is not None:  # after parsing the rows: a malformed payload is skipped as a whole
            self.writer.add_event(membership)
        if name in LIVE_KINDS and self.writer.live_events is not None:
            self.writer.live_events.observe(LIVE_KINDS[name], rows, stamp)
        self._put_rows(rows, stamp)
        metrics.dispatches_received.labels(name).inc()
        if name == "GUILD_DELETE":
            state = self.reconciler.guilds.get(int(data["id"]))
            if state is not None:
                state.available = False
                self.reconciler.cancel(state, "it became unavailable")
                if not data.get("unavailable"):
                    del self.reconciler.guilds[state.id]
        elif name in PERMISSION_DISPATCHES:
            if name != "GUILD_MEMBER_UPDATE" or int(data["user"]["id"]) == self._own_id:
                self.archived.on_permissions_changed(int(data.get("guild_id") or 0))
        elif name.startswith("THREAD_"):
            if name == "THREAD_LIST_SYNC":
                self._on_thread_list_sync(data)
            self._record_threads(rows)

    def _on_thread_list_sync(self, data: Payload) -> None:
        """Channels became visible: forget their active threads, and list the archived ones."""
        guild_id = int(data["guild_id"])
        channels = {int(id) for id in data.get("channel_ids") or ()}
        state = self.reconciler.guilds.get(guild_id)
        if state is not None:
            others = {id: parent for id, parent in state.active_threads.items() if channels and parent not in channels}
            state.active_threads = others
            self.archived.add(guild_id)

    def _record_threads(self, rows: list[Row]) -> None:
        """Remember active threads: the listing of archived ones does not contain them."""
        for row in rows:
            state = self.reconciler.guilds.get(row.key[0])
            if state is not None and row.values.get("archived") is False:
                state.active_threads[row.key[-1]] = row.values.get("parent_id")

    def _put_rows(self, rows: list[Row], stamp: int) -> None:
        for row in rows:
            self.writer.put(row, stamp)

    def _on_dropped(self, guilds: set[int]) -> None:
        """Reconcile guilds whose members were dropped for lack of memory."""
        for guild_id in guilds:
            state = self.reconciler.guilds.get(guild_id)
            if state is not None:
                self.reconciler.request(state, "dropped")

    def _open_sink(self, guild_id: int, stamp: int) -> PageSink | None:
        return None if self._member_cache is None else self._member_cache.open(guild_id, stamp)

    def _malformed_reporter(self, name: str) -> Callable[[Exception], None]:
        return lambda error: self.report_malformed(name, error, is_part=True)


def _announce(on_written: Callable[[frozenset[str]], None], tables: frozenset[str]) -> None:
    """Announce a commit; an error of the listener must not look like one of the commit, which would be repeated."""
    try:
        on_written(tables)
    except Exception as error:
        log_once(
            _log,
            ("announce", type(error).__name__),
            "caches and the change feed were not told of a commit (%r); further errors are only counted",
            error,
        )

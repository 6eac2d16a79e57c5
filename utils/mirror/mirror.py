"""The mirror: takes what the gateway sends and keeps the tables equal to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.exceptions import SyncError
from utils.logs import log_once
from utils.mirror.discord.source import DiscordSource
from utils.mirror.reconcile.archived_threads import ArchivedThreads
from utils.mirror.reconcile.guild_queue import GuildState
from utils.mirror.reconcile.reconciler import ReconcilePolicy, Reconciler
from utils.mirror.records.rows import Observation, ReadyGuilds, Run, Stamps
from utils.mirror.records.validation import validate_row
from utils.mirror.spool.queue import EventQueue
from utils.mirror.translate import objects
from utils.mirror.translate.live import MEMBERSHIP_PARSERS, ROW_PARSERS, parse_message
from utils.mirror.translate.objects import MALFORMED, Payload
from utils.mirror.translate.snapshots import read_snapshot
from utils.mirror.write import replay
from utils.mirror.write.writer import FlushPolicy, MirrorWriter
from utils.service import metrics
from utils.service.lease import Fence

_log = logging.getLogger(__name__)

#: Pages that may wait for the database before the gateway is no longer read.
PAGES_WAITING = 6
#: Seconds that the gateway is left unread at most: well below the 41 s between heartbeats.
PAUSE_SECONDS = 10.0
#: Seconds between two looks whether there is room for more events.
ROOM_SECONDS = 0.005
#: Seconds after READY, or after the last guild, from which a guild that has not arrived has an outage. Discord sends
#: READY with every guild unavailable, then one GUILD_CREATE after the other; discord.py waits as long for the next one.
ARRIVAL_SECONDS = 2.0


class Mirror:
    """Receives raw gateway payloads, and owns the writer, the reconciler and the background lane behind it."""

    def __init__(
        self,
        database: Pool,
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
    ) -> None:
        """Times are seconds; `spool` is where journals are, None without.

        `on_lost`: another process acts now. `has_slept`: whether one may do so since this process was stopped.
        `on_written`: called after each commit with the tables that it may have changed.
        """
        self.database = database
        self.fence = fence
        self.stamps = Stamps(fence.epoch)
        self.shards = shards
        self.writer = MirrorWriter(
            database, fence, queue, flush_policy, on_lost=on_lost, on_dropped=self._on_dropped, has_slept=has_slept,
            on_written=on_written,
        )  # fmt: skip
        self.reconciler = Reconciler(self.writer, source, self.stamps, reconcile_policy)
        self.archived = ArchivedThreads(self.writer, source, self.stamps, self.reconciler)
        self._source = source
        self._spool = spool
        self._pause_seconds = pause_seconds
        self._arrival_seconds = arrival_seconds
        #: `time.monotonic()` of the last READY or GUILD_CREATE.
        self._last_arrival: float = 0.0
        #: Messages received since the metric was last brought up to date: a counter's lock costs as much as all else.
        self._messages: int = 0
        #: By shard whose READY has come, the guilds that Discord has shown since: none of them was left before.
        self._ready: dict[int, set[int]] = {}

    def start(self) -> None:
        """Start to write and to reconcile."""
        self.writer.start()
        self.reconciler.start()
        self.reconciler.spawn(self.archived.run())
        self.reconciler.spawn(replay.keep_pruning(self.database, self.fence))
        if self._spool is not None:
            writer = self.writer
            self.reconciler.spawn(
                replay.keep_replaying(
                    self.database,
                    self.fence,
                    self._spool,
                    writer.write_lock,
                    writer.flush,
                    seconds=writer.policy.replay_seconds,
                )
            )

    async def replay(self) -> int:
        """Write what ended processes left in their journals, before anything new; return how many events were new.

        Raises `DatabaseError` when it cannot be written.
        """
        if self._spool is None:
            return 0
        writer = self.writer
        return await replay.replay_journals(self.database, self.fence, self._spool, writer.write_lock, writer.flush)

    async def stop(self, timeout: float, *, flush: bool = True) -> None:
        """Stop reconciling, write what waits for at most `timeout` seconds; without `flush` nothing more is written."""
        ends_at = time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout / 2):
                await self.reconciler.stop()
        except TimeoutError:
            _log.warning("reconciles did not end within %s s", timeout / 2)
        await self.writer.stop(max(0.1, ends_at - time.monotonic()), flush=flush)

    def is_ready(self) -> tuple[bool, dict[str, Any]]:
        """Return whether every available guild has been reconciled in this session, and how far it has come."""
        progress = self.reconciler.progress()
        ready = (
            len(self._ready) == self.shards
            and progress["reconciled"] == progress["available"]
            and (progress["unavailable"] == 0 or time.monotonic() - self._last_arrival > self._arrival_seconds)
        )
        return ready, {"shards_ready": len(self._ready), **progress}

    def update_metrics(self) -> None:
        """Bring up to date what GET /metrics shows and is not counted there at once."""
        messages, self._messages = self._messages, 0
        metrics.events_received.labels("MESSAGE_CREATE").inc(messages)

    async def sync(self, guild_id: int) -> Run:
        """Reconcile a guild now: its settings, roles and channels over REST, its members by a complete listing."""
        state = self.reconciler.guilds.get(guild_id)
        with self.writer.overlay.tracking(people=False):
            stamp = self.stamps.next()
            payload = await self._source.guild(guild_id)
            payload["channels"] = await self._source.channels(guild_id)
            if self.reconciler.guilds.get(guild_id) is not state:  # events were missed since, the answer may be older
                raise SyncError(f"guild {guild_id}: it became available anew, which reconciles it by itself")
            try:
                observation = read_snapshot(payload, stamp, self._refuse("GET /guilds"), is_gateway=False)
            except MALFORMED as error:
                raise SyncError(f"guild {guild_id}: what Discord answers cannot be understood: {error!r}") from error
            done = self.writer.submit(observation)
        await done
        return await self.reconciler.sync(guild_id)

    # --- what the gateway sends

    def receive(self, event: str, data: Any, shard_id: int, session: str) -> bool | None:
        """Take one dispatch; True keeps it from discord.py's own parser, None: it was malformed. Never raises."""
        stamp = self.stamps.next()
        try:
            if event == "MESSAGE_CREATE":
                self._message(data, stamp)
                return False
            if event == "GUILD_MEMBERS_CHUNK":
                return self._chunk(data)
            if event == "RATE_LIMITED":
                return self._rate_limited(data)
            if event == "READY":
                self._on_ready(data, shard_id, stamp)
            elif event == "GUILD_CREATE":
                self._on_guild_create(data, stamp)
            elif event in ROW_PARSERS or event in MEMBERSHIP_PARSERS:
                self._live(event, data, stamp)
        except MALFORMED as error:
            self.report_malformed(event, error)
            return None
        return False

    def report_malformed(self, event: str, error: Exception) -> None:
        """Count and log a payload that could not be understood; it costs that payload alone."""
        metrics.malformed_payloads.labels(event).inc()
        log_once(
            _log,
            ("malformed", event, type(error).__name__),
            "a %s from Discord cannot be understood and is left out (%s: %.200s); others like it are only counted",
            event,
            type(error).__name__,
            error,
        )

    def backpressure(self) -> Awaitable[None] | None:
        """None when there is room for more; otherwise what to await before the next message is read."""
        listings = self.reconciler.listings
        if listings and any(listing.pages_waiting >= PAGES_WAITING for listing in listings.values()):
            return self._pause()
        if self.writer.queue.is_crowded:
            return self._until_less_crowded()
        return asyncio.sleep(0) if listings else None

    async def _until_less_crowded(self) -> None:
        """Let the database and the disk catch up with events that come faster than they take them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_seconds):
                while self.writer.queue.is_crowded:  # noqa: ASYNC110 - the disk and the database both make room
                    await asyncio.sleep(ROOM_SECONDS)

    async def _pause(self) -> None:
        full = [listing for listing in self.reconciler.listings.values() if listing.pages_waiting >= PAGES_WAITING]
        try:
            async with asyncio.timeout(self._pause_seconds):
                for listing in full:
                    await listing.wait_for_room(PAGES_WAITING)
        except TimeoutError:
            for listing in full:
                if listing.pages_waiting >= PAGES_WAITING:
                    why = f"guild {listing.guild_id}: the database took no page for {self._pause_seconds:g} s"
                    listing.abandon(SyncError(why))

    def _chunk(self, data: Payload) -> bool:
        listing = self.reconciler.listings.get(data.get("nonce") or "")
        if listing is None:
            return False
        try:
            listing.add_chunk(data)
        except MALFORMED as error:
            listing.fail(SyncError(f"guild {listing.guild_id}: a page cannot be understood: {error!r}"))
            self.report_malformed("GUILD_MEMBERS_CHUNK", error)
        return True

    def _rate_limited(self, data: Payload) -> bool:
        """Discord refuses an op 8; discord.py knows nothing of it and would wait for ever."""
        listing = self.reconciler.listings.get((data.get("meta") or {}).get("nonce") or "")
        if listing is not None:
            listing.fail(
                SyncError(f"guild {listing.guild_id}: Discord asks to wait {data.get('retry_after')} s for op 8")
            )
        return True

    def _on_ready(self, data: Payload, shard_id: int, stamp: int) -> None:
        ids = {int(guild["id"]) for guild in data["guilds"]}
        self._last_arrival = time.monotonic()
        self._put([validate_row(objects.user(data["user"], own=True))], stamp)
        guilds = self.reconciler.guilds
        asked = {state.id: state.requested_at for state in guilds.values()}
        self.reconciler.queue.remove_shard(shard_id)
        for state in [state for state in guilds.values() if state.shard_id == shard_id]:
            self.reconciler.cancel(state, "the gateway session is new, events were missed")
            del guilds[state.id]
        for id in ids:
            guilds[id] = GuildState(id, shard_id, requested_at=asked.get(id))
        self._ready[shard_id] = ids
        observation = Observation(0, stamp, [], ready=ReadyGuilds(shard_id, self.shards, ids))
        self.reconciler.spawn(self._until_written(self.writer.submit(observation), "the guilds of READY"))

    def _on_guild_create(self, data: Payload, stamp: int) -> None:
        if data.get("unavailable"):
            self._live("GUILD_DELETE", data, stamp)
            return
        guild_id = int(data["id"])
        self._last_arrival = time.monotonic()
        observation = read_snapshot(data, stamp, self._refuse("GUILD_CREATE"), is_gateway=True)
        known = self.reconciler.guilds.get(guild_id)
        shard_id = (guild_id >> 22) % self.shards
        state = GuildState(guild_id, shard_id, size=data.get("member_count"), available=True)
        if known is not None:
            self.reconciler.cancel(known, "it became available anew")
            state.requested_at = known.requested_at
        for group in observation.groups:
            if group.table == "threads":
                for record in group.records:
                    values = dict(zip(group.columns, record[2:], strict=False))
                    state.active_threads[record[1]] = values.get("parent_id")
        self.reconciler.guilds[guild_id] = state
        self._ready.setdefault(shard_id, set()).add(guild_id)
        # Submitted at once, not by the task: what comes live from the very next message on is younger.
        self.reconciler.spawn(self._on_snapshot(state, self.writer.submit(observation)))
        self.reconciler.request(state, "available")

    async def _on_snapshot(self, state: GuildState, written: asyncio.Future[None]) -> None:
        if await self._until_written(written, f"guild {state.id}"):
            state.has_snapshot = True
            self.archived.add(state.id)

    async def _until_written(self, written: asyncio.Future[None], what: str) -> bool:
        """Wait for an observation; one that the database refuses is reported and given up."""
        try:
            await written
        except Exception as error:
            _log.error("%s could not be written: %s", what, error)
            return False
        return True

    def _message(self, data: Payload, stamp: int) -> None:
        counted = parse_message(data, stamp)
        if counted is not None:
            self.writer.add_event(counted)
        self._messages += 1

    def _live(self, event: str, data: Payload, stamp: int) -> None:
        now = self.database.now()
        told = MEMBERSHIP_PARSERS[event](data, stamp, now) if event in MEMBERSHIP_PARSERS else None
        rows = [validate_row(row) for row in ROW_PARSERS[event](data, now)] if event in ROW_PARSERS else []
        if told is not None:  # not before the rows are read: a payload is taken whole or not at all
            self.writer.add_event(told)
        self._put(rows, stamp)
        metrics.events_received.labels(event).inc()
        if event == "GUILD_DELETE":
            state = self.reconciler.guilds.get(int(data["id"]))
            if state is not None:
                state.available = False
                self.reconciler.cancel(state, "it became unavailable")
                if not data.get("unavailable"):
                    del self.reconciler.guilds[state.id]
        elif event.startswith("THREAD_"):
            if event == "THREAD_LIST_SYNC":
                self._on_thread_list(data)
            self._note_threads(rows)

    def _on_thread_list(self, data: Payload) -> None:
        """Channels became visible: what was active in them may be gone, and what is archived was never seen."""
        guild_id = int(data["guild_id"])
        channels = {int(id) for id in data.get("channel_ids") or ()}
        state = self.reconciler.guilds.get(guild_id)
        if state is not None:
            kept = {id: parent for id, parent in state.active_threads.items() if channels and parent not in channels}
            state.active_threads = kept
            self.archived.add(guild_id)

    def _note_threads(self, rows: list[Any]) -> None:
        for row in rows:
            state = self.reconciler.guilds.get(row.key[0])
            if state is not None and row.values.get("archived") is False:
                state.active_threads[row.key[-1]] = row.values.get("parent_id")

    def _put(self, rows: list[Any], stamp: int) -> None:
        for row in rows:
            self.writer.put(row, stamp)

    def _on_dropped(self, guilds: set[int]) -> None:
        """Bring back members that memory had no room for."""
        for guild_id in guilds:
            state = self.reconciler.guilds.get(guild_id)
            if state is not None:
                self.reconciler.request(state, "dropped")

    def _refuse(self, where: str) -> Any:
        return lambda error: self.report_malformed(where, error)

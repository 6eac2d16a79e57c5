"""Reads archived threads over REST, in a background lane that nothing waits for."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter

import discord

from utils.exceptions import SyncError
from utils.logs import log_once
from utils.mirror.discord.source import DiscordSource, RateLimiter, ThreadKind
from utils.mirror.reconcile.guild_queue import GuildState
from utils.mirror.reconcile.reconciler import Reconciler
from utils.mirror.records.rows import Entry, Observation, Row, Stamps, group_entries
from utils.mirror.records.validation import validate_row
from utils.mirror.translate import objects
from utils.mirror.translate.objects import MALFORMED
from utils.mirror.write.writer import MirrorWriter
from utils.retrying import backoff_seconds
from utils.service import metrics

_log = logging.getLogger(__name__)

#: Channel types that have threads: text, announcement, forum, media (Discord API reference, "Channel Types").
THREADED_TYPES = (0, 5, 15, 16)
#: Threads of one guild that are requested one by one in a pass, because no listing showed them.
MAX_PROBES = 200

_VISIBLE_CHANNELS = """
SELECT id FROM channels
WHERE guild_id = $1 AND deleted_at IS NULL AND NOT hidden AND type = ANY($2)
"""
#: Parameters: guild id, ids of channels, ids of threads that were listed, how many to return, ids of the channels whose
#: private threads (type 12) the bot sees.
_UNLISTED_THREADS = """
SELECT id FROM threads
WHERE guild_id = $1 AND deleted_at IS NULL AND parent_id = ANY($2) AND id <> ALL($3)
    AND (type IS DISTINCT FROM 12 OR parent_id = ANY($5))
ORDER BY id DESC
LIMIT $4
"""


class ArchivedThreads:
    """Reads the archived threads of one guild after the other, while no reconcile needs the requests."""

    def __init__(self, writer: MirrorWriter, source: DiscordSource, stamps: Stamps, reconciler: Reconciler) -> None:
        #: Guilds read since the start.
        self.finished: int = 0
        self._writer = writer
        self._source = source
        self._stamps = stamps
        self._reconciler = reconciler
        self._policy = reconciler.policy
        self._queue: asyncio.Queue[int] = asyncio.Queue()
        self._queued: set[int] = set()
        self._reading: int | None = None
        #: Guilds whose permissions are about to be compared with what was skipped.
        self._rechecking: set[int] = set()
        #: Consecutive failed passes, by guild.
        self._failures: Counter[int] = Counter()
        # Discord allows a bot 50 requests in a second (Discord API reference, "Global Rate Limit").
        self._rate = RateLimiter(self._policy.thread_requests_per_second, 1.0)

    def add(self, guild_id: int) -> None:
        """Queue a guild; one that is being read now is read once more."""
        if guild_id not in self._queued:
            self._queued.add(guild_id)
            self._queue.put_nowait(guild_id)

    def on_permissions_changed(self, guild_id: int) -> None:
        """Read a guild once more if a listing that was skipped is allowed now."""
        state = self._reconciler.guilds.get(guild_id)
        if state is None or not state.skipped_archives or guild_id in self._rechecking:
            return
        # Later, because discord.py has not parsed the dispatch yet, and because such dispatches come in bursts.
        self._rechecking.add(guild_id)
        asyncio.get_running_loop().call_later(self._policy.permissions_seconds, self._recheck, guild_id)

    def _recheck(self, guild_id: int) -> None:
        self._rechecking.discard(guild_id)
        state = self._reconciler.guilds.get(guild_id)
        if state is not None and any(self._source.may_list_archived(guild_id, *it) for it in state.skipped_archives):
            self.add(guild_id)

    @property
    def guilds_waiting(self) -> int:
        """Guilds that are queued, being read, or waiting for a retry."""
        reading = () if self._reading is None else (self._reading,)
        return len(self._queued.union(self._failures, reading))

    async def run(self) -> None:
        """Read queued guilds until cancelled."""
        while True:
            guild_id = self._reading = await self._queue.get()
            self._queued.discard(guild_id)
            try:
                await self._read_guild(guild_id)
            except Exception as error:  # whatever it was: this guild is retried, and the lane goes on with others
                self._failures[guild_id] += 1
                delay = backoff_seconds(
                    self._failures[guild_id],
                    first=self._policy.thread_retry_seconds,
                    longest=self._policy.thread_retry_max_seconds,
                )
                state = self._reconciler.guilds.get(guild_id)
                will_retry = state is not None and state.available  # otherwise its next GUILD_CREATE queues it
                _log.warning(
                    "archived threads not read: %s%s",
                    error,
                    f"; next attempt in {delay:.1f} s" if will_retry else "",
                    extra={"guild_id": guild_id},
                )
                if will_retry:
                    asyncio.get_running_loop().call_later(delay, self.add, guild_id)
                else:
                    self._failures.pop(guild_id, None)
            else:
                self._failures.pop(guild_id, None)
                self.finished += 1
            finally:
                self._reading = None

    async def _read_guild(self, guild_id: int) -> None:
        """Read a guild's archived threads. Raises the last error if a part of them could not be read."""
        state = self._reconciler.guilds.get(guild_id)
        if state is None or not state.available:
            return  # its next GUILD_CREATE queues it again
        await self._writer.flush()  # the channels may still be in the buffer
        pool = self._writer.pool
        channels = [row["id"] for row in await pool.fetch(_VISIBLE_CHANNELS, guild_id, list(THREADED_TYPES))]
        failure: SyncError | None = None
        listed: set[int] = set()
        kinds: tuple[ThreadKind, ...] = ("public", "private")
        state.skipped_archives.clear()
        for channel_id, kind in itertools.product(channels, kinds):
            if not self._source.may_list_archived(guild_id, channel_id, kind):
                state.skipped_archives.add((channel_id, kind))
                continue  # Discord would answer 403, and it counts such answers
            try:
                await self._read_channel(state, channel_id, kind, listed)
            except (discord.Forbidden, discord.NotFound) as error:
                # Not allowed to read it: that proves nothing about its threads.
                _log.debug("cannot read %s archived threads of channel %s: %s", kind, channel_id, error)
            except SyncError as error:
                failure = error
        seen = list(listed | state.active_threads.keys())
        private = [id for id in channels if self._source.may_view_private(guild_id, id)]
        for row in await pool.fetch(_UNLISTED_THREADS, guild_id, channels, seen, MAX_PROBES, private):
            try:
                await self._probe(state, row["id"])
            except SyncError as error:
                failure = error
        if failure is not None and self._reconciler.is_current(state):
            raise failure

    async def _read_channel(self, state: GuildState, channel_id: int, kind: ThreadKind, listed: set[int]) -> None:
        await self._wait_for_turn()
        with self._writer.overlay.tracking(people=False):
            stamp = self._stamps.next()
            async for payloads in self._source.archived_threads(channel_id, kind):
                rows = [row for payload in payloads if (row := self._row(state.id, payload)) is not None]
                listed.update(row.key[-1] for row in rows)
                await self._write(state, rows, stamp)
                await self._wait_for_turn()
                stamp = self._stamps.next()

    async def _probe(self, state: GuildState, thread_id: int) -> None:
        """Request a thread that no listing showed: only a 404 proves that it was deleted."""
        await self._wait_for_turn()
        with self._writer.overlay.tracking(people=False):
            stamp = self._stamps.next()
            try:
                row = self._row(state.id, await self._source.channel(thread_id))
            except discord.Forbidden:
                return
            except discord.NotFound:
                row = objects.tombstone("threads", (state.id, thread_id), "deleted_at", self._writer.pool.now())
            if row is not None:
                await self._write(state, [row], stamp)

    async def _wait_for_turn(self) -> None:
        """Wait until no reconcile needs the requests, and the lane's own rate allows one more."""
        await self._reconciler.wait_until_idle()
        await self._rate.acquire()

    async def _write(self, state: GuildState, rows: list[Row], stamp: int) -> None:
        if not self._reconciler.is_current(state):
            raise SyncError(f"guild {state.id}: dispatches were missed since the request")
        entries = {(row.table, row.key): Entry(row.values, row.may_insert, stamp) for row in rows}
        if entries:
            await self._writer.submit(Observation(state.id, stamp, list(group_entries(entries.items()))))

    def _row(self, guild_id: int, payload: objects.Payload) -> Row | None:
        try:
            return validate_row(objects.thread(guild_id, payload))
        except MALFORMED as error:
            metrics.malformed_payloads.labels("archived threads").inc()
            log_once(
                _log,
                ("archived threads", guild_id),
                "left a malformed archived thread of guild %s out: %s; further ones are only counted",
                guild_id,
                error,
            )
            return None

"""Archived threads: a background lane over REST that nothing waits for."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter

import discord

from utils.exceptions import SyncError
from utils.mirror.discord.source import DiscordSource, RateLimiter, ThreadKind
from utils.mirror.reconcile.guild_queue import GuildState
from utils.mirror.reconcile.reconciler import Reconciler
from utils.mirror.records.rows import Entry, Observation, Row, Stamps, group_entries
from utils.mirror.records.validation import validate_row
from utils.mirror.translate import objects
from utils.mirror.translate.objects import MALFORMED
from utils.mirror.write.writer import MirrorWriter

_log = logging.getLogger(__name__)

#: Kinds of channels that have threads: text, announcement, forum, media (Discord API reference, "Channel Types").
THREADED = (0, 5, 15, 16)
#: Requests a second that the lane takes; Discord allows a bot 50 (Discord API reference, "Global Rate Limit").
REQUESTS_A_SECOND = 20
#: Threads of one guild that may be asked for one by one in a pass, because no listing showed them.
PROBES = 200
#: Seconds before a guild that could not be read is tried again, doubled each time up to the second figure.
RETRY_SECONDS = 5.0
RETRY_SECONDS_MAX = 600.0


class ArchivedThreads:
    """Reads the archived threads of one guild after the other, while no reconcile needs the requests."""

    def __init__(self, writer: MirrorWriter, source: DiscordSource, stamps: Stamps, reconciler: Reconciler) -> None:
        self._writer = writer
        self._source = source
        self._stamps = stamps
        self._reconciler = reconciler
        self._waiting: asyncio.Queue[int] = asyncio.Queue()
        self._queued: set[int] = set()
        self._reading: int | None = None
        #: Passes that failed in a row, by guild.
        self._failures: Counter[int] = Counter()
        self._pace = RateLimiter(REQUESTS_A_SECOND, 1.0)
        #: Guilds read since the start.
        self.finished: int = 0

    def add(self, guild_id: int) -> None:
        """Put a guild in line; one that is being read is read once more."""
        if guild_id not in self._queued:
            self._queued.add(guild_id)
            self._waiting.put_nowait(guild_id)

    @property
    def waiting(self) -> int:
        """Guilds in line, the one that is being read and those to be tried again included."""
        return len(self._queued | {guild_id for guild_id in (self._reading, *self._failures) if guild_id is not None})

    async def run(self) -> None:
        """Work off the line until cancelled."""
        while True:
            guild_id = self._reading = await self._waiting.get()
            self._queued.discard(guild_id)
            try:
                await self._read_guild(guild_id)
            except Exception as error:  # whatever it was, the lane has other guilds to read
                self._failures[guild_id] += 1
                wait = min(RETRY_SECONDS * 2 ** (self._failures[guild_id] - 1), RETRY_SECONDS_MAX)
                _log.warning(
                    "archived threads not read: %s; next try in %g s", error, wait, extra={"guild_id": guild_id}
                )
                asyncio.get_running_loop().call_later(wait, self.add, guild_id)
            else:
                self._failures.pop(guild_id, None)
                self.finished += 1
            finally:
                self._reading = None

    async def _read_guild(self, guild_id: int) -> None:
        """Read a guild's archived threads; raises the last error when a part of them could not be read."""
        state = self._reconciler.guilds.get(guild_id)
        if state is None or not state.available:
            return  # its next GUILD_CREATE brings it here again
        await self._writer.flush()  # which channels can be seen may wait to be written
        channels = [
            channel_id
            for (channel_id,) in await self._writer.database.fetch(
                "SELECT id FROM channels WHERE guild_id = $1 AND deleted_at IS NULL AND NOT hidden AND type = ANY($2)",
                guild_id,
                list(THREADED),
            )
        ]
        failed: SyncError | None = None
        shown: set[int] = set()
        kinds: tuple[ThreadKind, ...] = ("public", "private")
        for channel_id, kind in itertools.product(channels, kinds):
            try:
                await self._read_channel(state, channel_id, kind, shown)
            except (discord.Forbidden, discord.NotFound) as error:
                # Not allowed to look: unknown, which is not gone.
                _log.debug("%s archived threads of channel %s cannot be seen: %s", kind, channel_id, error)
            except SyncError as error:
                failed = error
        known = await self._writer.database.fetch(
            "SELECT id FROM threads WHERE guild_id = $1 AND deleted_at IS NULL AND parent_id = ANY($2) "
            "AND id <> ALL($3) ORDER BY id DESC LIMIT $4",
            guild_id,
            channels,
            list(shown | state.active_threads.keys()),
            PROBES,
        )
        for (thread_id,) in known:
            try:
                await self._probe(state, thread_id)
            except SyncError as error:
                failed = error
        if failed is not None and self._is_current(state):
            raise failed

    async def _read_channel(self, state: GuildState, channel_id: int, kind: ThreadKind, shown: set[int]) -> None:
        await self._turn()
        with self._writer.touched.watching(people=False):
            stamp = self._stamps.next()
            async for payloads in self._source.archived_threads(channel_id, kind):
                rows = [row for payload in payloads if (row := self._row(state.id, payload)) is not None]
                shown.update(row.key[-1] for row in rows)
                await self._write(state, rows, stamp)
                await self._turn()
                stamp = self._stamps.next()

    async def _probe(self, state: GuildState, thread_id: int) -> None:
        """Ask for a thread that no listing showed: only a 404 proves that it is gone."""
        await self._turn()
        with self._writer.touched.watching(people=False):
            stamp = self._stamps.next()
            try:
                row = self._row(state.id, await self._source.channel(thread_id))
            except discord.Forbidden:
                return
            except discord.NotFound:
                gone_at = self._writer.database.now()
                row = objects.tombstone("threads", (state.id, thread_id), "deleted_at", gone_at)
            if row is not None:
                await self._write(state, [row], stamp)

    async def _turn(self) -> None:
        """Wait until no reconcile needs the requests, and until the lane may make one more."""
        await self._reconciler.quiet()
        await self._pace.acquire()

    def _is_current(self, state: GuildState) -> bool:
        return self._reconciler.guilds.get(state.id) is state and state.available

    async def _write(self, state: GuildState, rows: list[Row], stamp: int) -> None:
        if not self._is_current(state):
            raise SyncError(f"guild {state.id}: events were missed since the request")
        entries = {(row.table, row.key): Entry(row.values, row.may_insert, stamp) for row in rows}
        if entries:
            await self._writer.submit(Observation(state.id, stamp, list(group_entries(entries.items()))))

    def _row(self, guild_id: int, payload: objects.Payload) -> Row | None:
        try:
            return validate_row(objects.thread(guild_id, payload))
        except MALFORMED as error:
            _log.warning("an archived thread was left out: %s", error, extra={"guild_id": guild_id})
            return None

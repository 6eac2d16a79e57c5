"""Archived threads: a background lane over REST that nothing waits for."""

from __future__ import annotations

import asyncio
import logging

import discord

from utils.errors import GuildbookError, SyncError, ValidationError
from utils.mirror import translate
from utils.mirror.check import require
from utils.mirror.reconcile import Reconciler
from utils.mirror.rows import Entry, Row, Stamps, grouped, value_columns
from utils.mirror.source import DiscordSource, Pace, ThreadKind
from utils.mirror.writer import MirrorWriter, Observation

_log = logging.getLogger(__name__)

#: Kinds of channels that have threads: text, announcement, forum, media (Discord API reference, "Channel Types").
THREADED = (0, 5, 15, 16)
#: Requests a second that the lane takes; Discord allows a bot 50 (Discord API reference, "Global Rate Limit").
REQUESTS_A_SECOND = 20
#: Threads of one guild that may be asked for one by one in a pass, because no listing showed them.
PROBES = 200


class ArchivedThreads:
    """Reads the archived threads of one guild after the other, while no reconcile needs the requests."""

    def __init__(self, writer: MirrorWriter, source: DiscordSource, stamps: Stamps, reconciler: Reconciler) -> None:
        self._writer = writer
        self._source = source
        self._stamps = stamps
        self._reconciler = reconciler
        self._waiting: asyncio.Queue[int] = asyncio.Queue()
        self._queued: set[int] = set()
        self._pace = Pace(REQUESTS_A_SECOND, 1.0)
        #: Guilds read since the start.
        self.finished: int = 0

    def add(self, guild_id: int) -> None:
        """Put a guild in line."""
        if guild_id not in self._queued:
            self._queued.add(guild_id)
            self._waiting.put_nowait(guild_id)

    @property
    def waiting(self) -> int:
        """Guilds in line."""
        return len(self._queued)

    async def run(self) -> None:
        """Work off the line until cancelled."""
        while True:
            guild_id = await self._waiting.get()
            try:
                await self._read_guild(guild_id)
            except GuildbookError as error:
                _log.warning("archived threads not read: %s", error, extra={"guild_id": guild_id})
            finally:
                self._queued.discard(guild_id)
                self.finished += 1

    async def _read_guild(self, guild_id: int) -> None:
        channels = await self._writer.database.fetch(
            "SELECT id FROM channels WHERE guild_id = $1 AND deleted_at IS NULL AND NOT hidden AND type = ANY($2)",
            guild_id,
            list(THREADED),
        )
        shown: set[int] = set()
        for (channel_id,) in channels:
            for kind in ("public", "private"):
                try:
                    await self._read_channel(guild_id, channel_id, kind, shown)
                except (discord.Forbidden, discord.NotFound) as error:
                    # Not allowed to look: unknown, which is not gone.
                    _log.debug("%s archived threads of channel %s cannot be seen: %s", kind, channel_id, error)
        await self._probe(guild_id, [channel_id for (channel_id,) in channels], shown)

    async def _read_channel(self, guild_id: int, channel_id: int, kind: ThreadKind, shown: set[int]) -> None:
        await self._turn()
        stamp = self._stamps.next()
        async for payloads in self._source.archived_threads(channel_id, kind):
            rows = [self._row(guild_id, payload) for payload in payloads]
            shown.update(row.key[-1] for row in rows if row is not None)
            entries = {(row.table, row.key): Entry(row.values, row.appears, stamp) for row in rows if row is not None}
            if entries:
                await self._writer.submit(Observation(guild_id, stamp, list(grouped(entries.items()))))
            await self._turn()
            stamp = self._stamps.next()

    async def _turn(self) -> None:
        """Wait until no reconcile needs the requests, and until the lane may make one more."""
        await self._reconciler.quiet()
        await self._pace.turn()

    def _row(self, guild_id: int, payload: translate.Payload) -> Row | None:
        try:
            row = translate.thread(guild_id, payload)
            names = [name for name in value_columns(row.table) if name in row.values]
            require(row.table, tuple(names), (*row.key, *(row.values[name] for name in names)))
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            _log.warning("an archived thread was left out: %s", error, extra={"guild_id": guild_id})
            return None
        return row

    async def _probe(self, guild_id: int, channels: list[int], shown: set[int]) -> None:
        """Ask for the threads that no listing showed, one by one: only a 404 proves that one is gone."""
        state = self._reconciler.guilds.get(guild_id)
        known = await self._writer.database.fetch(
            "SELECT id FROM threads WHERE guild_id = $1 AND deleted_at IS NULL AND parent_id = ANY($2) "
            "AND id <> ALL($3) ORDER BY id DESC LIMIT $4",
            guild_id,
            channels,
            list(shown | (state.active_threads if state is not None else set())),
            PROBES,
        )
        for (thread_id,) in known:
            await self._turn()
            try:
                exists = await self._source.channel_exists(thread_id)
            except SyncError as error:
                _log.warning("a thread could not be asked for: %s", error, extra={"guild_id": guild_id})
                continue
            if exists is False:
                gone = translate.removed("threads", (guild_id, thread_id), "deleted_at", self._writer.database.now())
                self._writer.put(gone, self._stamps.next())

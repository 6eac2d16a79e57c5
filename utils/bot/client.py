"""The bot itself: discord.py's, with the database and the mirror on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

import discord
from discord.ext import commands
from sqlalchemy.ext.asyncio import AsyncSession

from utils.bot.command_sync import register_commands
from utils.bot.loader import Loader
from utils.bot.scheduler import Scheduler
from utils.database import Pool
from utils.database.access import Database
from utils.database.cache import Channel, QueryCache
from utils.exceptions import GuildbookError, SpoolError
from utils.mirror import Mirror
from utils.mirror.change_feed import ChangeFeed
from utils.mirror.discord import tap
from utils.mirror.discord.source import DiscordSource
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue
from utils.mirror.write.writer import FlushPolicy
from utils.operations.confirm import Confirmations
from utils.operations.slash import Operators
from utils.service import metrics
from utils.service.lease import Lease
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Where journals are, under DATA_DIR.
SPOOL = "spool"
#: Seconds for a journal to be closed.
JOURNAL_SECONDS = 3.0
#: Seconds for what cogs have of the database to end: open transactions are rolled back.
ACCESS_SECONDS = 3.0
#: Seconds for the answer to a command that ends the bot.
ANSWER_SECONDS = 30.0
#: What `on_mirror_change` listeners hear.
CHANGE = "mirror_change"


class Guildbook(commands.AutoShardedBot):
    """Mirrors its guilds into the database and carries the cogs.

    `lease` has been won already. `extensions`: the modules of the cogs; None for everything in `cogs/`.
    """

    def __init__(
        self, settings: Settings, database: Pool, lease: Lease, *, extensions: Iterable[str] | None = None
    ) -> None:
        discord.VoiceClient.warn_nacl = discord.VoiceClient.warn_dave = False  # nobody here wants to speak
        intents = discord.Intents(
            guilds=True,
            members=True,
            moderation=True,
            guild_messages=True,
            voice_states=settings.member_cache != "none",
        )
        super().__init__(
            command_prefix=commands.when_mentioned,
            help_command=None,
            intents=intents,
            chunk_guilds_at_startup=False,
            member_cache_flags=cache_flags(settings.member_cache),
            max_messages=None,
            allowed_mentions=discord.AllowedMentions.none(),
        )
        self.settings: Settings = settings
        self.cache: QueryCache | None = None
        if settings.cache_max_results:
            self.cache = QueryCache(max_results=settings.cache_max_results, ttl=settings.cache_ttl_seconds)
        #: What cogs read and write with.
        self.db: Database = Database(
            database,
            cache=self.cache,
            slow_ms=settings.slow_query_ms,
            log_queries=settings.environment == "development",
            orm_connections=settings.orm_connections,
        )
        self.operators: Operators = Operators(self, settings.admin_user_ids)
        #: Questions to operators that wait for a button.
        self.confirmations: Confirmations = Confirmations()
        self.add_listener(self.confirmations.on_interaction)
        self.lease: Lease = lease
        self.loader: Loader = Loader(self, extensions)
        self._pool: Pool = database
        self._duties: Scheduler = Scheduler(settings, database)
        self._channel: Channel | None = None
        self._beside: list[asyncio.Task[None]] = []
        #: Why an operator's command ended the bot; None: none did.
        self.ended_with: GuildbookError | None = None
        self._mirror: Mirror | None = None
        self._journal: Journal | None = None
        tap.set_api_base(settings.discord_api_base)

    @property
    def mirror(self) -> Mirror:
        """The mirror, there from the login on. Raises `GuildbookError` before."""
        if self._mirror is None:
            raise GuildbookError("the mirror begins with the login to Discord: use it from cog_load on")
        return self._mirror

    def get_db_session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Lend a session: it joins the transaction that is open, or has a connection of its own.

        The end of the block commits, an exception rolls back.
        """
        return self.db.sessions()

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Tell whether every available guild is mirrored, and how far each listing under way has come."""
        if self._mirror is None:
            return False, {"state": "not logged in yet"}
        ready, progress = self._mirror.is_ready()
        guilds = self._mirror.reconciler.guilds
        listings = {id: state.listing.seen for id, state in guilds.items() if state.listing is not None}
        writer = self._mirror.writer
        waiting = {"rows_waiting": len(writer.buffer), "events_waiting": len(writer.queue)}
        return ready, {**progress, **waiting, "members_received": listings}

    def stats(self) -> dict[str, Any]:
        """Return the figures of this moment: what waits, what was written, the spool, the lease and the pool.

        Times are seconds. `mirror`, `buffer`, `queue` and `spool` are None before the login.
        """
        figures: dict[str, Any] = {
            "lease": self.lease.describe(),
            "pool": self._pool.pool_stats(),
            "database": self.db.get_stats(),
            "cogs": {state.name: state.state for state in self.loader.states()},
        }
        if self._mirror is None:
            return figures | dict.fromkeys(("mirror", "buffer", "queue", "spool", "written"))
        writer, journal = self._mirror.writer, self._journal
        queue = writer.queue
        spool = None
        if journal is not None:
            spool = {"events": journal.records, "bytes": journal.size, "trouble": journal.failure}
        return figures | {
            "mirror": self._mirror.is_ready()[1],
            "buffer": {"rows": len(writer.buffer), "oldest": writer.buffer.age, "dropped": writer.rows_dropped},
            "queue": {
                "events": len(queue), "oldest": queue.age, "on_disk": queue.is_spilled, "dropped": queue.dropped,
            },
            "spool": spool,
            "written": {"rows": writer.rows_written, "events": writer.events_written},
        }  # fmt: skip

    def measure(self) -> None:
        """Set the gauges that GET /metrics shows."""
        if self._mirror is None:
            return
        self._mirror.update_metrics()
        writer = self._mirror.writer
        metrics.buffer_rows.set(len(writer.buffer))
        metrics.queue_events.set(len(writer.queue))
        metrics.waiting_seconds.labels("row").set(writer.buffer.age)
        metrics.waiting_seconds.labels("event").set(writer.queue.age)
        metrics.spool_bytes.set(0 if self._journal is None else self._journal.size)

    async def setup_hook(self) -> None:
        """Start the mirror and load the cogs: after the login, before the gateway."""
        shards = await self._find_gateway()
        settings, fence = self.settings, self.lease.fence
        if fence is None:
            raise GuildbookError("the bot acts only with the lease: wait for it before the login")
        self._journal = await self._open_journal(fence.holder)
        queue = EventQueue(self._journal, spool=settings.spool, max_rows=settings.buffer_max_rows)
        await self.db.connect()
        if self.cache is not None:
            await self.cache.load(self._pool)
            self._channel = Channel(self.cache, self._pool.direct, self._pool)
            await self._channel.start()
        changes = ChangeFeed(self._pool, self._tell_change, wanted=self._hears_changes)
        self._mirror = Mirror(
            self._pool,
            DiscordSource(self),
            fence,
            queue,
            shards=shards,
            flush_policy=FlushPolicy(
                settings.flush_rows, settings.flush_seconds, settings.db_retry_seconds, settings.db_retry_max_seconds
            ),
            page_timeout=settings.chunk_timeout_seconds,
            cooldown=settings.chunk_cooldown_seconds,
            spool=settings.data_dir / SPOOL if settings.spool != "off" else None,
            on_lost=self.lease.give_up,
            has_slept=self.lease.was_suspended,
            on_written=lambda tables: self._on_written(tables, changes),
        )
        tap.install(self, self._mirror)
        await self._mirror.replay()
        self._mirror.start()
        await self.loader.load_all()
        await register_commands(self)
        self._beside.append(asyncio.create_task(changes.run(), name="change events"))
        self._beside.append(asyncio.create_task(self._tell_statistics(), name="statistics"))
        self._duties.start()
        _log.info("logged in as %s", self.user, extra={"shards": shards, "epoch": fence.epoch, "holder": fence.holder})

    async def begin_anew(self) -> None:
        """Forget what is known of the database's content, and have Discord tell everything again: after a restore."""
        await self.db.renew()
        await tap.begin_new_sessions(self)

    def end(self, error: GuildbookError) -> None:
        """Leave Discord and end the process with this error, as soon as operators have their answers."""

        async def end() -> None:
            await self.operators.answered(ANSWER_SECONDS)
            await self.close()

        self.ended_with = error
        self._beside.append(asyncio.create_task(end(), name="end"))

    async def stop_mirror(self, timeout: float) -> None:
        """Write what waits, in `timeout` seconds at most, and stop the mirror; nothing when it never started.

        When another process acts already, nothing is written: what waits stays in the journal.
        """
        await self._duties.stop(ACCESS_SECONDS)
        await self.operators.stop(ACCESS_SECONDS)
        if self._mirror is not None:
            await self._mirror.stop(timeout, flush=not self.lease.lost.is_set())
        if self._journal is not None:
            await self._journal.close(JOURNAL_SECONDS)
            self._journal = None
        beside, self._beside = self._beside, []
        for task in beside:
            task.cancel()
        if beside:
            await asyncio.wait(beside, timeout=ACCESS_SECONDS)
        await self.db.close(ACCESS_SECONDS)
        if self._channel is not None:
            await self._channel.stop()
            self._channel = None
        if self.cache is not None:
            await self.cache.close()

    def _on_written(self, tables: frozenset[str], changes: ChangeFeed) -> None:
        """Tell the cache and the listeners what the mirror has committed."""
        if self.cache is not None:
            self.cache.invalidate(f"public.{table}" for table in tables)
        changes.notice()

    def _hears_changes(self) -> bool:
        return bool(self.extra_events.get(f"on_{CHANGE}"))

    def _tell_change(self, change: Any) -> None:
        self.dispatch(CHANGE, change)

    async def _tell_statistics(self) -> None:
        while True:
            await asyncio.sleep(self.settings.stats_seconds)
            try:
                _log.info("statistics", extra=self._statistics())
            except Exception:  # a figure that cannot be had is no reason to say no more
                _log.exception("the statistics could not be told")

    def _statistics(self) -> dict[str, Any]:
        figures = self.stats()
        cache = self.db.get_cache_stats()
        return {
            "guilds": figures["mirror"]["reconciled"],
            "rows_written": figures["written"]["rows"],
            "events_written": figures["written"]["events"],
            "rows_waiting": figures["buffer"]["rows"],
            "events_waiting": figures["queue"]["events"],
            "connections": f"{figures['pool']['active']}/{figures['pool']['max']}",
            "cache_hit_rate": round(cache["hit_rate"], 3) if cache else None,
            "cache_size": cache["size"] if cache else None,
            "slow_queries": len(figures["database"]["slow"]),
        }

    async def _open_journal(self, name: str) -> Journal | None:
        settings = self.settings
        if settings.spool == "off":
            return None
        try:
            return await Journal.open(settings.data_dir / SPOOL, name, max_bytes=settings.spool_max_mb * 2**20)
        except SpoolError as error:
            if settings.spool == "always":
                raise
            _log.error("going on without a spool, an outage may lose events: %s", error)
            return None

    async def on_error(self, event_method: str, /, *args: Any, **kwargs: Any) -> None:
        """Log what a listener raised; the bot lives on."""
        _log.exception("a listener of %s failed", event_method)

    async def _find_gateway(self) -> int:
        """Set the gateway's address, which sessions that cannot be resumed come back to, and return the shard count."""
        shards, url, _ = await self.http.get_bot_gateway()
        tap.set_gateway(self.settings.discord_gateway_url or url)
        self.shard_count = shards  # so that discord.py does not ask again, and takes the address above
        return shards


def cache_flags(kept: Literal["none", "voice", "all"]) -> discord.MemberCacheFlags:
    """Return which members discord.py keeps in memory."""
    if kept == "none":
        return discord.MemberCacheFlags.none()
    return discord.MemberCacheFlags(voice=True, joined=kept == "all")

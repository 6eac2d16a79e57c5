"""`Guildbook`: the discord.py bot, extended with the database, the mirror and the cog loader."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import discord
from discord.ext import commands

from utils.bot import converters, view_store
from utils.bot.change_dispatcher import ChangeDispatcher
from utils.bot.command_errors import logger_of, report_command_error
from utils.bot.command_sync import sync_commands
from utils.bot.command_tree import CommandTree
from utils.bot.intents import GatewayIntents
from utils.bot.invocations import Context, Invocations
from utils.bot.listeners import CHANGE_EVENT, FROM_MIRROR, Present, find_problem, is_event
from utils.bot.loader import Loader
from utils.bot.member_events import MemberEvents
from utils.bot.prefixes import Prefixes
from utils.bot.scheduler import Scheduler
from utils.bot.watchdog import Watchdog
from utils.database import Pool
from utils.database.access import Database
from utils.database.cache import Channel, QueryCache
from utils.database.orm import SessionScope
from utils.exceptions import CogError, DatabaseError, GuildbookError, SettingsError, SpoolError
from utils.logs import RateLimit, log_once
from utils.mirror import Mirror
from utils.mirror.change_feed import ChangeFeed, MirrorChange, read_listener_positions
from utils.mirror.discord import tap
from utils.mirror.discord.intents import mirror_intents
from utils.mirror.discord.member_cache import MemberCache
from utils.mirror.discord.source import DiscordSource
from utils.mirror.reconcile.reconciler import ReconcilePolicy
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue
from utils.mirror.write.writer import FlushPolicy
from utils.operations.confirm import Confirmations
from utils.operations.slash import Operators
from utils.operations.upkeep import statistics
from utils.service import application, metrics
from utils.service.lease import Lease
from utils.settings import Settings
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: GET /readyz tells when rows have waited this many seconds for a database that refuses them.
MAX_DELAY_SECONDS = 60.0

#: Directory of the journals, under DATA_DIR.
SPOOL_DIRECTORY = "spool"
#: Seconds to close the journal.
JOURNAL_TIMEOUT = 3.0
#: Seconds for each of: cancelling scheduled work, cancelling operator commands, rolling back cogs' open transactions.
STOP_TIMEOUT = 3.0
#: Seconds to wait for running operator commands to answer before a command shuts the bot down.
ANSWER_TIMEOUT = 30.0
#: Errors of users that are logged within a minute, of all and of one.
USER_ERRORS_PER_MINUTE, ERRORS_PER_USER = 60, 10
#: Errors of listeners that are logged within a minute, of all and of one line of code.
LISTENER_ERRORS_PER_MINUTE, ERRORS_PER_LISTENER = 60, 10
#: Why a cog cannot wait for Discord while it is set up, and what to do.
NOT_CONNECTED = (
    "cogs are loaded before the bot connects, so it would wait for ever; await it in a task (self.spawn) or in a loop's"
    " before_loop"
)
#: By value of HELP_COMMAND.
HELP_COMMANDS: dict[str, Callable[[], commands.HelpCommand | None]] = {
    "none": lambda: None,
    "default": commands.DefaultHelpCommand,
    "minimal": commands.MinimalHelpCommand,
}


class Guildbook(commands.AutoShardedBot):
    """Mirrors the bot's guilds into the database and runs the cogs.

    `lease` must have been acquired. `extensions` are the cogs' modules; None loads everything in `cogs/`.
    `refused_intents` are privileged intents for which Discord closed an earlier connection.
    """

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        lease: Lease,
        *,
        extensions: Iterable[str] | None = None,
        refused_intents: frozenset[str] = frozenset(),
    ) -> None:
        # discord.py warns at start-up when the optional voice libraries are missing. This bot does not use voice.
        discord.VoiceClient.warn_nacl = discord.VoiceClient.warn_dave = False
        super().__init__(
            command_prefix=commands.when_mentioned,  # get_prefix adds the others
            tree_cls=CommandTree,
            help_command=None,
            intents=mirror_intents(settings.member_cache),
            chunk_guilds_at_startup=False,
            member_cache_flags=member_cache_flags(settings.member_cache),
            max_messages=settings.message_cache or None,
            enable_raw_presences=True,
            allowed_mentions=discord.AllowedMentions.none(),
        )
        view_store.install(self)
        converters.install()
        self.settings: Settings = settings
        #: The commands, components and forms that are running.
        self.invocations: Invocations = Invocations(bound=settings.command_timeout_seconds)
        self.cache: QueryCache | None = None
        if settings.cache_max_results:
            self.cache = QueryCache(max_results=settings.cache_max_results, ttl=settings.cache_ttl_seconds)
        #: The database API for cogs.
        self.db: Database = Database(
            pool,
            cache=self.cache,
            slow_ms=settings.slow_query_ms,
            log_queries=settings.environment == "development",
            orm_connections=settings.orm_connections,
            transaction_timeout=settings.db_transaction_timeout,
        )
        #: Who may run operator commands, and the ones that are running.
        self.operators: Operators = Operators(self, settings.admin_user_ids)
        #: Which errors that users cause are logged: anybody can cause them.
        self.logged_user_errors: RateLimit = RateLimit(USER_ERRORS_PER_MINUTE, 60.0, per_key=ERRORS_PER_USER)
        #: Which errors of listeners are logged with their tracebacks, and which are said to be left out.
        self.logged_listener_errors: RateLimit = RateLimit(
            LISTENER_ERRORS_PER_MINUTE, 60.0, per_key=ERRORS_PER_LISTENER
        )
        self._noticed_listeners: RateLimit = RateLimit(LISTENER_ERRORS_PER_MINUTE, 60.0, per_key=1)
        #: Confirmations that wait for a button to be pressed.
        self.confirmations: Confirmations = Confirmations()
        self.add_listener(self.confirmations.on_interaction)
        self.lease: Lease = lease
        self.loader: Loader = Loader(self, extensions)
        #: Names the cog that blocks the event loop.
        self.watchdog: Watchdog = Watchdog(self.loader.modules)
        self._changes = ChangeDispatcher(pool, lambda: self.extra_events.get(f"on_{CHANGE_EVENT}", []))
        #: The intents of the gateway session.
        self.gateway_intents: GatewayIntents = GatewayIntents(self, refused=refused_intents)
        #: The prefixes of text commands.
        self.prefixes: Prefixes = Prefixes(settings.command_prefix)
        self.reset_help_command()
        self.scheduler: Scheduler = Scheduler(settings, pool, notify=self.operators.notify)
        #: Why an operator command shut the bot down; None if none did.
        self.shutdown_error: GuildbookError | None = None
        #: Whether nothing may be written to the database before an operator has decided; set by the process.
        self.is_held: bool = False
        self._pool: Pool = pool
        self._channel: Channel | None = None
        self._users: dict[str, Any] | None = None
        self._background_tasks: list[asyncio.Task[None]] = []
        self._member_events: MemberEvents | None = None
        if settings.events_from_mirror:
            self._member_events = MemberEvents(self, pool, super().dispatch)
        self._mirror: Mirror | None = None
        self._journal: Journal | None = None
        tap.set_api_base(settings.discord_api_base)

    @property
    def mirror(self) -> Mirror:
        """The mirror. It exists once the bot has logged in; raises `GuildbookError` before."""
        if self._mirror is None:
            raise GuildbookError("the mirror does not exist before the login to Discord: use it from cog_load on")
        return self._mirror

    def get_db_session(self) -> SessionScope:
        """Return a session that joins the open transaction, or else uses a connection of its own.

        `async with bot.get_db_session() as session`: the end of the block commits, an exception rolls back.
        `session = await bot.get_db_session()`: you commit, and you `await session.close()`.
        """
        return self.db.session()

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Return whether every available guild has been reconciled, with progress figures for GET /readyz."""
        if self._mirror is None:
            return False, {"state": "not logged in yet"}
        ready, progress = self._mirror.is_ready()
        guilds = self._mirror.reconciler.guilds
        listings = {id: state.listing.seen for id, state in guilds.items() if state.listing is not None}
        writer = self._mirror.writer
        waiting: dict[str, Any] = {"rows_waiting": len(writer.buffer), "events_waiting": len(writer.queue)}
        if (delay := writer.delay()) is not None and delay[0] > MAX_DELAY_SECONDS:
            seconds, error = delay
            ready, waiting["delayed"] = False, {"seconds": round(seconds), "error": error}
        return ready, {**progress, **waiting, "members_received": listings}

    def stats(self) -> dict[str, Any]:
        """Return current figures of guilds, users, the lease, pool, cogs, mirror, buffers, spool and writer.

        Times are in seconds, sizes in bytes. `guilds` are counted by discord.py, and `users` in the database every
        STATS_SECONDS (`total`, `bots` and `at`; None if that did not work). `batches` are the rows of batches that
        wait, by table. `mirror`, `buffer`, `queue`, `batches`, `spool` and `written` are None before the login.
        """
        stats: dict[str, Any] = {
            "guilds": {"total": len(self.guilds), "unavailable": sum(guild.unavailable for guild in self.guilds)},
            "users": self._users,
            "lease": self.lease.describe(),
            "pool": self._pool.pool_stats(),
            "database": self.db.get_stats(),
            "cogs": {state.name: state.state for state in self.loader.states()},
        }
        if self._mirror is None:
            return stats | dict.fromkeys(("mirror", "buffer", "queue", "batches", "spool", "written"))
        writer, journal = self._mirror.writer, self._journal
        queue = writer.queue
        spool = None
        if journal is not None:
            spool = {"events": journal.records, "bytes": journal.size, "trouble": journal.failure}
        return stats | {
            "mirror": self._mirror.is_ready()[1],
            "buffer": {"rows": len(writer.buffer), "oldest": writer.buffer.age, "dropped": writer.rows_dropped},
            "queue": {
                "events": len(queue), "oldest": queue.age, "on_disk": queue.is_spilled, "dropped": queue.dropped,
            },
            "batches": self._mirror.batches.waiting,
            "spool": spool,
            "written": {"rows": writer.rows_written, "events": writer.events_written},
        }  # fmt: skip

    def update_metrics(self) -> None:
        """Update the gauges shown by GET /metrics."""
        if self._mirror is None:
            return
        self._mirror.update_metrics()
        writer = self._mirror.writer
        metrics.buffer_rows.set(len(writer.buffer))
        metrics.queue_events.set(len(writer.queue))
        metrics.waiting_seconds.labels("row").set(writer.buffer.age)
        metrics.waiting_seconds.labels("event").set(writer.queue.age)
        for table, rows in self._mirror.batches.waiting.items():
            metrics.batch_rows.labels(table).set(rows)
        metrics.spool_bytes.set(0 if self._journal is None else self._journal.size)

    async def setup_hook(self) -> None:
        """Start the mirror and load the cogs. discord.py calls this between the login and the gateway connection."""
        shards = await self._configure_gateway()
        settings, fence = self.settings, self.lease.fence
        if fence is None:
            raise GuildbookError("the bot does not hold the lease: acquire it before the login")
        await self._claim_database()
        self._journal = await self._open_journal(fence.holder)
        queue = EventQueue(self._journal, spool=settings.spool, max_rows=settings.buffer_max_rows)
        await self.db.connect()
        if self.cache is not None:
            await self.cache.load(self._pool)
            self._channel = Channel(self.cache, self._pool.direct, self._pool)
            await self._channel.start()
        self._changes.resume_from(await read_listener_positions(self._pool))
        changes = ChangeFeed(
            self._pool,
            self._dispatch_change,
            has_listeners=self._has_change_listeners,
            positions=self._changes.positions,
            wait_for_room=self._changes.wait_for_room,
        )
        self._mirror = Mirror(
            self._pool,
            DiscordSource(self),
            fence,
            queue,
            shards=shards,
            flush_policy=FlushPolicy(
                flush_rows=settings.flush_rows,
                flush_seconds=settings.flush_seconds,
                retry_seconds=settings.db_retry_seconds,
                retry_max_seconds=settings.db_retry_max_seconds,
            ),
            reconcile_policy=ReconcilePolicy(
                page_timeout=settings.chunk_timeout_seconds, cooldown=settings.chunk_cooldown_seconds
            ),
            spool=settings.data_dir / SPOOL_DIRECTORY if settings.spool != "off" else None,
            on_lost=self.lease.give_up,
            has_slept=self.lease.was_suspended,
            on_written=lambda tables: self._on_written(tables, changes),
            member_cache=partial(MemberCache, self) if settings.member_cache == "all" else None,
            live_events=None if self._member_events is None else self._member_events.live,
        )
        tap.install(self, self._mirror)
        await self._mirror.replay()
        self._mirror.start()
        self.gateway_intents.grant(self.application_flags.value)
        self.watchdog.start()
        await self.loader.load_all()
        self.gateway_intents.settle()
        self.loader.log_warnings()
        await sync_commands(self)
        self._start_task(changes.run(), "change feed")
        self._start_task(self._log_statistics(), "statistics")
        self.scheduler.start()
        _log.info("logged in as %s", self.user, extra={"shards": shards, "epoch": fence.epoch, "holder": fence.holder})

    async def reconnect_gateway(self) -> None:
        """Drop cached data and start new gateway sessions, so that Discord sends everything again. For restores."""
        await self.db.renew()
        await tap.begin_new_sessions(self)

    async def add_cog(self, cog: commands.Cog, /, **how: Any) -> None:
        """Add a cog. Raises `CogError` if it needs a privileged intent that Discord does not grant."""
        self.gateway_intents.admit(cog)
        await super().add_cog(cog, **how)
        self.prefixes.find_hooks(self.cogs.values())

    async def remove_cog(self, name: str, /, **how: Any) -> commands.Cog | None:
        """Remove a cog and return it; None if there is none of this name."""
        try:
            return await super().remove_cog(name, **how)
        finally:
            self.prefixes.find_hooks(self.cogs.values())

    async def get_prefix(self, message: discord.Message, /) -> list[str]:
        """Return the prefixes of text commands for a message: mentions, and COMMAND_PREFIX or what cogs say."""
        return await self.prefixes.find(self, message)

    def reset_help_command(self) -> None:
        """Use the help command of HELP_COMMAND again."""
        self.help_command = HELP_COMMANDS[self.settings.help_command]()

    def present(self) -> Present:
        """Return what listeners can rely on: the session's intents and discord.py's caches."""
        provided = frozenset() if self._member_events is None else FROM_MIRROR
        return Present(self.intents, self.settings.member_cache, self.settings.message_cache, provided)

    def dispatch(self, event_name: str, /, *args: Any, **kwargs: Any) -> None:
        """Call the listeners of an event, unless the mirror dispatches it (EVENTS_FROM_MIRROR=1)."""
        if self._member_events is None or not self._member_events.intercept(event_name, *args):
            super().dispatch(event_name, *args, **kwargs)

    async def wait_until_ready(self) -> None:
        """Wait until the cache of guilds is filled. Raises `CogError` while a cog is set up: it would wait for ever."""
        if not self.is_ready() and self.loader.is_setting_up():
            raise CogError(f"wait_until_ready() cannot be awaited here: {NOT_CONNECTED}")
        await super().wait_until_ready()

    if not TYPE_CHECKING:  # authors keep discord.py's overloads, one for each event

        def wait_for(self, event: str, /, **how: Any) -> Coroutine[Any, Any, Any]:
            """Wait for an event. Warns of one that is never dispatched; raises `CogError` while a cog is set up."""
            if not is_event(event):  # a cog's own
                return super().wait_for(event, **how)
            if self.loader.is_setting_up() and not self.is_ready():
                raise CogError(f"wait_for({event!r}) cannot be awaited here: {NOT_CONNECTED}")
            if (problem := find_problem(event, self.present())) is not None:
                caller = sys._getframe(1)
                where = f"{caller.f_globals.get('__name__', '?')}:{caller.f_lineno}"
                log_once(_log, ("wait_for", event, where), "%s: wait_for(%r): on_%s %s", where, event, event, problem)
            return super().wait_for(event, **how)

    def spool_events(self) -> None:
        """Keep events on disk from now on: the database cannot take them."""
        if self._mirror is not None:
            self._mirror.writer.queue.spill()

    def shut_down(self, error: GuildbookError) -> None:
        """Disconnect from Discord once running operator commands have answered; the process then ends with `error`."""

        async def close() -> None:
            await self.operators.wait_idle(ANSWER_TIMEOUT)
            await self.close()

        self.shutdown_error = error
        self._start_task(close(), "shutdown")

    async def stop_services(self, timeout: float) -> None:
        """Stop everything but the gateway connection: scheduled work, operator commands, the mirror and the database.

        The mirror gets `timeout` seconds to write its buffers. If the lease was lost, it writes nothing and the journal
        keeps the events. Does nothing for what never started.
        """
        self.watchdog.stop()
        await self._changes.stop(STOP_TIMEOUT)
        await self.scheduler.stop(STOP_TIMEOUT)
        await self.operators.stop(STOP_TIMEOUT)
        if self._mirror is not None:
            await self._mirror.stop(timeout, flush=not self.lease.lost.is_set())
        if self._journal is not None:
            await self._journal.close(JOURNAL_TIMEOUT)
            self._journal = None
        tasks, self._background_tasks = self._background_tasks, []
        await cancel_and_wait(tasks, STOP_TIMEOUT)
        await self.db.close(STOP_TIMEOUT)
        if self._channel is not None:
            await self._channel.stop()
            self._channel = None
        if self.cache is not None:
            await self.cache.close()

    async def close(self) -> None:
        """Give up what is running and tell its users, then disconnect from Discord."""
        self._changes.pause()
        await self.invocations.stop()
        await super().close()

    async def get_context(self, origin: Any, /, *, cls: Any = Context) -> Any:
        """Return the context of a text command; ours knows whether the command has answered."""
        return await super().get_context(origin, cls=cls)

    async def invoke(self, ctx: commands.Context[Any], /) -> None:
        """Run a text command, for at most as long as it may take."""
        if ctx.command is None:
            await super().invoke(ctx)
        else:
            task = self.invocations.run(ctx, super().invoke(ctx), f"command {ctx.command.qualified_name}")
            await asyncio.wait({task})

    async def on_error(self, event_method: str, /, *args: Any, **kwargs: Any) -> None:
        """Log an exception raised by a listener; of those that one raises again and again, a few a minute."""
        error = sys.exc_info()[1]
        trace = error.__traceback__ if error is not None else None
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace is not None else None
        if self.logged_listener_errors.admits((event_method, type(error), place)):
            left_out = self.logged_listener_errors.take_refused()
            more = f" ({left_out} more errors of listeners were left out)" if left_out else ""
            _log.exception("listener failed: %s%s", event_method, more)
        elif self._noticed_listeners.admits(event_method):
            _log.error("listener keeps failing: %s: %r; most of its errors are left out", event_method, error)

    async def on_command_error(self, context: commands.Context[Any], error: commands.CommandError, /) -> None:
        """Answer the error of a text command whose cog does not. A mention that names no command is ignored."""
        has_handler = (context.command is not None and context.command.has_error_handler()) or (
            context.cog is not None and context.cog.has_error_handler()
        )
        if not has_handler and not isinstance(error, commands.CommandNotFound):
            await report_command_error(context, error, logger_of(context.command))

    async def _configure_gateway(self) -> int:
        """Ask Discord for the gateway's address and shard count, apply both, and return the shard count.

        The address also applies to sessions that cannot be resumed.
        """
        shards, url, _ = await self.http.get_bot_gateway()
        tap.set_gateway(self.settings.discord_gateway_url or url)
        self.shard_count = shards  # otherwise discord.py asks again and ignores the address above
        return shards

    async def _claim_database(self) -> None:
        """Record whose database it is. Raises `SettingsError` if it belongs to another application.

        That application's guilds would all count as left.
        """
        assert self.application_id is not None, "logged in"
        owner = await application.claim(self._pool, self.application_id)
        if owner != self.application_id:
            raise SettingsError(
                f"DISCORD_TOKEN: the database belongs to application {owner}, and this token to application"
                f" {self.application_id}: use that application's token, or another database (DATABASE_URL), or give the"
                f" database to this one with python bot.py db adopt {self.application_id}"
            )

    async def _open_journal(self, name: str) -> Journal | None:
        settings = self.settings
        if settings.spool == "off":
            return None
        try:
            return await Journal.open(
                settings.data_dir / SPOOL_DIRECTORY, name, max_bytes=settings.spool_max_mb * 2**20
            )
        except SpoolError as error:
            if settings.spool == "always":
                raise
            _log.error("continuing without a spool: a database outage may lose events: %s", error)
            return None

    def _on_written(self, tables: frozenset[str], changes: ChangeFeed) -> None:
        """Invalidate cached results and wake the change feed after the mirror has committed."""
        if self.cache is not None:
            self.cache.invalidate(f"{self._pool.placement.main}.{table}" for table in tables)
        changes.notice()

    def _has_change_listeners(self) -> bool:
        return bool(self.extra_events.get(f"on_{CHANGE_EVENT}"))

    def _dispatch_change(self, change: MirrorChange) -> None:
        discord.Client.dispatch(self, CHANGE_EVENT, change)  # for wait_for, and a method of a subclass
        self._changes.dispatch(change)

    def _start_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._background_tasks.append(asyncio.create_task(work, name=name))

    async def _log_statistics(self) -> None:
        while True:
            try:
                people = await statistics.count_people(self._pool)
                self._users = {"total": people["users"], "bots": people["bots"], "at": people["at"]}
            except DatabaseError:  # which whoever needs the database reports
                self._users = None
            await asyncio.sleep(self.settings.stats_seconds)
            try:
                _log.info("statistics", extra=self._statistics())
            except Exception:
                _log.exception("statistics failed")

    def _statistics(self) -> dict[str, Any]:
        stats = self.stats()
        cache = None if self.cache is None else self.cache.stats()
        return {
            "guilds": stats["mirror"]["reconciled"],
            "users": None if self._users is None else self._users["total"],
            "rows_written": stats["written"]["rows"],
            "events_written": stats["written"]["events"],
            "rows_waiting": stats["buffer"]["rows"],
            "events_waiting": stats["queue"]["events"],
            "connections": f"{stats['pool']['active']}/{stats['pool']['max']}",
            "cache_hit_percent": None if cache is None else cache["hit_rate"],
            "cache_size": None if cache is None else cache["size"],
            "slow_queries": len(stats["database"]["slow"]),
        }


def member_cache_flags(policy: Literal["none", "voice", "all"]) -> discord.MemberCacheFlags:
    """Return which members discord.py keeps in memory, for a value of MEMBER_CACHE."""
    if policy == "none":
        return discord.MemberCacheFlags.none()
    return discord.MemberCacheFlags(voice=True, joined=policy == "all")

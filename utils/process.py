"""One process of the bot from its start to its end, whichever way it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import discord

from utils import logs, migrations
from utils.bot import Guildbook
from utils.database import Database
from utils.database.embedded import EmbeddedServer
from utils.database.partitions import ensure_partitions
from utils.database.urls import resolve, resolve_direct
from utils.errors import GuildbookError, MigrationError, SettingsError
from utils.service import heap, metrics
from utils.service.health import HealthServer
from utils.settings import DEVELOPER_PORTAL, Settings

_log = logging.getLogger(__name__)

CHECK_SECONDS = 30.0
PARTITION_SECONDS = 24 * 3600.0
#: How often the event loop is felt for; a stall is seen to this accuracy.
PULSE_SECONDS = 0.02
#: Seconds that a step of the end keeps back for those after it.
KEPT_BACK = 6.0
#: Seconds for each step after a second signal.
HURRIED_SECONDS = 1.0
#: Discord's close codes that mean a wrong setting (API reference, "Gateway Close Event Codes").
_WRONG_TOKEN, _WRONG_INTENTS = 4004, 4014


class Process:
    """Starts everything in its order, runs until a signal or an error, and ends everything in the reverse order."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.server: EmbeddedServer | None = None
        self.db: Database | None = None
        self.health: HealthServer | None = None
        self.bot: Guildbook | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._beside: set[asyncio.Task[None]] = set()
        self._ends_at = 0.0
        self._db_answers = True

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT; raise what else ended it, after the same clean-up.

        Raises `SettingsError` for what the operator has to set right, `GuildbookError` for what else is known.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        work = asyncio.create_task(self._work(), name="bot")
        stopped = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            was_asked_to = self._stop.is_set() and not work.done()
            await self._end(work)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        if was_asked_to:
            _log.info("stopped")
            return
        error = work.exception()
        if error is not None:
            raise explained(error, self.settings) from error
        raise GuildbookError("the connection to Discord was closed for good, though nobody asked this process to stop")

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            _log.warning("%s again: hurrying", signal.Signals(number).name)
            self._hurry.set()
        else:
            _log.info("%s: stopping", signal.Signals(number).name)
            self._stop.set()

    # --- the start

    async def _work(self) -> None:
        settings = self.settings
        assert settings.discord_token is not None, "the command line has asked for it"
        target = resolve(settings)
        if target is None:
            self.server = EmbeddedServer(settings.data_dir)
            await self.server.start()
            target = self.server.target()
        self.db = Database(
            target,
            direct=resolve_direct(settings),
            pool_min=settings.db_pool_min,
            pool_max=settings.db_pool_max,
            connect_timeout=settings.db_connect_timeout,
            command_timeout=settings.db_command_timeout,
        )
        await self.db.connect()
        await self._bring_schema_up_to_date(self.db)
        self._repeat("partitions", PARTITION_SECONDS, self._make_partitions)
        await self._make_partitions()
        if settings.effective_health_port is not None:
            self.health = HealthServer(
                settings.health_host,
                settings.effective_health_port,
                ready=self._readiness,
                before_metrics=self._measure,
            )
            await self.health.start()
        self._repeat("database check", CHECK_SECONDS, self._check_database)
        self.bot = Guildbook(settings, self.db)
        heap.settle()
        self._run_beside("loop watch", self._watch_loop())
        async with self.bot:
            await self.bot.start(settings.discord_token.get_secret_value())

    async def _bring_schema_up_to_date(self, db: Database) -> None:
        if self.settings.auto_migrate:
            await migrations.upgrade(db)
        elif waiting := await migrations.pending(db):
            raise MigrationError(
                f"the schema is behind, revision {', '.join(waiting)} is not applied and AUTO_MIGRATE is off:"
                " run python bot.py db upgrade"
            )

    async def _make_partitions(self) -> None:
        assert self.db is not None
        try:
            async with self.db.acquire() as connection:
                await ensure_partitions(connection, self.db.now())
        except GuildbookError as exc:  # the default partition takes the rows until the next try
            _log.warning("next months' partitions not made: %s", exc)

    # --- beside the bot

    def _run_beside(self, name: str, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _repeat(self, name: str, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        async def repeatedly() -> None:
            while True:
                await asyncio.sleep(seconds)
                try:
                    await work()
                except Exception:  # it comes round again
                    _log.exception("%s failed", name)

        self._run_beside(name, repeatedly())

    async def _check_database(self) -> None:
        assert self.db is not None
        self._db_answers = await self.db.check()

    async def _watch_loop(self) -> None:
        longest, last = 0.0, time.perf_counter()
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            now = time.perf_counter()
            if now - last - PULSE_SECONDS > longest:
                longest = now - last - PULSE_SECONDS
                metrics.loop_stall_max.set(longest)
            last = now

    def _readiness(self) -> tuple[bool, dict[str, Any]]:
        if self.bot is None:
            return False, {"state": "starting"}
        ready, details = self.bot.readiness()
        return ready and not self._stop.is_set(), {**details, "database": self._db_answers}

    def _measure(self) -> None:
        if self.db is not None:
            for state, count in self.db.pool_stats().items():
                metrics.pool_connections.labels(state).set(count)

    # --- the end

    async def _end(self, work: asyncio.Task[None]) -> None:
        self._ends_at = time.monotonic() + self.settings.shutdown_seconds
        bot, health, db, server = self.bot, self.health, self.db, self.server
        if bot is not None:
            await self._step("leaving Discord", lambda _: bot.close())
        work.cancel()
        await self._step("the bot", lambda _: _ended(work))
        if bot is not None:
            await self._step("writing what waits", bot.stop_mirror)
        for task in self._beside:
            task.cancel()
        if health is not None:
            await self._step("the health server", health.stop)
        if db is not None:
            await self._step("the connections", db.close)
        if server is not None:
            await self._step("the embedded server", server.stop, kept_back=0.0)

    async def _step(self, what: str, work: Callable[[float], Awaitable[None]], *, kept_back: float = KEPT_BACK) -> None:
        """Do one part of the end in the time that is left for it; the others are done whatever becomes of it."""
        seconds = max(HURRIED_SECONDS, self._ends_at - time.monotonic() - kept_back)
        if self._hurry.is_set():
            seconds = HURRIED_SECONDS
        task = asyncio.ensure_future(work(seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        waiting = {task} if self._hurry.is_set() else {task, hurry}
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=HURRIED_SECONDS)
        hurry.cancel()
        if not task.done():
            task.cancel()
            _log.warning("%s: cut off", what)
        elif not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: %r", what, error, exc_info=error)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})


def explained(error: BaseException, settings: Settings) -> BaseException:
    """Return what an operator can do something with in place of discord.py's and aiohttp's errors."""
    code = error.code if isinstance(error, discord.ConnectionClosed) else None
    if isinstance(error, discord.LoginFailure) or code == _WRONG_TOKEN:
        return SettingsError(
            f"DISCORD_TOKEN: Discord does not know this token; get a new one at {DEVELOPER_PORTAL} > your application"
            " > Bot > Reset Token"
        )
    if isinstance(error, discord.PrivilegedIntentsRequired) or code == _WRONG_INTENTS:
        return SettingsError(
            "DISCORD_TOKEN: this application may not see members: switch on 'Server Members Intent' at"
            f" {DEVELOPER_PORTAL} > your application > Bot > Privileged Gateway Intents, then start again"
        )
    if isinstance(error, discord.ConnectionClosed):
        return GuildbookError(f"Discord's gateway closed the connection for good: code {error.code} {error.reason}")
    if isinstance(error, discord.HTTPException | discord.GatewayNotFound):
        return GuildbookError(f"Discord at {settings.discord_api_base} does not answer as it should: {error}")
    if isinstance(error, aiohttp.ClientError):
        return GuildbookError(f"Discord at {settings.discord_api_base} cannot be reached: {error}")
    return error


def run(settings: Settings) -> None:
    """Run the bot until a signal. Raises like `Process.run`."""

    async def main() -> None:
        await Process(settings).run()

    logs.configure(settings.log_format, settings.log_level, secrets=settings.secrets())
    asyncio.run(main())

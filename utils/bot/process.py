"""One process of the bot from its start to its end, whichever way it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import aiohttp
import discord

from utils import logs
from utils.bot.client import SPOOL, Guildbook
from utils.database import Pool
from utils.database.embedded import open_target
from utils.database.partitions import ensure_partitions
from utils.exceptions import DatabaseUnavailable, GuildbookError, LeaseLost, SettingsError
from utils.mirror.spool.journal import is_dead
from utils.operations import migrations
from utils.operations.backup import recover
from utils.operations.backup.service import BackupService
from utils.service import heap, metrics
from utils.service.health import HealthServer
from utils.service.lease import Lease, has_table, holder
from utils.settings import DEVELOPER_PORTAL, Settings

_log = logging.getLogger(__name__)

CHECK_SECONDS = 30.0
PARTITION_SECONDS = 24 * 3600.0
#: How often the event loop is felt for; a stall is seen to this accuracy.
PULSE_SECONDS = 0.02
#: Seconds that a step of the end keeps back for those after it.
KEPT_BACK = 6.0
#: Seconds of the time for writing that are kept for the disk to take what the database did not.
SPOOL_SECONDS = 5.0
#: Seconds for each step after a second signal.
HURRIED_SECONDS = 1.0
#: Seconds for leaving when another process has taken over.
LEAVE_SECONDS = 20.0
#: Seconds before it is begun anew after a start that the database cut short.
ANEW_SECONDS = 1.0
#: Discord's close codes that mean a wrong setting (API reference, "Gateway Close Event Codes").
_WRONG_TOKEN, _WRONG_INTENTS = 4004, 4014


class Process:
    """Starts everything in its order, runs until a signal or an error, and ends everything in the reverse order."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.db: Pool | None = None
        self.health: HealthServer | None = None
        self.lease: Lease | None = None
        self.bot: Guildbook | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._beside: set[asyncio.Task[None]] = set()
        self._ends_at = 0.0
        #: Seconds that stopping the embedded server may take.
        self._stop_timeout = settings.shutdown_seconds
        self._opened = AsyncExitStack()
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
        assert error is not None, "it goes on for ever"
        raise explained(error, self.settings) from error

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
        target = await self._opened.enter_async_context(
            open_target(settings.target, settings.data_dir, stop_timeout=lambda: self._stop_timeout)
        )
        self.db = Pool(
            target,
            direct=settings.direct_target,
            pool_min=settings.db_pool_min,
            pool_max=settings.db_pool_max - settings.orm_connections,
            connect_timeout=settings.db_connect_timeout,
            command_timeout=settings.db_command_timeout,
        )
        if settings.effective_health_port is not None:
            self.health = HealthServer(
                settings.health_host,
                settings.effective_health_port,
                ready=self._readiness,
                alive=self._aliveness,
                before_metrics=self._measure,
            )
            await self.health.start()  # before all that may take its time: whoever stands by is healthy
        await self.db.connect()
        await self._offer_recovery(self.db)
        if not await has_table(self.db):
            # Without a schema there is no lease to wait for.
            await migrations.prepare_schema(self.db, auto_migrate=settings.auto_migrate)
        self._repeat("partitions", PARTITION_SECONDS, self._make_partitions_in_time)
        self._repeat("database check", CHECK_SECONDS, self._check_database)
        self._run_beside("loop watch", self._watch_loop())
        while True:
            await self._act(self.db)

    async def _act(self, db: Pool) -> None:
        """Stand by until the lease is ours, then run the bot until another process has it, or its start met an outage.

        Raises what ends the bot for good.
        """
        settings = self.settings
        assert settings.discord_token is not None, "the command line has asked for it"
        lease = self.lease = Lease(db.target, holder(), is_dead=partial(is_dead, settings.data_dir / SPOOL))
        await lease.wait()
        lost = asyncio.create_task(lease.lost.wait(), name="lost")
        running: asyncio.Task[None] | None = None
        try:
            await migrations.prepare_schema(db, auto_migrate=settings.auto_migrate)
            await self._make_partitions()
            self.bot = Guildbook(settings, db, lease)
            heap.settle()
            running = asyncio.create_task(self.bot.start(settings.discord_token.get_secret_value()), name="discord")
            await asyncio.wait({running, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                await running
                if self.bot.ended_with is not None:
                    raise self.bot.ended_with
                raise GuildbookError("the connection to Discord was closed for good, though nobody asked for it")
        except LeaseLost:  # before anybody else has noticed
            lease.give_up()
        except DatabaseUnavailable as error:
            _log.error("the start was cut short, beginning anew: %s", error)
        finally:
            lost.cancel()
            if running is not None:
                running.cancel()
        await self._leave(lease, running)

    async def _leave(self, lease: Lease, running: asyncio.Task[None] | None) -> None:
        """Stop acting: when another process does, what waits goes to the journal, not to the database."""
        self._ends_at = time.monotonic() + LEAVE_SECONDS
        bot = self.bot
        if bot is not None:
            await self._step("leaving Discord", lambda _: bot.close())
        if running is not None:
            await self._step("the connection to Discord", lambda _: _ended(running))
        if bot is not None:
            await self._step("stopping the mirror", lambda seconds: bot.stop_mirror(_for_writing(seconds)))
        was_lost = lease.lost.is_set()
        await self._step("giving the lease back", lease.release, kept_back=0.0)
        self.bot = None
        if was_lost:
            _log.warning("the gateway is left: standing by until the process that acts has ended")
        else:
            await asyncio.sleep(ANEW_SECONDS)

    async def _offer_recovery(self, db: Pool) -> None:
        """Say what to type when the database has lost what a backup still has."""
        try:
            line = await recover.offer(db, BackupService(self.settings))
        except GuildbookError as exc:
            _log.warning("whether a backup should be restored could not be found out: %s", exc)
        else:
            if line is not None:
                _log.warning("%s", line)

    async def _make_partitions_in_time(self) -> None:
        if self.bot is not None:  # otherwise they are another process's business
            await self._make_partitions()

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
        await self.db.validate_connections()

    async def _watch_loop(self) -> None:
        longest, last = 0.0, time.perf_counter()
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            now = time.perf_counter()
            if now - last - PULSE_SECONDS > longest:
                longest = now - last - PULSE_SECONDS
                metrics.loop_stall_max.set(longest)
            last = now

    @property
    def _state(self) -> str:
        return "starting" if self.lease is None else str(self.lease.describe()["state"])

    def _aliveness(self) -> tuple[bool, dict[str, Any]]:
        return True, {"state": self._state}

    def _readiness(self) -> tuple[bool, dict[str, Any]]:
        if self.bot is None:
            return False, {"state": self._state}
        ready, details = self.bot.readiness()
        state = {"state": self._state, **details, "database": self._db_answers}
        return ready and not self._stop.is_set() and self._state != "lost", state

    def _measure(self) -> None:
        if self.db is not None:
            for state, count in self.db.pool_stats().items():
                metrics.pool_connections.labels(state).set(count)
        fence = None if self.lease is None or self.lease.lost.is_set() else self.lease.fence
        metrics.lease_epoch.set(0 if fence is None else fence.epoch)
        if self.bot is not None:
            self.bot.measure()

    # --- the end

    async def _end(self, work: asyncio.Task[None]) -> None:
        self._ends_at = time.monotonic() + self.settings.shutdown_seconds
        bot, health, db = self.bot, self.health, self.db
        if bot is not None:
            await self._step("leaving Discord", lambda _: bot.close())
        work.cancel()
        await self._step("the bot", lambda _: _ended(work))
        if bot is not None:
            written = await self._step("writing what waits", lambda seconds: bot.stop_mirror(_for_writing(seconds)))
            if not written:
                await self._step("leaving what waits to the disk", lambda _: bot.stop_mirror(0.0))
        if self.lease is not None:  # not before: what was written needed it
            await self._step("giving the lease back", self.lease.release, kept_back=KEPT_BACK - 2 * HURRIED_SECONDS)
        for task in self._beside:
            task.cancel()
        if health is not None:
            await self._step("the health server", health.stop)
        if db is not None:
            await self._step("the connections", db.close)
        await self._step("the embedded server", self._close_target, kept_back=0.0)

    async def _close_target(self, timeout: float) -> None:
        self._stop_timeout = timeout
        await self._opened.aclose()

    async def _step(self, what: str, work: Callable[[float], Awaitable[None]], *, kept_back: float = KEPT_BACK) -> bool:
        """Do one part of the end in the time that is left for it, and return whether it came to its own end.

        The others are done whatever becomes of it.
        """
        seconds = max(HURRIED_SECONDS, self._ends_at - time.monotonic() - kept_back)
        if self._hurry.is_set():
            seconds = HURRIED_SECONDS
        task = asyncio.ensure_future(work(seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        try:
            waiting = {task} if self._hurry.is_set() else {task, hurry}
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await asyncio.wait({task}, timeout=HURRIED_SECONDS)
        finally:
            hurry.cancel()
            is_cut_off = task.cancel()
        if is_cut_off:
            _log.warning("%s: cut off", what)
        elif not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: %r", what, error, exc_info=error)
        return not is_cut_off


def _for_writing(seconds: float) -> float:
    return max(seconds - SPOOL_SECONDS, seconds / 2)


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a task's end, whichever it is."""
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.debug("%s ended: %r", task.get_name(), error)


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

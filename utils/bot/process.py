"""`Process`: starts everything the bot needs, runs it until a signal or an error, and shuts it down in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from typing import Any

import aiohttp
import discord

from utils import logs, retrying
from utils.bot.client import SPOOL_DIRECTORY, Guildbook
from utils.bot.database_hold import DatabaseHold
from utils.database import Pool
from utils.database.address import open_target
from utils.database.ownership import own_names
from utils.database.partitions import ensure_partitions
from utils.exceptions import (
    MISSING_TABLE,
    DatabaseError,
    DatabaseUnavailable,
    GuildbookError,
    LeaseLost,
    SettingsError,
    expect_tables,
)
from utils.mirror.discord.intents import how_to_switch_on
from utils.mirror.records.rows import COUNTER_BITS
from utils.mirror.spool.journal import is_dead, newest_first_stamp
from utils.operations import migrations
from utils.operations.backup import recovery
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import backup_before
from utils.operations.doctor.configuration import find_draining_problem
from utils.operations.migrations.runner import Backup
from utils.service import metrics
from utils.service.health import HealthServer
from utils.service.heap import freeze_heap
from utils.service.lease import Lease, has_table, holder
from utils.settings import DEVELOPER_PORTAL, Settings

_log = logging.getLogger(__name__)

#: Seconds between two checks of the database and its pooled connections.
CHECK_INTERVAL = 5.0
#: Seconds between two checks that the coming months have partitions.
PARTITION_INTERVAL = 24 * 3600.0
#: Seconds between two measurements of the event loop: the resolution of `guildbook_loop_stall_max_seconds`.
STALL_INTERVAL = 0.02
#: Seconds that each shutdown step leaves for the steps after it.
RESERVED_SECONDS = 6.0
#: Seconds of the time for the last flush that are left for writing the journal, if the database does not take the rows.
JOURNAL_SECONDS = 5.0
#: Seconds for each shutdown step after a second signal.
HURRY_SECONDS = 1.0
#: Seconds to stop the bot after another process took over the lease.
STAND_DOWN_SECONDS = 20.0
#: Seconds to wait before another attempt, after a database outage interrupted the bot's start.
RESTART_DELAY = 1.0
#: How old a backup before an upgrade may be, so that a start which fails again makes no other one.
REUSE_BACKUP = timedelta(days=1)
#: Discord's close codes for a wrong token and wrong intents (API reference, "Gateway Close Event Codes").
_INVALID_TOKEN, _DISALLOWED_INTENTS = 4004, 4014


class Process:
    """Starts everything in order, runs until a signal or an error, and shuts everything down in reverse order."""

    def __init__(self, settings: Settings, *, before_login: Callable[[], None] = freeze_heap) -> None:
        """`before_login` is called each time before the bot logs in to Discord."""
        self.settings: Settings = settings
        self.pool: Pool | None = None
        self.health: HealthServer | None = None
        self.lease: Lease | None = None
        self.bot: Guildbook | None = None
        self._before_login = before_login
        #: Holds a database that has lost what a backup has.
        self.hold: DatabaseHold | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._background_tasks: set[asyncio.Task[None]] = set()
        #: When the shutdown must be complete, on the monotonic clock.
        self._deadline = 0.0
        self._is_database_up = True
        #: Epoch of the lease that this process took last.
        self._last_epoch = 0
        #: Privileged intents for which Discord closed the connection.
        self._refused_intents: frozenset[str] = frozenset()
        self._resources = AsyncExitStack()
        #: Seconds that stopping the embedded server may take.
        self._server_stop_timeout = settings.shutdown_seconds

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, then shut down. After an error, shut down and raise it.

        Raises `SettingsError` for what the operator must correct, `GuildbookError` for other known errors.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        main = asyncio.create_task(self._main(), name="bot")
        stopped = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait({main, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            was_signalled = self._stop.is_set() and not main.done()
            await self._shut_down(main)
            expect_tables(())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        if was_signalled:
            _log.info("stopped")
            return
        error = main.exception()
        assert error is not None, "unreachable: _main never returns"
        raise explain_error(error, self.settings) from error

    def _on_signal(self, number: signal.Signals) -> None:
        name = signal.Signals(number).name
        if self._stop.is_set():
            _log.warning("received %s again: hurrying", name)
            self._hurry.set()
        else:
            _log.info("received %s: stopping", name)
            self._stop.set()

    # --- start

    async def _main(self) -> None:
        settings = self.settings
        assert settings.discord_token is not None, "bot.py checks it"
        target = await self._resources.enter_async_context(
            open_target(
                settings.target,
                settings.data_dir,
                schema=settings.db_schema,
                stop_timeout=lambda: self._server_stop_timeout,
            )
        )
        self.pool = pool = Pool(
            target,
            direct=settings.direct_target,
            pool_min=settings.db_pool_min,
            pool_max=settings.db_pool_max - settings.orm_connections,
            connect_timeout=settings.db_connect_timeout,
            command_timeout=settings.db_command_timeout,
            acquire_timeout=settings.db_acquire_timeout,
            idle_seconds=settings.db_pool_idle_seconds,
            retry_seconds=settings.db_retry_seconds,
            retry_max_seconds=settings.db_retry_max_seconds,
        )
        retrying.defaults.attempts = settings.db_retry_attempts
        retrying.defaults.first_seconds = settings.db_retry_seconds
        retrying.defaults.max_seconds = settings.db_retry_max_seconds
        if settings.effective_health_port is not None:
            self.health = HealthServer(
                settings.health_host,
                settings.effective_health_port,
                ready=self._readiness,
                alive=self._liveness,
                before_metrics=self._update_metrics,
                application_id=settings.application_id,
            )
            await self.health.start()  # before the slow steps: a process in standby must be healthy
        await pool.connect()
        self.hold = DatabaseHold(settings, pool)
        await self._prepare_database(pool, self.hold)
        self._start_periodic("partitions", PARTITION_INTERVAL, self._maintain_partitions)
        self._start_periodic("database check", CHECK_INTERVAL, self._check_database)
        self._start_task("loop stalls", self._measure_stalls())
        while True:
            await self._run_bot(pool, self.hold)
            try:
                await self._prepare_database(pool, self.hold)
            except DatabaseUnavailable as error:
                _log.error("the database does not answer: %s", error)

    async def _prepare_database(self, pool: Pool, hold: DatabaseHold) -> None:
        """Wait while the database must not be written to, then give it its schema if it has none.

        Raises `MigrationError` if that is not allowed or fails, `DatabaseError` for other errors.
        """
        await hold.wait_until_usable()
        if self._last_epoch == 0:
            await self._suggest_restore(pool)
        if not await has_table(pool):
            await self._prepare_schema(pool)  # the lease needs its table
            await pool.renew()

    async def _prepare_schema(self, pool: Pool) -> None:
        await migrations.prepare_schema(pool, auto_migrate=self.settings.auto_migrate, backup=self._backup_before(pool))
        if not await migrations.pending(pool):
            expect_tables(own_names(pool.placement))

    async def _prepare_packs(self, pool: Pool) -> None:
        """Bring the tables of packs up to date. Only the process that holds the lease does."""
        await migrations.prepare_packs(pool, auto_migrate=self.settings.auto_migrate, backup=self._backup_before(pool))

    def _backup_before(self, pool: Pool) -> Backup:
        return backup_before("before upgrade", self.settings, pool, reuse=REUSE_BACKUP)

    async def _run_bot(self, pool: Pool, hold: DatabaseHold) -> None:
        """Wait for the lease, then run the bot until the lease is lost or a database outage interrupts its start.

        The caller repeats it. A fixed delay and no stamina: waiting for the lease and connecting to the database have
        their own back-off, and the number of attempts has no limit. Raises the errors that end the process.
        """
        settings = self.settings
        assert settings.discord_token is not None, "bot.py checks it"
        lease = self.lease = Lease(
            pool.target,
            holder(),
            is_dead=partial(is_dead, settings.data_dir / SPOOL_DIRECTORY),
            newest_epoch=self._newest_epoch,
        )
        if not await self._take_lease(lease, hold):
            return
        lost = asyncio.create_task(lease.lost.wait(), name="lease lost")
        missing = asyncio.create_task(lease.table_missing.wait(), name="lease table missing")
        running: asyncio.Task[None] | None = None
        try:
            await self._prepare_schema(pool)
            await self._prepare_packs(pool)
            await self._create_partitions(pool)
            self.bot = Guildbook(settings, pool, lease, refused_intents=self._refused_intents)
            self._before_login()
            running = asyncio.create_task(self.bot.start(settings.discord_token.get_secret_value()), name="discord")
            while True:
                await asyncio.wait({running, lost, missing}, return_when=asyncio.FIRST_COMPLETED)
                if not running.done():
                    await hold.wait_with(self.bot, lease, running)
                if running.done() or lease.lost.is_set():
                    break
                missing = asyncio.create_task(lease.table_missing.wait(), name="lease table missing")
            if not lease.lost.is_set():
                await running
                if self.bot.shutdown_error is not None:
                    raise self.bot.shutdown_error
                raise GuildbookError("the connection to Discord closed unexpectedly and discord.py did not reconnect")
        except LeaseLost as error:  # a write was refused before the lease's own check noticed
            lease.give_up(str(error))
        except DatabaseUnavailable as error:
            _log.error("start interrupted by a database outage, starting again: %s", error)
        except discord.PrivilegedIntentsRequired:
            if not self._refuse_intents():
                raise
        finally:
            lost.cancel()
            missing.cancel()
            if running is not None:
                running.cancel()
        await self._stand_down(lease, running)

    def _refuse_intents(self) -> bool:
        """Do without the privileged intents that only cogs need from now on; return False if there were none."""
        optional = frozenset() if self.bot is None else self.bot.gateway_intents.optional()
        if not optional:
            return False
        self._refused_intents |= optional
        _log.error(
            "Discord closed the connection because of privileged intents (code 4014): starting again without %s and the"
            " cogs that need them",
            " and ".join(sorted(optional)),
        )
        return True

    async def _take_lease(self, lease: Lease, hold: DatabaseHold) -> bool:
        """Wait for the lease; return False if the database was recreated meanwhile and must be prepared again."""
        try:
            self._last_epoch = (await lease.wait()).epoch
            if not await hold.is_needed():
                return True
        except DatabaseUnavailable as error:
            _log.error("the database does not answer: %s", error)
        except DatabaseError as error:
            if error.sqlstate not in MISSING_TABLE:
                raise
            _log.warning("the database was recreated while this process stood by")
        await lease.release(RESTART_DELAY)
        await asyncio.sleep(RESTART_DELAY)
        return False

    def _newest_epoch(self) -> int:
        """Return the newest epoch known without the database: this process's last one, or one in the spool. Blocking.

        The database does not know it if it was restored or recreated since.
        """
        return max(self._last_epoch, newest_first_stamp(self.settings.data_dir / SPOOL_DIRECTORY) >> COUNTER_BITS)

    async def _stand_down(self, lease: Lease, running: asyncio.Task[None] | None) -> None:
        """Stop the bot and release the lease. If another process holds the lease, events go to the journal only."""
        self._deadline = time.monotonic() + STAND_DOWN_SECONDS
        bot = self.bot
        if bot is not None:
            await self._shutdown_step("disconnecting from Discord", lambda _: bot.close())
        if running is not None:
            await self._shutdown_step("waiting for the gateway task", lambda _: _wait_for_end(running))
        if bot is not None:
            await self._shutdown_step("stopping the mirror", lambda seconds: bot.stop_services(_flush_time(seconds)))
        was_lost = lease.lost.is_set()
        await self._shutdown_step("releasing the lease", lease.release, reserve=0.0)
        self.bot = None
        if was_lost:
            _log.warning("disconnected from the gateway: standing by until the lease is free")
        else:
            await asyncio.sleep(RESTART_DELAY)

    async def _suggest_restore(self, pool: Pool) -> None:
        """Log the restore command if the database lost data that a backup has."""
        try:
            line = await recovery.suggest_restore(pool, BackupCatalog(self.settings))
        except GuildbookError as exc:
            _log.warning("could not check whether a backup should be restored: %s", exc)
        else:
            if line is not None:
                _log.warning("%s", line)

    async def _maintain_partitions(self) -> None:
        if self.bot is not None and self.pool is not None:  # in standby, the active process does it
            await self._create_partitions(self.pool)

    async def _create_partitions(self, pool: Pool) -> None:
        try:
            async with pool.acquire() as connection:
                await ensure_partitions(connection, pool.now())
        except GuildbookError as exc:  # the default partition takes the rows until the next attempt
            _log.warning("could not create the coming months' partitions: %s", exc)

    # --- background work

    def _start_task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._background_tasks.add(task)
        task.add_done_callback(self._background_tasks.discard)

    def _start_periodic(self, name: str, interval: float, work: Callable[[], Awaitable[None]]) -> None:
        async def repeat() -> None:
            while True:
                await asyncio.sleep(interval)
                try:
                    await work()
                except Exception:
                    _log.exception("%s failed", name)

        self._start_task(name, repeat())

    async def _check_database(self) -> None:
        assert self.pool is not None
        self._is_database_up = await self.pool.check()
        await self.pool.validate_connections()

    async def _measure_stalls(self) -> None:
        longest, last = 0.0, time.perf_counter()
        while True:
            await asyncio.sleep(STALL_INTERVAL)
            now = time.perf_counter()
            if now - last - STALL_INTERVAL > longest:
                longest = now - last - STALL_INTERVAL
                metrics.loop_stall_max.set(longest)
            last = now

    # --- the health server

    @property
    def state(self) -> str:
        """`starting`, `held`, or the state of the lease: `standby`, `active`, `unsure` or `lost`."""
        if self.hold is not None and self.hold.current is not None:
            return "held"
        return "starting" if self.lease is None else str(self.lease.describe()["state"])

    def _liveness(self) -> tuple[bool, dict[str, Any]]:
        return True, {"state": self.state}

    def _readiness(self) -> tuple[bool, dict[str, Any]]:
        held = {} if self.hold is None else self.hold.details()
        if self.bot is None:
            return False, {"state": self.state, **held}
        ready, details = self.bot.readiness()
        # A lease that was not renewed in time shows an outage within seconds, and its end at once.
        is_usable = self._is_database_up and self.state == "active"
        details = {"state": self.state, **details, "database": is_usable, **held}
        return ready and is_usable and not self._stop.is_set(), details

    def _update_metrics(self) -> None:
        if self.pool is not None:
            for state, count in self.pool.pool_stats().items():
                metrics.pool_connections.labels(state).set(count)
        fence = None if self.lease is None or self.lease.lost.is_set() else self.lease.fence
        metrics.lease_epoch.set(0 if fence is None else fence.epoch)
        if self.bot is not None:
            self.bot.update_metrics()

    # --- shutdown

    async def _shut_down(self, main: asyncio.Task[None]) -> None:
        self._deadline = time.monotonic() + self.settings.shutdown_seconds
        bot, health, pool = self.bot, self.health, self.pool
        if bot is not None:
            await self._shutdown_step("disconnecting from Discord", lambda _: bot.close())
        main.cancel()
        await self._shutdown_step("stopping the bot", lambda _: _wait_for_end(main))
        if bot is not None:
            is_written = await self._shutdown_step(
                "writing the buffers", lambda seconds: bot.stop_services(_flush_time(seconds))
            )
            if not is_written:
                await self._shutdown_step("writing the journal", lambda _: bot.stop_services(0.0))
        if self.lease is not None:  # after the last write, which needs it
            await self._shutdown_step(
                "releasing the lease", self.lease.release, reserve=RESERVED_SECONDS - 2 * HURRY_SECONDS
            )
        for task in self._background_tasks:
            task.cancel()
        if health is not None:
            await self._shutdown_step("stopping the health server", health.stop)
        if pool is not None:
            await self._shutdown_step("closing the pool", pool.close)
        await self._shutdown_step("stopping the embedded server", self._close_resources, reserve=0.0)

    async def _close_resources(self, timeout: float) -> None:
        self._server_stop_timeout = timeout
        await self._resources.aclose()

    async def _shutdown_step(
        self, name: str, step: Callable[[float], Awaitable[None]], *, reserve: float = RESERVED_SECONDS
    ) -> bool:
        """Run one step in the time that is left, minus `reserve` seconds, and return whether it finished.

        Errors are logged: the remaining steps always run.
        """
        seconds = max(HURRY_SECONDS, self._deadline - time.monotonic() - reserve)
        if self._hurry.is_set():
            seconds = HURRY_SECONDS
        task = asyncio.ensure_future(step(seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        try:
            waiting = {task} if self._hurry.is_set() else {task, hurry}
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await asyncio.wait({task}, timeout=HURRY_SECONDS)
        finally:
            hurry.cancel()
            was_cancelled = task.cancel()
        if was_cancelled:
            _log.warning("shutdown step timed out: %s", name)
        elif not task.cancelled() and (error := task.exception()) is not None:
            _log.error("shutdown step failed: %s: %r", name, error, exc_info=error)
        return not was_cancelled


def _flush_time(seconds: float) -> float:
    """Return how much of a shutdown step's time the flush may take; the rest is for the journal."""
    return max(seconds - JOURNAL_SECONDS, seconds / 2)


async def _wait_for_end(task: asyncio.Task[None]) -> None:
    """Wait until a task has ended, without raising its error."""
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.debug("%s ended: %r", task.get_name(), error)


def explain_error(error: BaseException, settings: Settings) -> BaseException:
    """Return an error that tells the operator what to do, in place of discord.py's and aiohttp's; others unchanged."""
    code = error.code if isinstance(error, discord.ConnectionClosed) else None
    if isinstance(error, discord.LoginFailure) or code == _INVALID_TOKEN:
        return SettingsError(
            f"DISCORD_TOKEN: Discord rejected this token; get a new one at {DEVELOPER_PORTAL} > your application"
            " > Bot > Reset Token"
        )
    if isinstance(error, discord.PrivilegedIntentsRequired) or code == _DISALLOWED_INTENTS:
        return SettingsError(
            f"DISCORD_TOKEN: this application is not allowed to see members; {how_to_switch_on('members')}"
        )
    if isinstance(error, discord.ConnectionClosed):
        return GuildbookError(f"Discord closed the gateway connection: code {error.code} {error.reason}")
    if isinstance(error, discord.HTTPException | discord.GatewayNotFound):
        return GuildbookError(f"unexpected response from Discord at {settings.discord_api_base}: {error}")
    if isinstance(error, aiohttp.ClientError):
        return GuildbookError(f"cannot reach Discord at {settings.discord_api_base}: {error}")
    return error


def run(settings: Settings) -> None:
    """Configure logging and run the bot until a signal. Raises like `Process.run`."""
    logs.configure(settings.log_format, settings.log_level, secrets=settings.secrets())
    if (problem := find_draining_problem(os.environ, settings.shutdown_seconds)) is not None:
        _log.warning("%s; %s", *problem)
    asyncio.run(Process(settings).run())

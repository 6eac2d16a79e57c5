"""Scheduled work of the active bot: table size samples, backups, restore drills and the first import."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.exceptions import DatabaseError, GuildbookError, NothingToBackUp, UploadFailed
from utils.logs import redact
from utils.operations.action import Outcome, prune_actions, record_action
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.keeping import find_alerts, find_pause, lacking_remotely
from utils.operations.backup.service import BackupService
from utils.operations.upkeep import statistics
from utils.service import metrics
from utils.settings import Settings
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: Seconds before failed work is tried again, if its interval is not shorter.
RETRY_DELAY = 300.0
#: Seconds after the start before the first work: the mirror's start goes first.
START_DELAY = 5.0

#: The last backup that the schedule made, whose id only the schedule records; the last row, because the clock may have
#: been set back since.
_SECONDS_SINCE_BACKUP = """
SELECT extract(epoch FROM clock_timestamp() - at)::float8 FROM ops.admin_actions
WHERE command = 'backup create' AND arguments ? 'backup' ORDER BY id DESC LIMIT 1
"""
#: Seconds between two looks at the backups if nothing is to be tried again.
MAINTENANCE_INTERVAL = 3_600.0
_SECONDS_SINCE_SAMPLE = "SELECT extract(epoch FROM clock_timestamp() - max(at))::float8 FROM ops.table_sizes"


async def _notify_nobody(text: str) -> None:
    """Tell nobody."""


def _report_failure(name: str, exc: Exception) -> None:
    """Log and count work that failed; an error that nobody expected with its traceback."""
    if isinstance(exc, GuildbookError):
        _log.error("%s failed: %s", name, redact(str(exc)))
    else:
        _log.error("%s failed", name, exc_info=exc)
    metrics.duty_failures.labels(name).inc()


class Scheduler:
    """Runs scheduled work between `start` and `stop`.

    Delays are in seconds and may be changed before `start`. `notify` tells operators what they must know; `clock`
    returns the current time.
    """

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        *,
        start_delay: float = START_DELAY,
        retry_delay: float = RETRY_DELAY,
        notify: Callable[[str], Awaitable[None]] = _notify_nobody,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.start_delay: float = start_delay
        self.retry_delay: float = retry_delay
        self._settings = settings
        self._pool = pool
        self._notify = notify
        #: Keys of the alerts that operators were told of.
        self._told: set[str] = set()
        self._clock = clock
        #: Set when the schedule has made a backup.
        self._backed_up = asyncio.Event()
        #: So that no backup is uploaded twice at the same time.
        self._storing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start everything that the settings ask for."""
        settings = self._settings
        self._start_task(
            "sizes", self._repeat("sizes", statistics.SAMPLE_SECONDS, self._seconds_since_sample, self._sample_sizes)
        )
        if settings.backup_every is not None:
            self._start_task(
                "backups", self._repeat("backup", settings.backup_every, self._seconds_since_backup, self._back_up)
            )
            self._start_task("backup maintenance", self._maintain_backups())
        if settings.drill_every is not None:
            self._start_task(
                "drills", self._repeat("drill", settings.drill_every, self._seconds_since_drill, self._drill)
            )
        if settings.import_json is not None:
            self._start_task("import", self._import(settings.import_json))

    async def stop(self, timeout: float) -> None:
        """Cancel all work and wait up to `timeout` seconds for it to end."""
        tasks, self._tasks = self._tasks, []
        await cancel_and_wait(tasks, timeout)

    def _start_task(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def _repeat(
        self,
        name: str,
        interval: float,
        seconds_since_last: Callable[[], Awaitable[float | None]],
        work: Callable[[], Awaitable[None]],
    ) -> None:
        """Run `work` whenever its last run, by any process, was `interval` seconds ago.

        Failed work is tried again after a fixed delay and without stamina: it recurs anyway and has no last attempt.
        """
        await asyncio.sleep(self.start_delay)
        while True:
            wait = min(interval, self.retry_delay)
            try:
                since_last = await seconds_since_last()
                if since_last is None or not 0 <= since_last < interval:  # a clock was set back, or it is due
                    await work()
                    since_last = await seconds_since_last()
                if since_last is not None and since_last >= 0:
                    wait = interval - since_last
            except Exception as exc:
                _report_failure(name, exc)
            await asyncio.sleep(max(1.0, wait))

    async def _seconds_since_sample(self) -> float | None:
        seconds: float | None = await self._pool.fetchval(_SECONDS_SINCE_SAMPLE)
        return seconds

    async def _sample_sizes(self) -> None:
        await statistics.sample_sizes(self._pool)
        await prune_actions(self._pool)

    async def _seconds_since_backup(self) -> float | None:
        """Return the seconds since the schedule made a backup of this database, by what it recorded there."""
        seconds: float | None = await self._pool.fetchval(_SECONDS_SINCE_BACKUP)
        return seconds

    async def _back_up(self) -> None:
        backups = BackupService(self._settings)
        try:
            async with self._storing:
                outcome = await backups.create(self._pool, reason="scheduled")
        except NothingToBackUp as exc:
            # Of a bot that is in no guild yet. A database that was lost is held if there is a backup of it.
            _log.info("no scheduled backup: %s", exc)
            return
        except UploadFailed as exc:
            _log.error("backup create: %s", redact(str(exc)))
            metrics.duty_failures.labels("backup").inc()
            await self._record("backup create", redact(str(exc)), backup=exc.backup)
        except GuildbookError as exc:
            _log.error("backup create failed: %s", redact(str(exc)))
            await self._record("backup create", f"Failed: {redact(str(exc))}")
            raise
        else:
            _log.info("backup create: %s", redact(outcome.text))
            await self._record("backup create", redact(outcome.text), backup=outcome.data["id"])
        metrics.backup_time.set_to_current_time()
        self._backed_up.set()

    async def _maintain_backups(self) -> None:
        """Upload what could not be uploaded, delete what retention does not keep, and tell operators what is wrong.

        After each scheduled backup, and at fixed intervals without stamina, as `_repeat`: a store may be away for days.
        """
        await asyncio.sleep(self.start_delay)
        while True:
            self._backed_up.clear()
            has_failed = False
            for name, work in (("backup push", self._push), ("backup prune", self._prune)):
                try:
                    await work()
                except Exception as exc:
                    has_failed = True
                    _report_failure(name, exc)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    self.retry_delay if has_failed else max(self.retry_delay, MAINTENANCE_INTERVAL)
                ):
                    await self._backed_up.wait()

    async def _push(self) -> None:
        catalog = await BackupCatalog(self._settings).serving(self._pool)
        if catalog.remote is None:
            return
        async with self._storing:
            pushed = await BackupService(self._settings, catalog=catalog).push()
        if pushed.data["uploaded"]:
            _log.info("backup push: %s", pushed.text)
            await self._record("backup push", pushed.text)

    async def _prune(self) -> None:
        catalog = await BackupCatalog(self._settings).serving(self._pool)
        pruned = await BackupService(self._settings, catalog=catalog).prune()
        if pruned.data["deleted"]:
            _log.info("backup prune: %s", pruned.text)
            await self._record("backup prune", pruned.text)
        entries, errors = await catalog.scan()
        metrics.backups_paused.set(find_pause(entries) is not None)
        if not errors:
            metrics.backup_upload_pending.set(len(lacking_remotely(catalog, entries)))
        alerts = find_alerts(catalog, entries, errors)
        for alert in alerts:
            if alert.key not in self._told:
                _log.error("backups: %s", alert.text)
                await self._notify(f"Backups: {alert.text}.")
        self._told = {alert.key for alert in alerts}

    async def _seconds_since_drill(self) -> float | None:
        """Return the seconds since the last drill of any backup of this database."""
        entries = await (await BackupCatalog(self._settings).serving(self._pool)).entries()
        drills = [entry.drill for entry in entries if entry.is_own and entry.drill is not None]
        ages = [self._seconds_since(drill.made_at) for drill in drills]
        return min((age for age in ages if age >= 0), default=None)  # others were made by a wrong clock

    async def _drill(self) -> None:
        catalog = await BackupCatalog(self._settings).serving(self._pool)
        backups = BackupService(self._settings, catalog=catalog)
        if await catalog.newest() is None:
            if self._settings.backup_every is not None:
                return  # until the first scheduled one is made
            raise GuildbookError(
                "there is no full backup to restore: set BACKUP_EVERY, or run python bot.py backup create"
            )
        outcome = await self._run_action("backup drill", lambda: backups.drill(self._pool))
        metrics.drill_ok.set(outcome.ok)
        metrics.drill_time.set_to_current_time()
        if not outcome.ok:
            _log.error("restore drill failed: the newest backup cannot be restored: %s", outcome.text)

    async def _import(self, directory: Path) -> None:
        from utils.operations.importing import importer

        with contextlib.suppress(GuildbookError):  # logged and recorded
            await self._run_action(
                "import",
                lambda: importer.import_new_files(self._pool, directory, data_dir=self._settings.data_dir),
                directory=str(directory),
            )

    async def _run_action(
        self, command: str, action: Callable[[], Awaitable[Outcome | None]], **arguments: Any
    ) -> Outcome:
        """Run what operators can also run as a command; log its outcome and record it in `ops.admin_actions`.

        Raises what the action raises.
        """
        try:
            outcome = await action()
        except GuildbookError as exc:
            _log.error("%s failed: %s", command, redact(str(exc)))
            await self._record(command, f"Failed: {redact(str(exc))}", **arguments)
            raise
        if outcome is None:
            return Outcome("nothing to do")
        _log.info("%s: %s", command, redact(outcome.text))
        await self._record(command, redact(outcome.text), **arguments)
        return outcome

    async def _record(self, command: str, result: str, **arguments: Any) -> None:
        try:
            await record_action(self._pool, command, {"by": "the bot itself", **arguments}, result)
        except DatabaseError as exc:
            _log.warning("could not record %s in ops.admin_actions: %s", command, exc)

    def _seconds_since(self, moment: datetime) -> float:
        return (self._clock() - moment).total_seconds()

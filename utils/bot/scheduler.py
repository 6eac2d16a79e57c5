"""What a bot that acts does by itself beside the mirror: sizes noted, backups and drills in time, the first import."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from utils.database import Pool
from utils.exceptions import DatabaseError, GuildbookError
from utils.logs import redact
from utils.operations.action import Outcome, record_action
from utils.operations.backup.drill import last_drill
from utils.operations.backup.service import BackupService
from utils.operations.upkeep import sizes
from utils.service import metrics
from utils.settings import Settings

_log = logging.getLogger(__name__)

#: Seconds until what failed is tried again, unless it comes round sooner.
AGAIN_SECONDS = 300.0
#: Seconds after the start before anything of this begins: the mirror goes first.
START_SECONDS = 5.0

_LAST_SAMPLE = "SELECT extract(epoch FROM clock_timestamp() - max(at))::float8 FROM ops.table_sizes"


class Scheduler:
    """Runs them until `stop`."""

    def __init__(self, settings: Settings, database: Pool) -> None:
        self._settings = settings
        self._database = database
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin with all of them."""
        settings = self._settings
        self._run("sizes", self._repeat("sizes", sizes.SAMPLE_SECONDS, self._since_sample, self._sample))
        if settings.backup_every is not None:
            self._run("backups", self._repeat("backup", settings.backup_every, self._since_backup, self._back_up))
        if settings.drill_every is not None:
            self._run("drills", self._repeat("drill", settings.drill_every, self._since_drill, self._drill))
        if settings.import_json is not None:
            self._run("import", self._import())

    async def stop(self, timeout: float) -> None:
        """Call off what is under way, and wait up to `timeout` seconds for it."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def _run(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def _repeat(
        self,
        name: str,
        every: float,
        since: Callable[[], Awaitable[float | None]],
        work: Callable[[], Awaitable[None]],
    ) -> None:
        """Do `work` when the last time, whoever did it then, is `every` seconds ago; `since` says how long it is."""
        await asyncio.sleep(START_SECONDS)
        while True:
            wait = min(every, AGAIN_SECONDS)
            try:
                last = await since()
                if last is None or last >= every:
                    await work()
                    last = await since()
                if last is not None:
                    wait = every - last
            except GuildbookError as exc:
                _log.error("%s: %s", name, redact(str(exc)))
                metrics.duty_failures.labels(name).inc()
            except Exception:  # it comes round again
                _log.exception("%s failed", name)
                metrics.duty_failures.labels(name).inc()
            await asyncio.sleep(max(1.0, wait))

    async def _since_sample(self) -> float | None:
        seconds: float | None = await self._database.fetchval(_LAST_SAMPLE)
        return seconds

    async def _sample(self) -> None:
        await sizes.sample(self._database)

    async def _since_backup(self) -> float | None:
        newest = await BackupService(self._settings).newest()
        return None if newest is None else _since(newest.made_at)

    async def _back_up(self) -> None:
        vault = BackupService(self._settings)
        await self._noted("backup create", lambda: vault.create(self._database, reason="scheduled"))
        metrics.backup_time.set_to_current_time()
        pruned = await vault.prune()
        if pruned.data["deleted"]:
            await self._note("backup prune", pruned.text)

    async def _since_drill(self) -> float | None:
        """Seconds since any drill, of whichever backup: the newest are looked at."""
        vault, ages = BackupService(self._settings), []
        for entry in (await vault.known())[: self._settings.backup_keep]:
            drill = await last_drill(vault, entry.id)
            if drill is not None:
                ages.append(_since(datetime.fromisoformat(drill.at)))
        return min(ages, default=None)

    async def _drill(self) -> None:
        vault = BackupService(self._settings)
        if await vault.newest() is None:
            raise GuildbookError(
                "there is no full backup to restore yet: set BACKUP_EVERY, or python bot.py backup create"
            )
        outcome = await self._noted("backup drill", lambda: vault.drill(self._database))
        metrics.drill_ok.set(outcome.ok)
        metrics.drill_time.set_to_current_time()
        if not outcome.ok:
            _log.error("a drill found that the newest backup does not come back: %s", outcome.text)

    async def _import(self) -> None:
        from utils.operations.importing import importer

        directory = self._settings.import_json
        assert directory is not None, "this is only begun with one"
        with contextlib.suppress(GuildbookError):  # it is in the log and in the books
            await self._noted(
                "import",
                lambda: importer.at_start(self._database, directory, data_dir=self._settings.data_dir),
                directory=str(directory),
            )

    async def _noted(self, command: str, work: Callable[[], Awaitable[Outcome | None]], **arguments: Any) -> Outcome:
        """Do something that operators can do as well, and write it down as they are. Raises what it raises."""
        try:
            outcome = await work()
        except GuildbookError as exc:
            _log.error("%s: %s", command, redact(str(exc)))
            await self._note(command, f"Failed: {redact(str(exc))}", **arguments)
            raise
        if outcome is None:
            return Outcome("nothing to do")
        _log.info("%s: %s", command, redact(outcome.text))
        await self._note(command, redact(outcome.text), **arguments)
        return outcome

    async def _note(self, command: str, result: str, **arguments: Any) -> None:
        try:
            await record_action(self._database, command, {"by": "the bot itself", **arguments}, result)
        except DatabaseError as exc:
            _log.warning("%s was not written down: %s", command, exc)


def _since(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()

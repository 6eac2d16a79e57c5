"""Periodic work of cogs that survives errors and outages: `BaseCog.every`, `loop`, and loops of discord.ext.tasks.

A loop of discord.ext.tasks ends with the first error that it does not know, such as that of a database which is away
for four seconds. `RetryingLoop` repeats the iteration with back-off instead. It needs private parts of discord.py
2.7.1: `Loop._loop` reads `coro`, and the names below with an underscore.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import discord
from discord.ext import tasks

from utils.exceptions import DatabaseError, GuildbookError
from utils.retrying import backoff_seconds

if TYPE_CHECKING:
    from utils.database.access import Database

_log = logging.getLogger(__name__)

MISSING: Any = discord.utils.MISSING
#: The first and the longest delay before an iteration is repeated, in seconds.
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0
#: Seconds to make work due again that was taken and not done.
GIVE_BACK_SECONDS = 3.0

#: Takes a run that is due (a document of the namespace `guildbook.periodic`) and plans the next one. It is one
#: statement, so that one process takes it.
_CLAIM = """
INSERT INTO documents AS d (guild_id, namespace, key, value, version, updated_at)
VALUES (0, 'guildbook.periodic', $1,
        jsonb_build_object('next_run', clock_timestamp() + make_interval(secs => $2)), 1, clock_timestamp())
ON CONFLICT (guild_id, namespace, key) DO UPDATE SET
    value = jsonb_build_object('next_run', CASE
        WHEN (d.value ->> 'next_run')::timestamptz + make_interval(secs => $2) > clock_timestamp()
        THEN (d.value ->> 'next_run')::timestamptz + make_interval(secs => $2)
        ELSE clock_timestamp() + make_interval(secs => $2) END),
    version = d.version + 1, updated_at = clock_timestamp()
WHERE (d.value ->> 'next_run')::timestamptz <= clock_timestamp()
RETURNING (value ->> 'next_run')::timestamptz
"""
_SECONDS_LEFT = """
SELECT extract(epoch FROM (value ->> 'next_run')::timestamptz - clock_timestamp())::float8 FROM documents
WHERE guild_id = 0 AND namespace = 'guildbook.periodic' AND key = $1
"""
#: Makes work due again that was taken and not done.
_GIVE_BACK = """
UPDATE documents SET value = jsonb_build_object('next_run', clock_timestamp()), version = version + 1,
    updated_at = clock_timestamp()
WHERE guild_id = 0 AND namespace = 'guildbook.periodic' AND key = $1
"""


class RetryingLoop(tasks.Loop[Any]):
    """A loop of discord.ext.tasks whose iterations are repeated with back-off when they raise.

    `before_loop`, `after_loop`, `error`, `stop`, `cancel`, `restart`, `change_interval` and `count` mean what they mean
    there; `error` is called for each failure, and only successful iterations count.
    """

    def __init__(self, coro: Any, *, key: str | None = None, **options: Any) -> None:
        """`key`: under which the next run is remembered; None: it is not."""
        defaults: dict[str, Any] = {"seconds": 0, "hours": 0, "minutes": 0, "time": MISSING}
        defaults |= {"count": None, "reconnect": True, "name": None}
        super().__init__(coro, **(defaults | options))
        self.key: str | None = key
        #: When the last iteration began; None: none has.
        self.last_run: datetime | None = None
        #: What the last failed iteration raised, in one line; None: the last one succeeded.
        self.last_error: str | None = None
        #: The delays before an iteration is repeated, in seconds.
        self.first_delay: float = FIRST_DELAY
        self.longest_delay: float = LONGEST_DELAY
        self._original = coro
        #: Whether a run was taken from the database and is not done yet.
        self._is_taken = False
        #: Whether it waits for a time that the database told.
        self.is_waiting: bool = False

        @functools.wraps(coro)
        async def retrying(*args: Any, **kwargs: Any) -> None:
            await self._iterate(*args, **kwargs)

        self.coro = retrying

    def __get__(self, obj: Any, objtype: Any) -> Any:
        if obj is None:
            return self
        bound = bind_loop(self, obj)
        setattr(obj, self._original.__name__, bound)
        return bound

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the work once, outside the loop; what it raises is raised."""
        return await self._original(*(() if self._injected is None else (self._injected,)), *args, **kwargs)

    def start(self, *args: Any, **kwargs: Any) -> asyncio.Task[None]:
        """Start the loop in a task with an empty context, outside the caller's transaction and time limit."""
        if self.key is not None and self._is_explicit_time():
            raise GuildbookError(f"{self.display_name}: key= goes with an interval, not with time=")
        return contextvars.Context().run(super().start, *args, **kwargs)

    @property
    def display_name(self) -> str:
        """The name of its function, or the one that was given."""
        return self._name.removeprefix("discord-ext-tasks: ")

    @property
    def interval(self) -> float:
        """Seconds between two iterations; 0 if it runs at times of the day."""
        parts = ((self.seconds, 1.0), (self.minutes, 60.0), (self.hours, 3600.0))
        return sum(float(amount or 0) * factor for amount, factor in parts)

    def describe(self) -> str:
        """Return one line about it: how often it runs, the last run and its error, and the next run."""
        every = f"every {self.interval:g} s" if self.interval else "at times of the day"
        if not self.is_running():
            return f"`{self.display_name}` {every}: not running"
        last = "none yet" if self.last_run is None else discord.utils.format_dt(self.last_run, "T")
        next_run = self.next_iteration
        following = "soon" if next_run is None else discord.utils.format_dt(next_run, "T")
        error = "" if self.last_error is None else f", last error {discord.utils.escape_markdown(self.last_error)}"
        return f"`{self.display_name}` {every}: last run {last}{error}, next run {following}"

    async def _iterate(self, *args: Any, **kwargs: Any) -> None:
        """Run one iteration until it has succeeded, or the loop is being stopped."""
        try:
            await self._repeat(*args, **kwargs)
        finally:
            await self._give_back()

    async def _repeat(self, *args: Any, **kwargs: Any) -> None:
        failures = 0
        while not (failures and self._stop_next_iteration):
            try:
                if self.key is not None:
                    await self._take()
                    if not self._is_taken:
                        return
                self.last_run = datetime.now(UTC)
                await self._original(*args, **kwargs)
            except Exception as exc:
                failures += 1
                self.last_error = " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
                await self._report(exc)
            else:
                self._is_taken = False
                self.last_error = None
                return
            if not self._stop_next_iteration:
                longest = min(self.longest_delay, max(self.first_delay, self.interval or self.longest_delay))
                await asyncio.sleep(backoff_seconds(failures, first=self.first_delay, longest=longest))

    async def _report(self, exc: Exception) -> None:
        """Let the author's `error` handle it, or log it. discord.py retries some errors without asking that."""
        has_handler = getattr(self._error, "__func__", None) is not tasks.Loop._error
        if has_handler and not (self.reconnect and isinstance(exc, self._valid_exception)):
            try:
                await super()._call_loop_function("error", exc)
            except Exception:
                self._logger.exception("the error handler of a loop failed: %s", self.display_name)
            return
        is_known = isinstance(exc, GuildbookError | OSError)
        self._logger.log(
            logging.WARNING if is_known else logging.ERROR,
            "loop failed, and is tried again: %s: %s", self.display_name, self.last_error,
            exc_info=None if is_known else exc,
        )  # fmt: skip

    async def _call_loop_function(self, name: str, *args: Any, **kwargs: Any) -> None:
        failures = 0
        while True:
            try:
                await super()._call_loop_function(name, *args, **kwargs)
            except Exception as exc:
                failures += 1
                self.last_error = " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
                self._logger.exception("%s of a loop failed: %s", name, self.display_name)
                if name != "before_loop" or self._stop_next_iteration:
                    return
                await asyncio.sleep(backoff_seconds(failures, first=self.first_delay, longest=self.longest_delay))
            else:
                return

    @property
    def _logger(self) -> logging.Logger:
        return logging.getLogger(self._original.__module__)

    # --- work with a key

    @property
    def _cog(self) -> Any:
        return self._injected

    @property
    def _database(self) -> Database:
        database: Database = self._cog.bot.db
        return database

    @property
    def _full_key(self) -> str:
        return f"{self._cog.qualified_name}/{self.key}"

    async def _take(self) -> None:
        """Wait until the work is due and this process has taken it; return early if the loop is being stopped."""
        while not self._is_taken and not self._stop_next_iteration:
            taken = await self._database.fetchval(_CLAIM, self._full_key, self.interval, use_cache=False)
            if taken is not None:
                self._is_taken = True
                return
            left = await self._database.fetchval(_SECONDS_LEFT, self._full_key, use_cache=False)
            seconds = max(0.0, float(left or 0.0))
            due: Any = datetime.now(UTC) + timedelta(seconds=seconds)
            self._next_iteration = due
            self.is_waiting = True
            try:
                await asyncio.sleep(min(seconds + 0.01, self.longest_delay))
            finally:
                self.is_waiting = False

    async def _give_back(self) -> None:
        """Make work due again that was taken and not done, for the next process."""
        if self.key is None or not self._is_taken:
            return
        self._is_taken = False
        try:
            async with asyncio.timeout(GIVE_BACK_SECONDS):
                await self._database.execute(_GIVE_BACK, self._full_key)
        except (DatabaseError, TimeoutError) as exc:
            self._logger.warning("%s will run at its next regular time only: %s", self.display_name, exc)


def bind_loop(loop: tasks.Loop[Any], cog: Any) -> RetryingLoop:
    """Return a loop of a class for one of its instances, which survives errors."""
    is_ours = isinstance(loop, RetryingLoop)
    bound = RetryingLoop(
        loop._original if is_ours else loop.coro,  # type: ignore[attr-defined]
        seconds=loop._seconds, hours=loop._hours, minutes=loop._minutes, time=loop._time,
        count=loop.count, reconnect=loop.reconnect, name=loop._name, key=loop.key if is_ours else None,  # type: ignore[attr-defined]
    )  # fmt: skip
    bound._injected = cog
    bound._before_loop, bound._after_loop = loop._before_loop, loop._after_loop
    if getattr(loop._error, "__func__", None) is not tasks.Loop._error:
        bound._error = loop._error  # type: ignore[method-assign]
    bound._valid_exception = loop._valid_exception
    return bound


def loops_of(cog: object) -> Iterator[RetryingLoop]:
    """Yield the loops of a cog that survive errors, by `loop`, `every` or discord.ext.tasks."""
    for value in vars(cog).values():
        if isinstance(value, RetryingLoop):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, RetryingLoop))


def loop(
    *,
    seconds: float = MISSING,
    minutes: float = MISSING,
    hours: float = MISSING,
    time: time | Sequence[time] = MISSING,
    count: int | None = None,
    reconnect: bool = True,
    name: str | None = None,
    key: str | None = None,
) -> Callable[[Callable[..., Coroutine[Any, Any, Any]]], RetryingLoop]:
    """Return a decorator like `discord.ext.tasks.loop`, for a method of a cog; the loop survives errors and outages.

    key: the next run is remembered under it: a restart does not run the work too early, of several processes one runs
        it, and a run that failed or was cancelled is repeated. None: it runs at each start.

    Example::

        @loop(hours=24, key="digest")
        async def digest(self) -> None: ...

        async def start(self) -> None:
            self.digest.start()
    """

    def decorate(coro: Callable[..., Coroutine[Any, Any, Any]]) -> RetryingLoop:
        return RetryingLoop(
            coro, seconds=seconds, minutes=minutes, hours=hours, time=time, count=count, reconnect=reconnect,
            name=name, key=key,
        )  # fmt: skip

    return decorate

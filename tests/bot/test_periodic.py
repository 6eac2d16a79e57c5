"""Periodic work survives errors and outages, keeps discord.ext.tasks' meanings, and remembers when it is due."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from discord.ext import tasks

from tests.waiting import until
from utils.base_cog import BaseCog, loop
from utils.bot.periodic import RetryingLoop, loops_of
from utils.database import Pool
from utils.database.access import Database
from utils.exceptions import DatabaseUnavailable, GuildbookError


class Loops(BaseCog):
    """Has loops of every kind. `failing` is what they raise; what happens is written down."""

    def __init__(self, bot: Any) -> None:
        super().__init__(bot)
        self.done: list[str] = []
        self.failing: Exception | None = None
        for it in loops_of(self):
            it.first_delay = 0.01

    def work(self, name: str) -> None:
        self.done.append(name)
        if self.failing is not None:
            raise self.failing

    @tasks.loop(seconds=0.01)
    async def raw(self) -> None:
        self.work("raw")

    @tasks.loop(seconds=0.01)
    async def handled(self) -> None:
        self.work("handled")

    @handled.before_loop
    async def before(self) -> None:
        self.work("before")

    @handled.after_loop
    async def after(self) -> None:
        self.done.append("after")

    @handled.error
    async def on_error(self, error: BaseException) -> None:
        self.done.append(f"error {error}")
        raise RuntimeError("the handler fails too")

    @tasks.loop(seconds=0.01, count=2)
    async def twice(self) -> None:
        self.work("twice")

    @loop(hours=1, key="hourly")
    async def hourly(self) -> None:
        self.work("hourly")


@pytest.fixture
async def cog() -> AsyncIterator[Loops]:
    """A cog that is unloaded after the test."""
    cog = Loops(SimpleNamespace(db=None))
    await cog.cog_load()
    yield cog
    cog.failing = None
    await cog.cog_unload()


@pytest.mark.parametrize(
    "error", [DatabaseUnavailable("gone"), OSError("gone"), KeyError("gone"), TimeoutError("gone")]
)
async def test_a_loop_survives_every_error(cog: Loops, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    cog.failing = error
    kept = cog.every(0.01, lambda: asyncio.to_thread(cog.work, "every"), name="counting")
    kept.first_delay = 0.01
    started: tuple[Any, ...] = (cog.raw, kept)
    cog.raw.start()
    for name in ("raw", "every"):
        await until(lambda: cog.done.count(name) > 3)  # noqa: B023 - awaited in this turn
    assert all(it.last_error is not None and "gone" in it.last_error for it in started)
    assert "loop failed, and is tried again: counting" in caplog.text
    assert {line.name for line in caplog.records} == {__name__}
    cog.failing = None
    await until(lambda: all(it.last_error is None for it in started))
    assert all(it.is_running() and not it.failed() for it in started)


async def test_handlers_of_a_loop_keep_their_meaning(cog: Loops) -> None:
    cog.failing = ValueError("x")
    cog.handled.start()
    await until(lambda: cog.done.count("before") > 2)
    assert "handled" not in cog.done, "before_loop is repeated until it succeeds"
    cog.failing = None
    await until(lambda: "handled" in cog.done)
    began = cog.done.count("before")
    cog.failing = ValueError("y")
    await until(lambda: cog.done.count("error y") > 2)
    cog.failing = None
    assert "after" not in cog.done
    cog.handled.change_interval(hours=1)
    assert cog.handled.hours == 1
    cog.handled.cancel()
    await until(lambda: not cog.handled.is_running())
    assert (cog.done.count("before"), cog.done.count("after")) == (began, 1)


async def test_stop_ends_a_failing_loop_and_count_counts_successes(cog: Loops) -> None:
    cog.failing = ValueError("x")
    cog.raw.start()
    cog.twice.start()
    await until(lambda: cog.done.count("raw") > 2 and cog.done.count("twice") > 2)
    cog.raw.stop()
    await until(lambda: not cog.raw.is_running())
    assert cog.twice.is_running()
    failed = cog.done.count("twice")
    cog.failing = None
    await until(lambda: not cog.twice.is_running())
    assert cog.done.count("twice") - failed in (2, 3), "at most one failure came in between"


async def test_loops_of_two_instances_are_apart_and_unloading_ends_them(cog: Loops) -> None:
    other = Loops(SimpleNamespace(db=None))
    assert cog.raw is not other.raw
    assert isinstance(cog.raw, RetryingLoop)
    other.raw.start()
    other.every(60, other.stop)
    await asyncio.sleep(0)
    assert not cog.raw.is_running()
    await other.cog_unload()
    assert not other.raw.is_running()
    with pytest.raises(GuildbookError, match="is unloaded"):
        other.every(60, other.stop)
    with pytest.raises(GuildbookError, match="more than 0 seconds"):
        cog.every(0, cog.stop)
    with pytest.raises(GuildbookError, match="more than 0 seconds, not '1h'"):
        cog.every("1h", cog.stop)  # type: ignore[arg-type]
    unused = cog.stop()
    with pytest.raises(GuildbookError, match="a coroutine function, without parentheses"):
        cog.every(60, unused)  # type: ignore[arg-type]
    unused.close()


async def test_a_function_that_is_no_coroutine_function_is_named(cog: Loops) -> None:
    kept = cog.every(60, lambda: None, name="plain")  # type: ignore[arg-type,return-value]
    await until(lambda: kept.last_error is not None)
    assert "plain is not a coroutine function: define it with async def" in (kept.last_error or "")
    await cog.cog_unload()


@pytest.fixture
async def make(database: Pool) -> AsyncIterator[Callable[[], Loops]]:
    """Make cogs on one database, as one process after another, or two at once."""
    db = Database(database)
    made: list[Loops] = []

    def make() -> Loops:
        made.append(Loops(SimpleNamespace(db=db)))
        return made[-1]

    yield make
    for cog in made:
        cog.failing = None
        await cog.cog_unload()
    await db.close()


async def next_run(database: Pool, key: str) -> float:
    """Return the seconds until work with a key is due."""
    sql = "SELECT extract(epoch FROM (value->>'next_run')::timestamptz - clock_timestamp())::float8 FROM documents"
    return float(await database.fetchval(f"{sql} WHERE key = $1", key))


async def test_the_next_run_survives_a_restart(make: Callable[[], Loops], database: Pool) -> None:
    first = make()
    first.hourly.start()
    await until(lambda: first.done == ["hourly"])
    await until(lambda: first.hourly._is_taken is False)
    await first.cog_unload()
    second = make()
    second.hourly.start()
    await until(lambda: second.hourly.next_iteration is not None and second.hourly.next_iteration > datetime.now(UTC))
    await until(lambda: "next run" in second.hourly.describe())
    assert second.done == []
    assert 3500 < await next_run(database, "Loops/hourly") <= 3600
    await database.execute("UPDATE documents SET value = jsonb_build_object('next_run', clock_timestamp())")
    await second.cog_unload()
    third = make()
    third.hourly.start()
    await until(lambda: third.done == ["hourly"])


async def test_a_failed_or_cancelled_run_stays_due(make: Callable[[], Loops], database: Pool) -> None:
    first = make()
    first.failing = DatabaseUnavailable("gone")
    first.hourly.start()
    await until(lambda: len(first.done) > 2)
    await first.cog_unload()
    assert await next_run(database, "Loops/hourly") <= 0
    second = make()
    second.hourly.start()
    await until(lambda: second.done == ["hourly"])


async def test_of_several_processes_one_runs_the_work(make: Callable[[], Loops]) -> None:
    cogs = [make() for _ in range(5)]
    for cog in cogs:
        cog.hourly.start()
    await until(lambda: any(cog.done for cog in cogs))
    # The others know the time of the first one's next run, and wait for it.
    others = [cog for cog in cogs if not cog.done]
    await until(lambda: all(cog.hourly.is_waiting for cog in others))
    assert [cog.done for cog in cogs].count(["hourly"]) == 1


async def test_a_key_does_not_go_with_times_of_the_day(cog: Loops) -> None:
    async def nothing(_: Any) -> None: ...

    daily = loop(time=datetime.now(UTC).timetz(), key="daily")(nothing)
    with pytest.raises(GuildbookError, match="key= goes with an interval"):
        daily.start()


async def test_a_working_loop_logs_nothing(cog: Loops, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cog.raw.start()
    await until(lambda: len(cog.done) > 3)
    assert isinstance(cog.raw, RetryingLoop)
    assert "every 0.01 s: last run <t:" in cog.raw.describe()
    assert caplog.records == []

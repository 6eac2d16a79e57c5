"""What BaseCog gives a cog: background tasks, a life cycle, a logger, a cache and repositories."""

from __future__ import annotations

import asyncio
import contextvars
import re
from pathlib import Path
from typing import Any

import pytest

from models import Role
from simulator import Simulator
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from utils.base_cog import BaseCog
from utils.database import Pool
from utils.exceptions import GuildbookError

pytestmark = pytest.mark.guilds(10)


class Worker(BaseCog):
    """Has a task and records what ends, in order."""

    def __init__(self, bot: Any) -> None:
        super().__init__(bot)
        self.ended: list[str] = []

    async def work(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.ended.append("task")

    async def stop(self) -> None:
        self.ended.append("stop")


class Bot:
    """What a cog needs of a bot that it is not added to."""

    db: Any = None


async def test_task_has_an_empty_context_and_ends_before_stop() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("of a transaction")
    worker = Worker(Bot())
    await worker.cog_load()

    async def read_variable() -> str | None:
        return variable.get(None)

    assert await worker.spawn(read_variable()) is None
    task = worker.spawn(worker.work(), "the work")
    assert task.get_name() == f"{__name__}: the work"
    await asyncio.sleep(0)
    await worker.cog_unload()
    await worker.cog_unload()
    assert task.cancelled()
    assert worker.ended == ["task", "stop"]
    with pytest.raises(GuildbookError, match="Worker is unloaded"):
        worker.spawn(worker.work())


async def test_logs_exceptions_of_tasks_with_a_reference(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(Bot())

    async def fail() -> None:
        raise RuntimeError("no paper")

    await asyncio.wait([worker.spawn(fail(), "printing")])
    await asyncio.sleep(0)
    (line,) = caplog.records
    assert re.search(r"printing \(ref [0-9a-f]{8}\)$", line.getMessage())
    assert line.exc_info is not None
    assert "no paper" in str(line.exc_info[1])


async def test_failed_or_slow_start_ends_its_tasks() -> None:
    class Unable(Worker):
        _lifecycle_timeout = 0.1

        async def start(self) -> None:
            self.spawn(self.work())
            await asyncio.sleep(0)
            await self.fail()

        async def fail(self) -> None:
            raise RuntimeError

    class Slow(Unable):
        async def fail(self) -> None:
            await asyncio.Event().wait()

    for kind, error in ((Unable, RuntimeError), (Slow, GuildbookError)):
        worker = kind(Bot())
        with pytest.raises(error):
            await worker.cog_load()
        assert worker.ended == ["task", "stop"]


async def test_logs_a_stop_that_hangs_and_a_task_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = asyncio.Event()

    class Stubborn(BaseCog):
        _lifecycle_timeout = 0.1

        async def work(self) -> None:
            while not over.is_set():
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    continue

        async def stop(self) -> None:
            await asyncio.Event().wait()

    stubborn = Stubborn(Bot())  # type: ignore[arg-type]
    await stubborn.cog_load()
    stubborn.spawn(stubborn.work(), "staying")
    await asyncio.sleep(0)
    await stubborn.cog_unload()
    assert "task still running 0.1 s after its cancellation" in caplog.text
    assert "stop() failed" in caplog.text
    over.set()


async def test_cogs_have_their_own_log_cache_and_repositories(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write_answering("one", "first")
    cogs.write_answering("two", "second")
    guild_id = next(iter(simulator.world.guilds))
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        one, two = (it for it in bot.cogs.values() if isinstance(it, BaseCog))
        assert (one.log.name, two.log.name) == (cogs.module("one"), cogs.module("two"))
        assert one.cache is one.cache
        assert one.cache is not two.cache
        assert one.guilds is one.guilds
        guild = await one.guilds.get(guild_id)
        assert guild.name == "Small"
        assert (await one.members.get((guild_id, simulator.world.bot.id))).guild_id == guild_id
        assert len((await one.roles.list(Role.guild_id == guild_id)).items) > 0
        async with one.session() as session:
            assert (await session.connection()) is not None


LEVELS = """
from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped
from models.base import Base, marked, snowflake

class Level(Base):
    __tablename__ = "levels"
    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True)
    xp: Mapped[int] = marked(BigInteger)
    COLUMN

class Levels(BaseCog):
    async def start(self) -> None:
        self.xp = self.batch(Level, seconds=600, increments=("xp",))

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Levels(bot))
"""


async def test_batch_is_flushed_at_unload_and_outlives_changed_columns(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write("levels", LEVELS.replace("COLUMN", "title: Mapped[str | None] = marked()"))
    await database.execute(
        "CREATE TABLE levels (guild_id bigint, user_id bigint, xp bigint, title text, PRIMARY KEY (guild_id, user_id))"
    )
    query = "SELECT user_id, xp FROM levels ORDER BY user_id"
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        batch = bot.cogs["Levels"].xp  # type: ignore[attr-defined]
        for user in (1, 1, 2):
            batch.add({"guild_id": 5, "user_id": user, "xp": 10})
        assert await bot.db.fetch(query) == []
        assert bot.stats()["batches"] == {"levels": 3}
        await batch.flush()
        assert [tuple(row) for row in await bot.db.fetch(query)] == [(1, 20), (2, 10)]
        batch.add({"guild_id": 5, "user_id": 2, "xp": 1})
        batch.add({"guild_id": 5, "user_id": 3, "xp": 1, "title": "the third"})
        await database.execute("ALTER TABLE levels DROP COLUMN title")
        cogs.write("levels", LEVELS.replace("COLUMN", ""))
        await bot.loader.reload("levels")
        assert [tuple(row) for row in await bot.db.fetch(query)] == [(1, 20), (2, 11)]
        (letter,) = await database.fetch("SELECT table_name, key, cog FROM ops.dead_letters")
        assert tuple(letter) == ("levels", {"guild_id": 5, "user_id": 3}, "Levels")
        bot.cogs["Levels"].xp.add({"guild_id": 5, "user_id": 4, "xp": 1})  # type: ignore[attr-defined]
        await bot.loader.unload("levels")  # also removes its model
    assert len(await database.fetch(query)) == 3


@pytest.mark.parametrize(
    ("cog", "problem"),
    [
        (LEVELS, "batch of levels: the database has no such table: run python bot.py db upgrade"),
        (LEVELS.replace('increments=("xp",)', 'increments=("exp",)'), "increments names 'exp', which is no column"),
        (LEVELS.replace("self.batch(Level,", 'self.batch("members",'), "the table belongs to Guildbook, not to "),
    ],
)
async def test_cog_with_a_batch_that_cannot_work_is_not_loaded(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cog: str,
    problem: str,
) -> None:
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write("levels", cog.replace("COLUMN", ""))
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        (state,) = bot.loader.states()
        assert state.state == "failed"
        assert state.reason is not None
        assert problem in state.reason


class Legacy(Worker):
    """Overrides what discord.py calls, in the way of cogs that were written for it: without the inherited one."""

    def __init__(self, bot: Any, *, calls_inherited: bool = False) -> None:
        super().__init__(bot)
        self.calls_inherited = calls_inherited

    async def start(self) -> None:
        self.ended.append("start")
        self.spawn(self.work())
        await asyncio.sleep(0)

    async def cog_load(self) -> None:
        self.ended.append("load")
        if self.calls_inherited:
            await super().cog_load()
            self.ended.append("loaded")

    async def cog_unload(self) -> None:
        if self.calls_inherited:
            await super().cog_unload()
        self.ended.append("unload")


async def test_overridden_cog_load_and_cog_unload_still_start_and_clean_up() -> None:
    class Inheriting(Legacy):
        async def cog_load(self) -> None:
            await super().cog_load()
            self.ended.append("inheriting")

        def cog_unload(self) -> None:  # type: ignore[override]
            self.ended.append("synchronous")

    for legacy, expected in (
        (Legacy(Bot()), ["load", "start", "unload", "task", "stop"]),
        (Legacy(Bot(), calls_inherited=True), ["load", "start", "loaded", "task", "stop", "unload"]),
        (Inheriting(Bot()), ["load", "inheriting", "start", "synchronous", "task", "stop"]),
    ):
        await legacy.cog_load()
        await legacy.cog_unload()
        await legacy.cog_unload()
        assert legacy.ended == expected


async def test_overridden_cog_load_that_hangs_or_raises_is_cleaned_up() -> None:
    class Hanging(Worker):
        _lifecycle_timeout = 0.1
        error: Exception | None = None

        async def cog_load(self) -> None:
            self.spawn(self.work())
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()

        async def cog_unload(self) -> None:
            await asyncio.Event().wait()

    hanging = Hanging(Bot())
    with pytest.raises(GuildbookError, match=r"cog_load\(\) of Hanging took longer than 0.1 s"):
        await hanging.cog_load()
    assert hanging.ended == ["task"]
    failing = Hanging(Bot())
    failing.error = TimeoutError("of its own")
    with pytest.raises(TimeoutError, match="of its own"):
        await failing.cog_load()
    assert failing.ended == ["task"]

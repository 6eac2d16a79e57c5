"""Cogs are loaded apart from each other, and what fails leaves nothing behind."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from models import Base
from simulator import Simulator, World
from tests.bot.running import running
from tests.bot.written import WrittenCogs
from tests.waiting import until
from utils.bot import loader
from utils.bot.client import Guildbook
from utils.bot.loader import found_extensions
from utils.bot.registrations import Registrations
from utils.database import Pool
from utils.exceptions import CogError, ValidationError


@pytest.fixture
def world() -> World:
    """One small guild."""
    world = World(seed=11)
    world.add_guild(members=10, name="Small")
    return world


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WrittenCogs:
    """A package to write cogs into; compiled code is kept, as it is where the bot runs."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return WrittenCogs(tmp_path, monkeypatch)


async def said(simulator: Simulator, name: str) -> str | None:
    """Return what a command answers."""
    guild = next(iter(simulator.world.guilds.values()))
    result = await simulator.run_command(name, user_id=guild.owner_id, guild_id=guild.id)
    return (await result.wait_done()).final_content


def registered(simulator: Simulator) -> list[str]:
    return sorted(command["name"] for command in simulator.interactions.commands())


def on(bot: Guildbook) -> dict[str, Any]:
    """Return what is on a bot, tasks of discord.py's own and the mirror's aside."""
    traces = Registrations.of(bot)
    tasks = {task.get_name() for task in traces.tasks if "left behind" in task.get_name()}
    listeners = {event: found for event, found in traces.listeners.items() if found}
    return {
        "cogs": traces.cogs, "listeners": listeners, "commands": traces.commands, "checks": traces.checks,
        "slash": [command.name for _, command in traces.slash_commands], "tasks": tasks, "views": traces.views,
    }  # fmt: skip


BROKEN = {
    "exits": ("import sys\nsys.exit(3)", "calls sys.exit(3)"),
    "fails": ("async def setup(bot): raise ValueError('no such\\nthing')", "ValueError: no such thing"),
    "hangs": ("async def setup(bot): await asyncio.Event().wait()", "took longer than 1 s"),
    "imports": ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
    "lacks": ("x = 1", "it has no `async def setup(bot)`"),
    "stubborn": (
        "async def setup(bot):\n    while True:\n        try: await asyncio.sleep(1)\n"
        "        except asyncio.CancelledError: await asyncio.sleep(0.2); return",
        "took longer than 1 s",
    ),
    "unreadable": ("def (", "SyntaxError: "),
}


async def test_whatever_is_wrong_with_one_cog_costs_that_one_alone(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    monkeypatch.setattr(loader, "COG_SECONDS", 1.0)
    for name, (text, _) in BROKEN.items():
        cogs.write(name, text)
    cogs.plain("good", "well")
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        states = {state.name: state for state in bot.loader.states()}
        assert list(states) == sorted([*BROKEN, "good"])
        assert (states["good"].state, states["good"].reason) == ("loaded", None)
        assert (states["good"].seconds or 0) > 0
        for name, (_, reason) in BROKEN.items():
            assert (states[name].state, states[name].seconds) == ("failed", None)
            assert reason in (states[name].reason or ""), name
            assert "\n" not in (states[name].reason or "")
            assert cogs.module(name) not in sys.modules
        assert await said(simulator, "good") == "well"
        assert list(bot.extensions) == [cogs.module("good")]


LEAVING = """
async def forever() -> None:
    await asyncio.Event().wait()

async def word(ctx) -> None: ...

def check(*_): return True

class Part(BaseCog):
    async def start(self) -> None:
        self.spawn(forever(), "left behind by spawn")
        self.turn.start()

    async def stop(self) -> None:
        self.bot.told.append("stopped")

    @tasks.loop(seconds=0.01)
    async def turn(self) -> None:
        asyncio.current_task().set_name("left behind by a loop")

    @commands.Cog.listener()
    async def on_something(self) -> None: ...

    @app_commands.command(description="Leave")
    async def leave(self, interaction: discord.Interaction[Guildbook]) -> None: ...

class Conflict(BaseCog):
    async def start(self) -> None:
        self.spawn(forever(), "left behind by a conflict")

    async def stop(self) -> None:
        self.bot.told.append("stopped, too")

    @app_commands.command(description="Is there already")
    async def good(self, interaction: discord.Interaction[Guildbook]) -> None: ...

class Blank(discord.ui.View):
    @discord.ui.button(label="?", custom_id="?")
    async def press(self, interaction, button) -> None: ...

async def setup(bot: Guildbook) -> None:
    bot.told = []
    await bot.add_cog(Part(bot))
    bot.add_listener(asyncio.sleep, "on_something_else")
    bot.add_command(commands.Command(word, name="leave"))
    bot.add_check(check)
    bot.add_view(Blank(timeout=None))
    bot.tree.add_command(app_commands.Command(name="rest", description="?", callback=rest))
    bot.forever = asyncio.create_task(forever(), name="left behind by create_task")
    END

async def rest(interaction: discord.Interaction) -> None: ...
"""


@pytest.mark.parametrize(
    "end", ["await bot.add_cog(Conflict(bot))", "raise RuntimeError", "await asyncio.Event().wait()"]
)
async def test_a_load_that_fails_half_way_leaves_nothing_behind(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs, end: str
) -> None:
    cogs.plain("good", "well")
    cogs.write("leaving", LEAVING.replace("END", "pass"))
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        await bot.loader.unload("leaving")
        monkeypatch.setattr(loader, "COG_SECONDS", 1.0)
        cogs.write("leaving", LEAVING.replace("END", end))
        await asyncio.sleep(0.05)
        before = on(bot)
        assert (before["tasks"], before["views"]) == (set(), [])
        with pytest.raises(CogError, match="leaving is left out: "):
            await bot.loader.load("leaving")
        await asyncio.sleep(0.05)
        assert on(bot) == before
        assert bot.told[:1] == ["stopped"] or bot.told == ["stopped, too", "stopped"]  # type: ignore[attr-defined]
        assert ("stopped, too" in bot.told) == ("Conflict" in end)  # type: ignore[attr-defined]
        cogs.write("leaving", LEAVING.replace("END", "pass"))
        assert (await bot.loader.load("leaving")).state == "loaded"
        assert len(on(bot)["tasks"]) == 3


async def test_the_slash_commands_follow_the_cogs(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    cogs.plain("one", "first")
    cogs.plain("two", "second")
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        assert registered(simulator) == ["one", "two"]
        assert (await bot.loader.unload("two")).state == "unloaded"
        assert registered(simulator) == ["one"]
        assert [(state.name, state.state) for state in bot.loader.states()] == [("one", "loaded"), ("two", "unloaded")]
        assert (await bot.loader.load("two")).state == "loaded"
        assert registered(simulator) == ["one", "two"]
        syncs = simulator.interactions.syncs[None]
        cogs.plain("two", "changed")
        await bot.loader.reload("two")
        assert await said(simulator, "two") == "changed"
        assert simulator.interactions.syncs[None] == syncs, "the same commands are not registered again"
        assert await said(simulator, "one") == "first"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("def (", "the loaded code goes on: SyntaxError"),
        ("raise RuntimeError('no')", "the former code is back: RuntimeError: no"),
        ("async def setup(bot): raise RuntimeError('no')", "the former code is back: RuntimeError: no"),
        ("async def setup(bot): await asyncio.Event().wait()", "the former code is back: the set-up of"),
        ("x = 1", "the former code is back: it has no `async def setup"),
    ],
)
async def test_a_reload_that_fails_brings_the_former_code_back_and_says_so(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    cogs: WrittenCogs,
    text: str,
    kept: str,
) -> None:
    cogs.plain("one", "first")
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        monkeypatch.setattr(loader, "COG_SECONDS", 1.0)
        for _ in range(2):
            cogs.write("one", text)
            with pytest.raises(CogError, match="one was not reloaded, ") as caught:
                await bot.loader.reload("one")
            assert kept in str(caught.value)
            (state,) = bot.loader.states()
            assert state.state == "loaded"
            assert state.reason is not None
            assert state.reason in str(caught.value)
            assert await said(simulator, "one") == "first"
            assert len(bot.extra_events["on_something"]) == 1
        cogs.plain("one", "better at last")
        assert (await bot.loader.reload("one")).reason is None
        assert await said(simulator, "one") == "better at last"


TABLE = """
from sqlalchemy.orm import Mapped
from models.base import Base, snowflake

class Member(Base):  # the name of one of the framework's, on purpose
    __tablename__ = "own_members"
    guild_id: Mapped[int] = snowflake(primary_key=True)
    COLUMN
"""


async def test_a_cog_that_declares_its_table_can_be_reloaded(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    setup = "async def setup(bot): pass"
    cogs.write("own", TABLE.replace("COLUMN", "") + setup)
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        for number in range(3):
            cogs.write("own", TABLE.replace("COLUMN", f"number{number}: Mapped[int]") + setup)
            assert (await bot.loader.reload("own")).state == "loaded"
            assert list(Base.metadata.tables["own_members"].columns.keys()) == ["guild_id", f"number{number}"]
        cogs.write("own", TABLE + "raise RuntimeError")
        with pytest.raises(CogError, match="the former code is back"):
            await bot.loader.reload("own")
        await bot.loader.unload("own")
        assert "own_members" not in Base.metadata.tables


async def test_a_package_is_reloaded_with_its_parts(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    package = cogs.directory / "large"
    package.mkdir()
    (package / "__init__.py").write_text("from .part import setup\n")
    (package / "part.py").write_text("async def setup(bot): bot.part = 1\n")
    async with running(database, simulator, monkeypatch, extensions=[cogs.module("large")]) as bot:
        (package / "part.py").write_text("async def setup(bot): bot.part = 2222\n")
        await bot.loader.reload("large")
        assert bot.part == 2222  # type: ignore[attr-defined]
        (package / "part.py").write_text("raise RuntimeError('no')\n")
        with pytest.raises(CogError, match="the former code is back"):
            await bot.loader.reload("large")
        assert bot.part == 2222  # type: ignore[attr-defined]
        assert cogs.module("large.part") in sys.modules


async def test_an_end_that_fails_or_hangs_does_not_keep_a_cog(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    ends = {"fails": "raise RuntimeError", "hangs": "await asyncio.Event().wait()"}
    for name, end in ends.items():
        cogs.plain(name, "x")
        text = (cogs.directory / f"{name}.py").read_text()
        unload = f"    async def cog_unload(self) -> None:\n        {end}\n\nasync def setup"
        cogs.write(name, text.replace("async def setup", unload), head=False)
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        monkeypatch.setattr(loader, "END_SECONDS", 0.3)
        for name in ends:
            await bot.loader.unload(name)
        assert bot.extensions == {}
        assert list(bot.cogs) == []
        assert registered(simulator) == []


async def test_a_set_up_that_was_given_up_and_ends_later_is_no_obstacle(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    monkeypatch.setattr(loader, "COG_SECONDS", 0.1)
    monkeypatch.setattr(loader, "CANCEL_SECONDS", 0.1)
    cogs.write(
        "late",
        """
        async def setup(bot):
            while not hasattr(bot, "go"):
                try: await asyncio.sleep(0.01)
                except asyncio.CancelledError: pass
        """,
    )
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        assert [state.state for state in bot.loader.states()] == ["failed"]
        monkeypatch.setattr(loader, "COG_SECONDS", 30.0)
        bot.go = True  # type: ignore[attr-defined]
        await until(lambda: bot.extensions)
        assert (await bot.loader.load("late")).state == "loaded"


async def test_one_thing_is_done_at_a_time(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    cogs.write("slow", "async def setup(bot):\n    bot.at_work = getattr(bot, 'at_work', 0) + 1\n"
               "    assert bot.at_work == 1\n    await asyncio.sleep(0.05)\n    bot.at_work = 0\n")  # fmt: skip
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        await asyncio.gather(*(bot.loader.reload("slow") for _ in range(4)))
        assert [state.state for state in bot.loader.states()] == ["loaded"]


async def test_what_cannot_be_done_is_one_clear_line(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    cogs.plain("one", "first")
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        for act, name, told in (
            (bot.loader.load, "one", "one is loaded already"),
            (bot.loader.load, "other", "there is no cog 'other': there are one"),
            (bot.loader.reload, "../etc", "there is no cog"),
        ):
            with pytest.raises(ValidationError, match=told):
                await act(name)
        await bot.loader.unload("one")
        for act in (bot.loader.unload, bot.loader.reload):
            with pytest.raises(ValidationError, match="one is not loaded"):
                await act("one")
        (cogs.directory / "one.py").unlink()
        with pytest.raises(CogError, match="one is left out: "):
            await bot.loader.load("one")


def waiting(bot: Guildbook) -> int:
    return len(bot.mirror.writer.buffer) + len(bot.mirror.writer.queue)


async def test_what_waits_to_be_written_is_written_whatever_happens_to_a_cog(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    cogs.plain("one", "first")
    guild_id = next(iter(simulator.world.guilds))
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions, flush_seconds=3.0) as bot:
        joined = [simulator.world.join(guild_id) for _ in range(3)]
        await until(lambda: waiting(bot))
        before = waiting(bot)
        await bot.loader.reload("one")
        cogs.write("one", "raise RuntimeError")
        with pytest.raises(CogError):
            await bot.loader.reload("one")
        assert waiting(bot) >= before, "still waiting: nothing was lost, nothing was hurried"
        async with asyncio.timeout(20):
            while await database.fetchval("SELECT count(*) FROM members WHERE user_id = ANY($1)", joined) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def test_only_modules_and_packages_without_an_underscore_are_cogs(tmp_path: Path) -> None:
    directory = tmp_path / "cogs"
    (directory / "large").mkdir(parents=True)
    for name in ("__init__.py", "_shared.py", "small.py", "notes.txt", "large/__init__.py", "large/part.py"):
        (directory / name).touch()
    assert found_extensions(directory) == ["cogs.large", "cogs.small"]

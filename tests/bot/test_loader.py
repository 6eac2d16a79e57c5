"""Cogs are loaded in isolation, and a failed load leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from discord import app_commands

from docs.generate import OWN_COGS
from models import Base
from simulator import Simulator
from tests.bot.running import running_bot, wait_until_mirrored
from tests.bot.temporary_cogs import TemporaryCogs
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.bot.loader import find_extensions
from utils.bot.registrations import Registrations
from utils.database import Pool
from utils.exceptions import CogError, ValidationError

pytestmark = pytest.mark.guilds(10)


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemporaryCogs:
    """An empty package for cogs. Bytecode is written, as in production."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    return TemporaryCogs(tmp_path, monkeypatch)


async def answer_of(simulator: Simulator, name: str) -> str | None:
    """Run a command and return its answer."""
    guild = next(iter(simulator.world.guilds.values()))
    result = await simulator.run_command(name, user_id=guild.owner_id, guild_id=guild.id)
    return (await result.wait_done()).final_content


def registered_commands(simulator: Simulator) -> list[str]:
    return sorted(command["name"] for command in simulator.interactions.commands())


def registrations(bot: Guildbook) -> dict[str, Any]:
    """Return what is registered on a bot; of its tasks, only those that a cog of these tests left behind."""
    captured = Registrations.capture(bot)
    tasks = {task.get_name() for task in captured.tasks if "left behind" in task.get_name()}
    listeners = {event: functions for event, functions in captured.listeners.items() if functions}
    return {
        "cogs": captured.cogs, "listeners": listeners, "commands": captured.commands, "checks": captured.checks,
        "slash": [command.name for _, command in captured.app_commands], "tasks": tasks, "views": captured.views,
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


def short_setup_timeout(bot: Guildbook) -> None:
    bot.loader.setup_timeout = 1.0


async def test_broken_cogs_do_not_affect_others(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: TemporaryCogs
) -> None:
    for name, (text, _) in BROKEN.items():
        cogs.write(name, text)
    cogs.write_answering("good", "well")
    async with running_bot(database, simulator, extensions=cogs.extensions, configure=short_setup_timeout) as bot:
        states = {state.name: state for state in bot.loader.states()}
        assert list(states) == sorted([*BROKEN, "good"])
        assert (states["good"].state, states["good"].reason) == ("loaded", None)
        assert (states["good"].seconds or 0) > 0
        for name, (_, reason) in BROKEN.items():
            assert (states[name].state, states[name].seconds) == ("failed", None)
            assert reason in (states[name].reason or ""), name
            assert "\n" not in (states[name].reason or "")
            assert cogs.module(name) not in sys.modules
        assert await answer_of(simulator, "good") == "well"
        assert list(bot.extensions) == [cogs.module("good")]


LEAVING = """
async def forever() -> None:
    await asyncio.Event().wait()

async def text_command(ctx) -> None: ...

def check(*_): return True

class Part(BaseCog):
    async def start(self) -> None:
        self.spawn(forever(), "left behind by spawn")
        self.turn.start()

    async def stop(self) -> None:
        self.bot.stopped_cogs.append("part")

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
        self.bot.stopped_cogs.append("conflict")

    @app_commands.command(description="Is there already")
    async def good(self, interaction: discord.Interaction[Guildbook]) -> None: ...

class Blank(discord.ui.View):
    @discord.ui.button(label="?", custom_id="?")
    async def press(self, interaction, button) -> None: ...

async def setup(bot: Guildbook) -> None:
    bot.stopped_cogs = []
    await bot.add_cog(Part(bot))
    bot.add_listener(asyncio.sleep, "on_something_else")
    bot.add_command(commands.Command(text_command, name="leave"))
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
async def test_failed_load_leaves_nothing_behind(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: TemporaryCogs, end: str
) -> None:
    cogs.write_answering("good", "well")
    cogs.write("leaving", LEAVING.replace("END", "pass"))
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        await bot.loader.unload("leaving")
        bot.loader.setup_timeout = 1.0
        cogs.write("leaving", LEAVING.replace("END", end))
        await asyncio.sleep(0.05)
        before = registrations(bot)
        assert (before["tasks"], before["views"]) == (set(), [])
        with pytest.raises(CogError, match="leaving could not be loaded: "):
            await bot.loader.load("leaving")
        await asyncio.sleep(0.05)
        assert registrations(bot) == before
        assert bot.stopped_cogs[:1] == ["part"] or bot.stopped_cogs == ["conflict", "part"]  # type: ignore[attr-defined]
        assert ("conflict" in bot.stopped_cogs) == ("Conflict" in end)  # type: ignore[attr-defined]
        cogs.write("leaving", LEAVING.replace("END", "pass"))
        assert (await bot.loader.load("leaving")).state == "loaded"
        assert len(registrations(bot)["tasks"]) == 3


async def test_loading_and_unloading_syncs_commands(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    cogs.write_answering("one", "first")
    cogs.write_answering("two", "second")
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        assert registered_commands(simulator) == ["one", "two"]
        assert (await bot.loader.unload("two")).state == "unloaded"
        assert registered_commands(simulator) == ["one"]
        assert [(state.name, state.state) for state in bot.loader.states()] == [("one", "loaded"), ("two", "unloaded")]
        assert (await bot.loader.load("two")).state == "loaded"
        assert registered_commands(simulator) == ["one", "two"]
        syncs = simulator.interactions.syncs[None]
        cogs.write_answering("two", "changed")
        await bot.loader.reload("two")
        assert await answer_of(simulator, "two") == "changed"
        assert simulator.interactions.syncs[None] == syncs, "unchanged commands are not registered again"
        assert await answer_of(simulator, "one") == "first"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def (", "the loaded code is unchanged: SyntaxError"),
        ("raise RuntimeError('no')", "the previous code was restored: RuntimeError: no"),
        ("async def setup(bot): raise RuntimeError('no')", "the previous code was restored: RuntimeError: no"),
        ("async def setup(bot): await asyncio.Event().wait()", "the previous code was restored: setup of"),
        ("x = 1", "the previous code was restored: it has no `async def setup"),
    ],
)
async def test_failed_reload_restores_the_previous_code(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    cogs: TemporaryCogs,
    text: str,
    expected: str,
) -> None:
    cogs.write_answering("one", "first")
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        bot.loader.setup_timeout = 1.0
        for _ in range(2):
            cogs.write("one", text)
            with pytest.raises(CogError, match="one was not reloaded, ") as caught:
                await bot.loader.reload("one")
            assert expected in str(caught.value)
            (state,) = bot.loader.states()
            assert state.state == "loaded"
            assert state.reason is not None
            assert state.reason in str(caught.value)
            assert await answer_of(simulator, "one") == "first"
            assert len(bot.extra_events["on_something"]) == 1
        cogs.write_answering("one", "fixed")
        assert (await bot.loader.reload("one")).reason is None
        assert await answer_of(simulator, "one") == "fixed"


TABLE = """
from sqlalchemy.orm import Mapped
from models.base import Base, snowflake

class Member(Base):  # the same name as a model of Guildbook
    __tablename__ = "own_members"
    guild_id: Mapped[int] = snowflake(primary_key=True)
    COLUMN
"""


async def test_reloads_a_cog_that_declares_a_table(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    setup = "async def setup(bot): pass"
    cogs.write("own", TABLE.replace("COLUMN", "") + setup)
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        for number in range(3):
            cogs.write("own", TABLE.replace("COLUMN", f"number{number}: Mapped[int]") + setup)
            assert (await bot.loader.reload("own")).state == "loaded"
            assert list(Base.metadata.tables["own_members"].columns.keys()) == ["guild_id", f"number{number}"]
        cogs.write("own", TABLE + "raise RuntimeError")
        with pytest.raises(CogError, match="the previous code was restored"):
            await bot.loader.reload("own")
        await bot.loader.unload("own")
        assert "own_members" not in Base.metadata.tables


async def test_reloads_a_package_with_its_submodules(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    package = cogs.directory / "large"
    package.mkdir()
    (package / "__init__.py").write_text("from .part import setup\n")
    (package / "part.py").write_text("async def setup(bot): bot.part = 1\n")
    async with running_bot(database, simulator, extensions=[cogs.module("large")]) as bot:
        (package / "part.py").write_text("async def setup(bot): bot.part = 2222\n")
        await bot.loader.reload("large")
        assert bot.part == 2222  # type: ignore[attr-defined]
        (package / "part.py").write_text("raise RuntimeError('no')\n")
        with pytest.raises(CogError, match="the previous code was restored"):
            await bot.loader.reload("large")
        assert bot.part == 2222  # type: ignore[attr-defined]
        assert cogs.module("large.part") in sys.modules


async def test_unloads_a_cog_whose_tear_down_fails_or_hangs(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: TemporaryCogs
) -> None:
    bodies = {"fails": "raise RuntimeError", "hangs": "await asyncio.Event().wait()"}
    for name, body in bodies.items():
        cogs.write_answering(name, "x")
        text = (cogs.directory / f"{name}.py").read_text()
        unload = f"    async def cog_unload(self) -> None:\n        {body}\n\nasync def setup"
        cogs.write(name, text.replace("async def setup", unload), with_imports=False)
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        bot.loader.teardown_timeout = 0.3
        for name in bodies:
            await bot.loader.unload(name)
        assert bot.extensions == {}
        assert list(bot.cogs) == []
        assert registered_commands(simulator) == []


async def test_loads_a_cog_whose_timed_out_setup_completed_later(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: TemporaryCogs
) -> None:
    def short_timeouts(bot: Guildbook) -> None:
        bot.loader.setup_timeout = bot.loader.cancel_timeout = 0.1

    cogs.write(
        "late",
        """
        async def setup(bot):
            while not hasattr(bot, "go"):
                try: await asyncio.sleep(0.01)
                except asyncio.CancelledError: pass
        """,
    )
    async with running_bot(database, simulator, extensions=cogs.extensions, configure=short_timeouts) as bot:
        assert [state.state for state in bot.loader.states()] == ["failed"]
        bot.loader.setup_timeout = 30.0
        bot.go = True  # type: ignore[attr-defined]
        await until(lambda: bot.extensions)
        assert (await bot.loader.load("late")).state == "loaded"


async def test_reloads_run_one_at_a_time(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    cogs.write("slow", "async def setup(bot):\n    bot.at_work = getattr(bot, 'at_work', 0) + 1\n"
               "    assert bot.at_work == 1\n    await asyncio.sleep(0.05)\n    bot.at_work = 0\n")  # fmt: skip
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        await asyncio.gather(*(bot.loader.reload("slow") for _ in range(4)))
        assert [state.state for state in bot.loader.states()] == ["loaded"]


async def test_rejects_impossible_requests(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    cogs.write_answering("one", "first")
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        for act, name, reason in (
            (bot.loader.load, "one", "one is already loaded"),
            (bot.loader.load, "other", "no cog is named 'other': expected one of one"),
            (bot.loader.reload, "../etc", "no cog is named"),
        ):
            with pytest.raises(ValidationError, match=reason):
                await act(name)
        await bot.loader.unload("one")
        for act in (bot.loader.unload, bot.loader.reload):
            with pytest.raises(ValidationError, match="one is not loaded"):
                await act("one")
        (cogs.directory / "one.py").unlink()
        with pytest.raises(CogError, match="one could not be loaded: "):
            await bot.loader.load("one")


def rows_waiting(bot: Guildbook) -> int:
    return len(bot.mirror.writer.buffer) + len(bot.mirror.writer.queue)


async def test_failed_reload_keeps_buffered_rows(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    cogs.write_answering("one", "first")
    guild_id = next(iter(simulator.world.guilds))
    async with running_bot(database, simulator, extensions=cogs.extensions, flush_seconds=3600) as bot:
        await until(lambda: bot.mirror.is_ready()[0] and not bot.mirror.archived.guilds_waiting)
        await bot.mirror.writer.flush()  # from here on nothing is due for an hour
        waiting = rows_waiting(bot)
        joined = [simulator.world.join(guild_id) for _ in range(3)]
        await until(lambda: rows_waiting(bot) >= waiting + 2 * len(joined))  # a user and a member each
        before = rows_waiting(bot)
        await bot.loader.reload("one")
        cogs.write("one", "raise RuntimeError")
        with pytest.raises(CogError):
            await bot.loader.reload("one")
        assert rows_waiting(bot) >= before, "nothing was dropped or flushed early"
    assert await database.fetchval("SELECT count(*) FROM members WHERE user_id = ANY($1)", joined) == len(joined)


def test_finds_modules_and_packages_without_underscore(tmp_path: Path) -> None:
    directory = tmp_path / "cogs"
    (directory / "large").mkdir(parents=True)
    for name in ("__init__.py", "_shared.py", "small.py", "notes.txt", "large/__init__.py", "large/part.py"):
        (directory / name).touch()
    assert find_extensions(directory) == ["cogs.large", "cogs.small"]


async def test_broken_modules_are_logged_and_the_others_work(
    database: Pool, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    extensions = ("tests.bot.cogs.unreadable", "tests.bot.cogs.failing", "tests.bot.cogs.missing", "cogs.mirror")
    with caplog.at_level(logging.ERROR, "utils.bot.loader"):
        async with running_bot(database, simulator, extensions=extensions) as bot:
            assert list(bot.cogs) == ["MirrorCommands"]
            await wait_until_mirrored(database, simulator)
    lines = sorted(record.getMessage() for record in caplog.records if record.name == "utils.bot.loader")
    for name, line in zip(sorted(extensions[:3]), lines, strict=True):
        assert line.startswith(f"cog not loaded: {name}: ")
    assert "cog_load fails" in lines[0]
    assert "import fails" in lines[2]


async def test_all_cogs_load_with_unique_command_names(database: Pool, simulator: Simulator) -> None:
    async with running_bot(database, simulator) as bot:
        assert sorted(bot.extensions) == find_extensions()
        assert {*OWN_COGS} <= {*find_extensions()}
        names: list[str] = []
        for cog in bot.cogs.values():
            names += [command.qualified_name for command in cog.walk_commands()]
            for command in cog.walk_app_commands():
                assert isinstance(command, app_commands.Command | app_commands.Group)
                assert command.description not in ("", "…")
                names.append(command.qualified_name)
        assert len(names) == len(set(names)), sorted(names)


async def test_tasks_and_loops_that_a_plain_cog_leaks_are_named_and_cancelled(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, caplog: pytest.LogCaptureFixture
) -> None:
    cogs.write(
        "leaking",
        """
        class Leaking(commands.Cog):
            async def cog_load(self) -> None:
                self.poll.start()
                self.task = asyncio.create_task(self.wait_for_ever(), name="for ever")

            @app_commands.command()
            async def leak(self, interaction: discord.Interaction) -> None:
                self.later = asyncio.create_task(self.wait_for_ever(), name="from a command")
                await interaction.response.send_message("leaked")

            async def wait_for_ever(self) -> None:
                await asyncio.Event().wait()

            @tasks.loop(hours=1)
            async def poll(self) -> None: ...

        async def setup(bot: Guildbook) -> None:
            await bot.add_cog(Leaking())
        """,
    )
    guild = next(iter(simulator.world.guilds.values()))
    async with running_bot(database, simulator, extensions=[cogs.module("leaking")]) as bot:
        cog: Any = bot.cogs["Leaking"]
        await (await simulator.run_command("leak", user_id=guild.owner_id, guild_id=guild.id)).wait_done()
        await bot.loader.unload("leaking")
        assert all(task.cancelled() for task in (cog.task, cog.later, cog.poll.get_task()))
    assert "from a command, at " in caplog.text
    assert "leaking.py:" in caplog.text
    assert "in wait_for_ever; with self.spawn it would have ended" in caplog.text

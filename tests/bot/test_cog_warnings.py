"""What of a cog cannot work is named when it is loaded: listeners, `wait_for`, text commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogs.db import BotContext
from simulator import Simulator
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from utils.bot.cog_source import SourceContext
from utils.database import Pool
from utils.operations.doctor import CHECKS, run_checks

pytestmark = pytest.mark.guilds(10)

LEVELS = """
class Levels(commands.Cog):
    def __init__(self, bot):
        self.bot = bot

    @commands.Cog.listener()
    async def on_message(self, message):
        if message.content.startswith("gg"):
            await message.add_reaction("👍")

    @commands.Cog.listener("on_message")
    async def count(self, message):
        self.bot.counted = message.author.id
        await self.bot.process_commands(message)

    @commands.Cog.listener()
    async def on_reaction_add(self, reaction, user):
        pass

    @commands.Cog.listener()
    async def on_member_update(self, before, after):
        pass

    @commands.Cog.listener()
    async def on_mirror_change(self, change):
        pass

    @commands.Cog.listener()
    async def on_something_of_mine(self):
        self.bot.dispatch("member_joined")

    @commands.Cog.listener()
    async def on_member_joined(self):
        pass

    @commands.Cog.listener()
    async def on_messages(self, message):
        pass

    @commands.command()
    async def rank(self, ctx):
        await self.bot.wait_for("message_edit", timeout=1)
        await self.bot.wait_for("message", timeout=1)
        await self.bot.wait_for("raw_reaction_add", timeout=1)

async def setup(bot):
    await bot.add_cog(Levels(bot))
"""
#: Without any setting.
EXPECTED = (
    "on_member_update (Levels.on_member_update) is called for the bot itself only (MEMBER_CACHE=none); use"
    " on_mirror_change, or set EVENTS_FROM_MIRROR=1 or MEMBER_CACHE=all",
    "on_message (Levels.on_message) reads message.content, which is empty in guilds unless the bot is mentioned;"
    " declare intents = discord.Intents(message_content=True) in the cog, or set INTENTS=message_content",
    "on_message (Levels.count) calls process_commands, as the bot does: each command runs twice; remove it",
    "on_messages (Levels.on_messages) is never called: there is no such event; did you mean on_message?",
    "on_reaction_add (Levels.on_reaction_add) is never called without the intent guild_reactions or dm_reactions and"
    " messages in memory; declare intents = discord.Intents(guild_reactions=True) in the cog, or set"
    " INTENTS=guild_reactions; use on_raw_reaction_add, or set MESSAGE_CACHE=1000",
    "on_message_edit (wait_for in MODULE:43) is never called without messages in memory; use on_raw_message_edit, or"
    " set MESSAGE_CACHE=1000",
    "on_raw_reaction_add (wait_for in MODULE:45) is never called without the intent guild_reactions or dm_reactions;"
    " declare intents = discord.Intents(guild_reactions=True) in the cog, or set INTENTS=guild_reactions",
    "the text command rank works only after a mention of the bot; set COMMAND_PREFIX, for example to !",
)


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemporaryCogs:
    """An empty package for cogs."""
    return TemporaryCogs(tmp_path, monkeypatch)


async def test_what_cannot_work_is_logged_listed_and_checked(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, caplog: pytest.LogCaptureFixture
) -> None:
    cogs.write("levels", "from discord.ext import commands\n" + LEVELS, with_imports=False)
    cogs.write("broken", "import nothing_like_this")
    async with running_bot(database, simulator, extensions=[*cogs.extensions, "cogs.cogs"]) as bot:
        expected = tuple(line.replace("MODULE", cogs.module("levels")) for line in EXPECTED)
        states = {state.name: state for state in bot.loader.states()}
        assert states["levels"].warnings == expected
        for line in expected:
            assert caplog.text.count(f"cog levels: {line}\n") == 1
        operator = simulator.world.operator_id
        result = await simulator.run_command("cogs", subcommand="list", user_id=operator)
        answer = (await result.wait_done()).final_content or ""
        assert "- warning: on\\_reaction\\_add (Levels.on\\_reaction\\_add) is never called" in answer

        check = [check for check in CHECKS if check.name == "cogs"]
        lines = [finding.line for finding in await run_checks(BotContext(bot, database), check)]
        assert lines[0].startswith("warn  cogs: broken is not loaded: ModuleNotFoundError: No module named")
        assert lines[1:] == [f"warn  cogs: levels: {line}" for line in expected]
        await bot.loader.unload("levels")
        assert [state.warnings for state in bot.loader.states() if state.name == "levels"] == [()]


async def test_a_long_list_is_a_file(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    for name in ("levels", "more"):
        cogs.write(name, LEVELS.replace("Levels", name.title()).replace("rank", name))
    async with running_bot(database, simulator, extensions=[*cogs.extensions, "cogs.cogs"]):
        result = await simulator.run_command("cogs", subcommand="list", user_id=simulator.world.operator_id)
        assert "s (8 warnings, see the file)" in ((await result.wait_done()).final_content or "")
        assert result.files["cogs.txt"].decode().count("- warning: ") == 16


async def test_intents_and_caches_end_the_warnings(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    text = (
        LEVELS.replace(
            "class Levels(commands.Cog):",
            "class Levels(commands.Cog):\n    intents = discord.Intents(message_content=True, reactions=True)",
        )
        .replace("on_messages", "on_message_of_mine")
        .replace("process_commands", "get_context")
    )
    cogs.write("levels", text)
    async with running_bot(
        database, simulator, extensions=cogs.extensions,
        member_cache="all", message_cache=10, command_prefix=("!",),
    ) as bot:  # fmt: skip
        assert [state.warnings for state in bot.loader.states()] == [()]


def test_the_source_tells_the_same_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "levels.py").write_text("import nothing_like_this\n" + LEVELS)
    folder = tmp_path / "declaring"
    folder.mkdir()
    (folder / "__init__.py").write_text("this is no Python")
    (folder / "cog.py").write_text(
        LEVELS.replace("self.bot.wait_for", "self.wait").replace(
            "class Levels(commands.Cog):",
            "class Levels(commands.Cog):\n    intents = discord.Intents(presences=True) | Intents.none()",
        )
    )
    cogs = [("levels", tmp_path / "levels.py"), ("declaring", folder), ("gone", tmp_path / "gone.py")]
    context = SourceContext(lambda: cogs)
    expected = [f"levels: {line.replace('MODULE', 'levels.py')}" for line in EXPECTED]
    listeners = [line for line in expected if "wait_for" not in line]
    assert sorted(context.cog_problems()) == sorted(
        expected + [line.replace("levels: ", "declaring: ") for line in listeners]
    )
    assert context.cog_intents() == {"presences": ["declaring"]}


async def test_waiting_for_what_never_comes_is_logged_once(
    database: Pool, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_bot(database, simulator, extensions=[]) as bot:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await bot.wait_for("typing", timeout=0.01)
        assert caplog.text.count("wait_for('typing'): on_typing is never called without the intent guild_typing") == 1
        assert f"{__name__}:" in caplog.text

"""Text commands over the wire: prefixes, mentions, hooks of cogs, the help command, and what Discord leaves empty."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import discord
import pytest
from discord.ext import commands
from hypothesis import given
from hypothesis import strategies as st

from simulator import Simulator
from tests.bot.chat import Chat
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from utils.base_cog import BaseCog
from utils.bot.client import Guildbook
from utils.bot.prefixes import Prefixes, has_hook
from utils.database import Pool

pytestmark = pytest.mark.guilds(10)

#: A cog as it was written for discord.py alone, with a hybrid command.
PORTED = """
class Ported(commands.Cog):
    def __init__(self, bot):
        self.bot = bot

    @commands.command()
    async def double(self, ctx, number: int):
        await ctx.send(f"{number * 2}")

    @commands.hybrid_command(description="Say hello")
    async def greet(self, ctx, name: str = "you"):
        await ctx.send(f"hello {name}")

async def setup(bot):
    await bot.add_cog(Ported(bot))
"""
HELPING = """
async def setup(bot):
    bot.help_command = commands.MinimalHelpCommand(no_category="Mine")
"""


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemporaryCogs:
    """An empty package for cogs."""
    return TemporaryCogs(tmp_path, monkeypatch)


async def test_ported_text_commands_work(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, caplog: pytest.LogCaptureFixture
) -> None:
    cogs.write("ported", PORTED)
    cogs.write("helping", HELPING)
    settings: dict[str, Any] = {
        "command_prefix": ("!", "!!", "?"), "intents": ("message_content", "dm_messages"), "help_command": "default",
    }  # fmt: skip
    async with running_bot(database, simulator, extensions=cogs.extensions, **settings) as bot:
        chat = Chat(bot, simulator)
        for text in ("!double 4", "!!double 4", "?double 4", f"{chat.mention} double 4"):
            assert await chat.say(text) == "8", text
        assert await chat.say("!double 4", is_direct=True) == "8"
        assert await chat.say("!greet me") == "hello me"
        result = await simulator.run_command("greet", user_id=chat.user_id, guild_id=chat.guild_id)
        assert (await result.wait_done()).final_content == "hello you"
        assert [state.warnings for state in bot.loader.states()] == [(), ()]
        caplog.clear()
        caplog.set_level(logging.INFO)
        chatter = "double 4", "!", "hey {}", "{} what do you think?", "{} it's \"open", "{}"
        for text in [text.replace("{}", chat.mention) for text in chatter]:
            assert await chat.say(text) is None, text
        assert [record.getMessage() for record in caplog.records if "mirror" not in record.name] == []

        assert "Mine" in (await chat.say("!help") or ""), "a cog's help command replaces the one of the setting"
        await bot.loader.unload("helping")
        assert "No Category" in (await chat.say("!help") or ""), "which is back when the cog is unloaded"


async def test_without_message_content_prefixes_work_after_a_mention_only(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs
) -> None:
    cogs.write("ported", PORTED)
    settings: dict[str, Any] = {"command_prefix": ("!",), "intents": ("dm_messages",)}
    async with running_bot(database, simulator, extensions=cogs.extensions, **settings) as bot:
        chat = Chat(bot, simulator)
        assert await chat.say("!double 4") is None
        assert await chat.say(f"{chat.mention} double 4") == "8"
        assert await chat.say("!double 4", is_direct=True) == "8"
        assert await chat.say("!help") is None
        assert bot.loader.states()[0].warnings == (
            "the text commands double, greet work in guilds only after a mention of the bot, because Discord leaves"
            " other messages empty; declare intents = discord.Intents(message_content=True) in the cog, or set"
            " INTENTS=message_content",
        )


HOOKED = """
class Prefix(BaseModel):
    value: str = "."

class Hooked(BaseCog):
    intents = discord.Intents(message_content=True)

    async def command_prefix(self, message: discord.Message) -> str | None:
        if message.guild is None or self.bot.mood == "default":
            return None
        if self.bot.mood == "slow":
            await asyncio.Event().wait()
        return (await self.documents("prefix", Prefix).get("settings", message.guild.id)).value

    @commands.command()
    async def prefix(self, ctx: commands.Context[Guildbook], value: str) -> None:
        await self.documents("prefix", Prefix).set("settings", Prefix(value=value), ctx.guild.id)
        await ctx.send("done")

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Hooked(bot))
"""


async def test_a_cog_chooses_prefixes_from_documents(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, caplog: pytest.LogCaptureFixture
) -> None:
    cogs.write("hooked", "from pydantic import BaseModel\n" + HOOKED)
    cogs.write("ported", PORTED)

    def be_quick(bot: Guildbook) -> None:
        bot.prefixes.timeout, bot.prefixes.pause = 0.2, 10_000.0
        bot.mood = "documents"  # type: ignore[attr-defined]

    async with running_bot(
        database, simulator, extensions=cogs.extensions, configure=be_quick, command_prefix=("!",)
    ) as bot:
        chat = Chat(bot, simulator)
        assert await chat.say(".prefix $") == "done"
        answers = {text: await chat.say(f"{text}double 1") for text in ("$", ".", "!", f"{chat.mention} ")}
        assert answers == {"$": "2", ".": None, "!": None, f"{chat.mention} ": "2"}
        bot.mood = "default"  # type: ignore[attr-defined]
        assert (await chat.say("!double 1"), await chat.say("$double 1")) == ("2", None)
        bot.mood = "slow"  # type: ignore[attr-defined]
        assert await chat.say("!double 1") == "2"
        bot.mood = "documents"  # type: ignore[attr-defined]
        assert await chat.say("$double 1") is None, "it is left out for a while"
        assert caplog.text.count("command_prefix of Hooked failed") == 1
        assert "no answer within 0.2 s" in caplog.text


class Answering(commands.Cog):
    """A cog whose hook returns or raises what a test says."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls = 0

    async def command_prefix(self, message: discord.Message) -> Any:
        self.calls += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class FakeBot:
    """What `Prefixes` needs of a bot."""

    def __init__(self) -> None:
        self.user = discord.Object(1)


class OtherAnswering(Answering):
    """One more, with a name of its own."""


anything = st.one_of(
    st.none(), st.text(max_size=3), st.lists(st.text(max_size=3), max_size=3), st.integers(), st.lists(st.integers()),
    st.builds(ValueError), st.builds(KeyError),
)  # fmt: skip


@given(anything, anything, st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_whatever_hooks_return_there_is_a_usable_prefix(first: Any, second: Any, default: list[str]) -> None:
    bot: Any = FakeBot()
    message: Any = None
    prefixes = Prefixes(default)
    prefixes.find_hooks([Answering(first), OtherAnswering(second)])
    mentions = asyncio.run(prefixes.find(bot, message))
    assert mentions[:2] == ["<@1> ", "<@!1> "]
    usable = [answer for answer in (first, second) if _is_usable(answer)]
    expected = {part for answer in usable for part in ([answer] if isinstance(answer, str) else answer)} - {""}
    assert set(mentions[2:]) == (expected if usable else set(default))
    lengths = [len(prefix) for prefix in mentions[2:]]
    assert lengths == sorted(lengths, reverse=True), "!! is tried before !"


def _is_usable(answer: Any) -> bool:
    return isinstance(answer, str) or (isinstance(answer, list) and all(isinstance(part, str) for part in answer))


async def test_a_failing_hook_is_called_again_after_its_pause(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cog = Answering(ValueError())
    bot: Any = FakeBot()
    message: Any = None
    paused, eager = Prefixes(["!"], pause=10_000), Prefixes(["!"], pause=0)
    for prefixes, calls in ((paused, 1), (eager, 3)):
        prefixes.find_hooks([cog])
        cog.calls = 0
        for _ in range(3):
            assert (await prefixes.find(bot, message))[2:] == ["!"]
        assert cog.calls == calls
    cog.answer = "$"
    assert (await eager.find(bot, message))[2:] == ["$"]
    assert [record.getMessage() for record in caplog.records] == [
        "command_prefix of Answering failed, COMMAND_PREFIX applies: ValueError()",
        "command_prefix of Answering failed, COMMAND_PREFIX applies: ValueError()",
        "command_prefix of Answering works again",
    ]


async def test_many_slow_hooks_do_not_pile_up() -> None:
    class Slow(commands.Cog):
        async def command_prefix(self, message: discord.Message) -> str:
            await release.wait()
            return "$"

    release = asyncio.Event()
    bot: Any = FakeBot()
    message: Any = None
    prefixes = Prefixes(["!"], timeout=10_000, max_waiting=2)
    prefixes.find_hooks([Slow()])
    waiting = [asyncio.create_task(prefixes.find(bot, message)) for _ in range(2)]
    await asyncio.sleep(0)
    assert (await prefixes.find(bot, message))[2:] == ["!"]
    release.set()
    assert [found[2:] for found in await asyncio.gather(*waiting)] == [["$"], ["$"]]


def test_only_an_overridden_method_is_a_hook() -> None:
    class Plain(BaseCog):
        pass

    class Own(BaseCog):
        async def command_prefix(self, message: discord.Message) -> str:
            return "$"

    assert [has_hook(cls.__new__(cls)) for cls in (Plain, Own, Answering)] == [False, True, True]

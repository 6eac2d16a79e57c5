"""The cogs of the page on porting work with the settings that it shows, over the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import discord
import pytest

from simulator import Simulator
from tests.bot.activity import until_received
from tests.bot.chat import Chat
from tests.bot.running import running_bot
from tests.docs.blocks import ROOT, blocks_of
from tests.waiting import until
from utils.bot.listeners import Present, find_problem
from utils.database import Pool
from utils.settings import load_settings

pytestmark = pytest.mark.guilds(10)

PAGE = ROOT / "docs" / "how-to" / "porting.md"


async def test_the_ported_cogs_work(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocks = blocks_of(PAGE)
    karma, _, prefix = [block.text for block in blocks if block.language == "python"]
    package = tmp_path / "ported_cogs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "karma.py").write_text(karma)
    (package / "prefix.py").write_text(prefix)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "env").write_text(next(block.text for block in blocks if block.language == "dotenv"))
    settings = load_settings(tmp_path / "env")
    chosen: dict[str, Any] = {"intents": settings.intents, "command_prefix": settings.command_prefix}
    names = ["ported_cogs.karma", "ported_cogs.prefix"]
    async with running_bot(database, simulator, extensions=names, **chosen) as bot:
        assert [state.warnings for state in bot.loader.states()] == [(), ()]
        chat = Chat(bot, simulator)
        simulator.world.react(chat.guild_id, chat.channel_id, 5, chat.user_id)
        assert await chat.say("!karma") == "1 reactions"
        assert await chat.say("?karma", is_direct=True) == "1 reactions"
        assert await chat.say("!prefix $") == "The prefix is $ now."
        assert (await chat.say("!karma"), await chat.say("$karma")) == (None, "1 reactions")
        await chat.say("good bot")
        await until(lambda: bot.get_cog("Karma").karma.get(chat.last_message_id) == 1)  # type: ignore[union-attr]


async def test_members_are_found_without_members_in_memory(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (farewell,) = [block.text for block in blocks_of(PAGE) if block.language == "python" and "Farewell" in block.text]
    (tmp_path / "farewell.py").write_text(farewell)
    monkeypatch.syspath_prepend(tmp_path)
    world = simulator.world
    async with running_bot(
        database, simulator, extensions=["farewell"], events_from_mirror=True, command_prefix=("!",)
    ) as bot:
        assert [state.warnings for state in bot.loader.states()] == [()]
        chat = Chat(bot, simulator)
        user_id = world.join(chat.guild_id)
        world.rename_user(user_id, username="ada", global_name="Ada")
        await until_received(bot, simulator, chat.guild_id)
        await bot.mirror.settled(chat.guild_id)
        assert await chat.say("!who ada") == "ada, here since 2026"
        assert await chat.say("!find ad") == "Ada"
        world.update_member(chat.guild_id, user_id, nick="Countess")
        world.leave(chat.guild_id, user_id)
        said = [message["content"] for message in simulator.channels.sent.values()]
        await until(lambda: len(simulator.channels.sent) == len(said) + 2)
        said = [message["content"] for message in simulator.channels.sent.values()]
        assert sorted(said[-2:]) == ["Ada is Countess now", "Countess left, with 0 roles"]


def test_the_warning_is_worded_so() -> None:
    (text,) = [block.text for block in blocks_of(PAGE) if block.language == "text"]
    found = find_problem("reaction_add", Present(discord.Intents(guild_reactions=True), "none", 0))
    assert text.strip() == f"cog levels: on_reaction_add (Levels.on_reaction_add) {found}"

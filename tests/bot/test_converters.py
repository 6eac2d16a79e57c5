"""Members and users as arguments of commands, over the wire, with nobody in discord.py's memory."""

from __future__ import annotations

from pathlib import Path

import discord
import pytest
from discord.ext import commands
from discord.ext.commands.converter import CONVERTER_MAPPING

from simulator import Simulator
from tests.bot.activity import until_received
from tests.bot.chat import Chat
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from tests.waiting import until
from utils.bot.converters import MemberConverter, UserConverter
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.repositories import MemberRepository

pytestmark = pytest.mark.guilds(10)

#: Commands as they are written for discord.py alone, and options that take names.
COG = """
from utils.base_cog import MemberTransformer, UserTransformer

class Asking(commands.Cog):
    @commands.command()
    async def who(self, ctx, member: discord.Member):
        assert type(member) is discord.Member and member.guild == ctx.guild
        await ctx.send(f"{member.id} {member.display_name} {len(member.roles)}")

    @commands.command()
    async def which(self, ctx, user: discord.User | int):
        await ctx.send(f"{user.id} {user.name}" if isinstance(user, discord.User) else "a number")

    @app_commands.command(description="Tell who it is")
    async def tell(
        self,
        interaction: discord.Interaction,
        member: app_commands.Transform[discord.Member, MemberTransformer],
        user: app_commands.Transform[discord.User, UserTransformer],
    ) -> None:
        await interaction.response.send_message(f"{member.id} {user.id}")

async def setup(bot):
    await bot.add_cog(Asking(bot))
"""


async def ask(chat: Chat, simulator: Simulator, text: str) -> str:
    """Write a text and return the answer, which may wait for an answer of Discord's."""
    sent = simulator.channels.sent
    before = set(sent)
    await chat.say(text)
    (answer,) = await until(lambda: [message for id, message in sent.items() if id not in before])
    content: str = answer["content"]
    return content


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The module with the commands."""
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write("asking", COG)
    return cogs.extensions


async def test_text_commands_take_members_and_users_by_id_mention_and_name(
    database: Pool, simulator: Simulator, extensions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = simulator.world
    async with running_bot(
        database, simulator, extensions=extensions, command_prefix=("!",), intents=("message_content",)
    ) as bot:
        chat = Chat(bot, simulator)
        guild_id = chat.guild_id
        user_id = world.join(guild_id)
        role_id = max(world.guild(guild_id).roles)
        world.rename_user(user_id, username="ada", global_name="Ada L")
        world.update_member(guild_id, user_id, nick="Countess", roles=[role_id])
        tag = f"ada#{world.user(user_id).discriminator}"
        guild = bot.get_guild(guild_id)
        assert guild is not None
        await until_received(bot, simulator, guild_id)
        await bot.mirror.writer.flush()
        assert guild.get_member(user_id) is None
        for argument in (str(user_id), f"<@{user_id}>", f"<@!{user_id}>", "ada", tag, '"Ada L"', "Countess"):
            assert await ask(chat, simulator, f"!who {argument}") == f"{user_id} Countess 2", argument
        for argument in (str(user_id), f"<@{user_id}>", "ada", "ADA", tag, '"Ada L"'):
            assert await ask(chat, simulator, f"!which {argument}") == f"{user_id} ada", argument
        assert await ask(chat, simulator, "!which 5") == "a number"
        assert "not found" in (await ask(chat, simulator, "!who nobody")).lower()
        assert guild.get_member(user_id) is None

        async def fail(*_: object) -> None:
            raise DatabaseUnavailable("gone")

        for name in ("as_discord", "by_name"):
            monkeypatch.setattr(MemberRepository, name, fail)
        for argument in (str(user_id), "ada"):  # then Discord is asked
            assert await ask(chat, simulator, f"!who {argument}") == f"{user_id} Countess 2", argument


async def test_text_options_take_members_and_users_by_name(
    database: Pool, simulator: Simulator, extensions: list[str]
) -> None:
    world = simulator.world
    async with running_bot(database, simulator, extensions=extensions) as bot:
        chat = Chat(bot, simulator)
        user_id = world.join(chat.guild_id)
        world.rename_user(user_id, username="ada", global_name="Ada L")
        await until_received(bot, simulator, chat.guild_id)
        await bot.mirror.writer.flush()
        typing = await simulator.autocomplete(
            "tell", options={"member": "ad"}, focused="member", user_id=chat.user_id, guild_id=chat.guild_id
        )
        choices = (await typing.wait_done()).choices
        assert choices is not None
        assert ("Ada L (ada)", str(user_id)) in [(choice["name"], choice["value"]) for choice in choices]
        for member, user in ((str(user_id), "ada"), ("Ada L", f"<@{user_id}>")):
            result = await simulator.run_command(
                "tell", options={"member": member, "user": user}, user_id=chat.user_id, guild_id=chat.guild_id
            )
            assert (await result.wait_done()).final_content == f"{user_id} {user_id}"
        result = await simulator.run_command(
            "tell", options={"member": "nobody", "user": "ada"}, user_id=chat.user_id, guild_id=chat.guild_id
        )
        answer = (await result.wait_done()).final_content
        assert answer is not None
        assert answer.startswith("Nobody here is called 'nobody'")


def test_the_converters_are_those_of_the_annotations() -> None:
    assert (CONVERTER_MAPPING[discord.Member], CONVERTER_MAPPING[discord.User]) == (MemberConverter, UserConverter)
    assert issubclass(MemberConverter, commands.MemberConverter)
    for name in ("query_member_by_id", "query_member_named"):  # which discord.py's converter calls
        assert name in commands.MemberConverter.convert.__code__.co_names

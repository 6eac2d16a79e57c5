"""Converters and transformers that find members and users by id, mention or name in the mirror, without a cache.

`MemberConverter` and `UserConverter` also stand behind the annotations `discord.Member` and `discord.User` of text
commands, in every cog. What they cannot find in the mirror, they leave to discord.py, which asks Discord.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import discord
from discord import app_commands
from discord.ext import commands
from discord.ext.commands.converter import CONVERTER_MAPPING

from utils.exceptions import DatabaseError, Declined
from utils.mirror.discord.people import build_user
from utils.repositories import MemberRepository, UserRepository

Choice = app_commands.Choice[str | int | float]

#: The longest name of a choice that Discord shows (Discord API reference, "Application Command Option Choice").
CHOICE_LENGTH = 100
#: An id alone, or a mention.
_ID = re.compile(r"([0-9]{15,20})$|<@!?([0-9]{15,20})>$")
#: A name with a discriminator: four digits of a bot, or 0.
_TAG = re.compile(r"(?P<name>.+)#(?P<digits>0|[0-9]{4})$", re.DOTALL)


class MemberConverter(commands.MemberConverter):
    """Converts an id, a mention, a username, a display name or a nick to a member of the guild.

    Example::

        @commands.command()
        async def warn(self, ctx: commands.Context, member: discord.Member, *, reason: str) -> None: ...

    The member is discord.py's own if it has them in memory, otherwise one as `self.members.as_discord` returns it. Of
    several members with the name, the one that `self.members.by_name` returns.
    """

    async def query_member_by_id(self, bot: Any, guild: discord.Guild, user_id: int) -> discord.Member | None:
        """Return a member whom discord.py does not have in memory: the mirror's, otherwise what Discord answers."""
        with _members(bot) as members:
            if members is not None and (found := await members.as_discord(guild, user_id)) is not None:
                return found
        return await super().query_member_by_id(bot, guild, user_id)

    async def query_member_named(self, guild: discord.Guild, argument: str) -> discord.Member | None:
        """Return a member by name whom discord.py does not have in memory, as `query_member_by_id` does."""
        with _members(_client_of(guild)) as members:
            if members is not None and (found := await _member_named(members, guild, argument)) is not None:
                return found
        return await super().query_member_named(guild, argument)


class UserConverter(commands.UserConverter):
    """Converts an id, a mention, a username or a display name to a user that the bot has seen in any guild."""

    async def convert(self, ctx: commands.Context[Any], argument: str) -> discord.User:
        """Return the user. Raises `commands.UserNotFound` if neither the mirror nor Discord knows them."""
        user_id = _parse_id(argument)
        known = None if user_id is None else ctx.bot.get_user(user_id)
        if known is None and hasattr(ctx.bot, "get_db_session"):
            with contextlib.suppress(DatabaseError):
                known = await _find_user(ctx.bot, user_id, argument)
        return known if known is not None else await super().convert(ctx, argument)


class MemberTransformer(app_commands.Transformer):
    """Takes a member by name, id or mention in a text option of a slash command, with suggestions while one types.

    Example::

        @app_commands.command()
        async def profile(
            self, interaction: discord.Interaction, member: app_commands.Transform[discord.Member, MemberTransformer]
        ) -> None: ...

    Discord's own option for users (`member: discord.Member`) needs neither this nor a cache.
    """

    async def transform(self, interaction: discord.Interaction[Any], value: Any, /) -> discord.Member:
        """Return the member. Raises `Declined` if there is none, `DatabaseError` if the database does not answer."""
        guild = interaction.guild
        if guild is None:
            raise app_commands.NoPrivateMessage
        members = MemberRepository(interaction.client.get_db_session)
        user_id = _parse_id(value)
        if user_id is not None:
            found = await members.as_discord(guild, user_id)
        else:
            found = await _member_named(members, guild, value)
        if found is None:
            raise Declined(f"Nobody here is called {value[:50]!r}.")
        return found

    async def autocomplete(self, interaction: discord.Interaction[Any], value: Any, /) -> list[Choice]:
        """Return the members whose names start with what was typed."""
        if interaction.guild is None:
            return []
        found = await MemberRepository(interaction.client.get_db_session).search(interaction.guild, str(value))
        return [_choice(member) for member in found]


class UserTransformer(app_commands.Transformer):
    """Takes a user that the bot has seen in any guild, like `MemberTransformer`, also in direct messages."""

    async def transform(self, interaction: discord.Interaction[Any], value: Any, /) -> discord.User:
        """Return the user. Raises `Declined` if there is none, `DatabaseError` if the database does not answer."""
        found = await _find_user(interaction.client, _parse_id(value), value)
        if found is None:
            raise Declined(f"I know nobody called {value[:50]!r}.")
        return found


def _choice(member: discord.Member) -> Choice:
    name = member.display_name
    shown = name if name == member.name else f"{name} ({member.name})"
    return app_commands.Choice(name=shown[:CHOICE_LENGTH], value=str(member.id))


def _parse_id(text: str) -> int | None:
    """Return the id that a text is or mentions; None if it is a name."""
    match = _ID.match(text)
    return None if match is None else int(match[1] or match[2])


def _client_of(guild: discord.Guild) -> Any:
    return guild._state._get_client()


@contextlib.contextmanager
def _members(bot: Any) -> Iterator[MemberRepository | None]:
    """Yield the members of a bot's mirror, None if it has none. If the database does not answer, go on behind it."""
    get_session: Callable[..., Any] | None = getattr(bot, "get_db_session", None)
    with contextlib.suppress(DatabaseError):
        yield None if get_session is None else MemberRepository(get_session)


async def _member_named(members: MemberRepository, guild: discord.Guild, argument: str) -> discord.Member | None:
    found = await members.by_name(guild, argument)
    if found is None and (tag := _TAG.match(argument)) is not None:
        found = await members.by_name(guild, tag["name"], tag["digits"])
    return found


async def _find_user(bot: Any, user_id: int | None, argument: str) -> discord.User | None:
    users = UserRepository(bot.get_db_session)
    if user_id is not None:
        row = await users.find(user_id)
    else:
        rows = await users.by_name(argument, limit=1)
        if not rows and (tag := _TAG.match(argument)) is not None:
            rows = await users.by_name(tag["name"], tag["digits"], limit=1)
        row = rows[0] if rows else None
    return None if row is None else build_user(bot._connection, vars(row))


def install() -> None:
    """Put `MemberConverter` and `UserConverter` behind the annotations `discord.Member` and `discord.User`.

    They serve every bot of the process; for one without a mirror they are discord.py's.
    """
    CONVERTER_MAPPING[discord.Member] = MemberConverter
    CONVERTER_MAPPING[discord.User] = UserConverter

"""Who may operate the bot, and how an operator's command is run: deferred, reported on, and written down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import discord
from discord import app_commands
from discord.ext import commands

from utils.actions import write_down
from utils.errors import GuildbookError

if TYPE_CHECKING:
    from utils.bot import Guildbook

_log = logging.getLogger(__name__)

#: Seconds between two edits of a reply.
EDIT_SECONDS = 2.0
#: Seconds that a command may take: Discord takes edits of a reply for 15 minutes.
COMMAND_SECONDS = 14 * 60.0
#: Seconds after which the team is asked for anew: who left it no longer operates.
TEAM_SECONDS = 600.0
#: Most characters of a message (Discord API reference, "Create Message").
MESSAGE_LENGTH = 2_000

REFUSAL = (
    "Only operators may do that: the application's owner, its team, and those in ADMIN_USER_IDS."
    " Administrators of a guild are not enough, because this reaches the data of every guild."
)


class Operators:
    """The application's owner or team, and whom the settings name."""

    def __init__(self, bot: Guildbook, named: frozenset[int]) -> None:
        self._bot = bot
        self._named = named
        self._asked_at: float | None = None
        self._owners: frozenset[int] = frozenset()

    async def includes(self, user_id: int) -> bool:
        """Tell whether someone may operate the bot. Raises `GuildbookError` when Discord does not say who owns it."""
        if user_id in self._named:
            return True
        if self._asked_at is None or time.monotonic() - self._asked_at > TEAM_SECONDS:
            try:
                async with asyncio.timeout(30):
                    application = await self._bot.application_info()
            except (discord.DiscordException, OSError, TimeoutError) as exc:
                raise GuildbookError(f"Discord does not say who owns this application just now ({exc})") from exc
            self._owners, self._asked_at = _owners(application), time.monotonic()
        return user_id in self._owners


def _owners(application: discord.AppInfo) -> frozenset[int]:
    team = application.team
    if team is None:
        return frozenset((application.owner.id,))
    accepted = (
        member.id
        for member in team.members
        if member.membership_state is discord.TeamMembershipState.accepted
        and member.role is not discord.TeamMemberRole.read_only
    )
    return frozenset((*accepted, *([team.owner_id] if team.owner_id else [])))


class Reply:
    """The one reply to an operator's command, edited as the work goes on."""

    def __init__(self, interaction: discord.Interaction[Any]) -> None:
        self._interaction = interaction
        self._edited_at = float("-inf")
        self._shown = ""

    async def progress(self, text: str) -> None:
        """Show how far the work has come, unless that was done less than two seconds ago."""
        if text != self._shown and time.monotonic() - self._edited_at >= EDIT_SECONDS:
            await self.show(text)

    async def show(self, text: str) -> None:
        """Show a text; a reply that Discord no longer takes does not end the work."""
        self._edited_at, self._shown = time.monotonic(), text
        try:
            async with asyncio.timeout(30):
                await self._interaction.edit_original_response(content=text[:MESSAGE_LENGTH])
        except (discord.DiscordException, OSError, TimeoutError) as exc:
            _log.warning("the reply to a command could not be edited: %r", exc)


async def operate(
    interaction: discord.Interaction[Guildbook],
    command: str,
    work: Callable[[Reply], Awaitable[str]],
    **arguments: Any,
) -> None:
    """Run an operator's command: defer, check who asks, show what `work` returns, and write it all down.

    `arguments` go into `ops.admin_actions`. A `GuildbookError` is shown as its one line; anything else as a line that
    points to the log.
    """
    bot, reply = interaction.client, Reply(interaction)
    try:
        await interaction.response.defer(ephemeral=True, thinking=True)
    except (discord.DiscordException, OSError) as exc:  # Discord waits for 3 s: the operator sees that it failed
        _log.warning("/%s was not answered in time, and is not run: %r", command, exc)
        return
    try:
        if await bot.operators.includes(interaction.user.id):
            async with asyncio.timeout(COMMAND_SECONDS):
                text = result = await work(reply)
        else:
            text, result = REFUSAL, "refused: no operator"
    except (GuildbookError, discord.DiscordException) as exc:
        text = result = f"Failed: {exc}"
    except TimeoutError:
        text = result = f"Failed: not finished within {COMMAND_SECONDS / 60:g} minutes; it may still be going on"
    except Exception as exc:
        _log.exception("/%s failed", command)
        text = result = f"Failed: an unexpected {type(exc).__name__}; the log says more"
    try:
        await write_down(bot.db, command, arguments, result, user_id=interaction.user.id)
    except GuildbookError as exc:
        _log.error("/%s of user %s was not written down: %s (%s)", command, interaction.user.id, result, exc)
        text += "\n(This use could not be written down: the database does not take it.)"
    await reply.show(text)


async def add_cog(bot: Guildbook, cog: commands.Cog) -> None:
    """Add a cog of operators' commands: to ADMIN_GUILD_ID, or without it to the bot's direct messages."""
    guild_id = bot.settings.admin_guild_id
    in_direct_messages = app_commands.AppCommandContext(guild=False, dm_channel=True, private_channel=False)
    for command in cog.get_app_commands():
        command.allowed_contexts = None if guild_id else in_direct_messages
    if guild_id:
        await bot.add_cog(cog, guild=discord.Object(guild_id))
    else:
        await bot.add_cog(cog)

"""Who may operate the bot, and how an operator's command is run: deferred, reported on, and written down."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import discord
from discord import app_commands
from discord.ext import commands

from utils.exceptions import GuildbookError
from utils.logs import redact
from utils.operations.action import Outcome, Step, record_action
from utils.operations.confirm import Confirmations

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: Seconds between two edits of a reply.
EDIT_SECONDS = 2.0
#: Seconds for which a command is answered: Discord takes edits of a reply for 15 minutes.
COMMAND_SECONDS = 14 * 60.0
#: Seconds that a command may take at all.
ACTION_SECONDS = 12 * 3_600.0
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
        self._at_work: set[asyncio.Task[None]] = set()

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

    def keep(self, action: asyncio.Task[None]) -> None:
        """Keep an action under way, until it ends or the bot does."""
        self._at_work.add(action)
        action.add_done_callback(self._at_work.discard)

    async def answered(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for what is under way to end by itself."""
        if self._at_work:
            await asyncio.wait(self._at_work, timeout=timeout)

    async def stop(self, timeout: float) -> None:
        """Call off what is under way, and wait up to `timeout` seconds for it."""
        actions = {action for action in self._at_work if action is not asyncio.current_task()}
        for action in actions:
            action.cancel()
        if actions:
            await asyncio.wait(actions, timeout=timeout)


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


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer with more than text in it."""

    #: What is written down.
    text: str
    embed: discord.Embed | None = None
    #: Name and content.
    file: tuple[str, bytes] | None = None


class Reply:
    """The one reply to an operator's command, edited as the work goes on."""

    def __init__(self, interaction: discord.Interaction[Any], confirmations: Confirmations) -> None:
        self._interaction = interaction
        self._confirmations = confirmations
        self._edited_at = float("-inf")
        self._shown = ""
        self._step: Step | None = None

    def step(self, step: Step) -> None:
        """Show how far an action has come, at the next occasion. A `Progress`."""
        self._step = step

    async def confirm(self, text: str, label: str) -> None:
        """Return once the operator has pressed a button that says `label`. Raises `NotConfirmed`."""
        await self._confirmations.ask(self._interaction, text[:MESSAGE_LENGTH], label)
        await self.show("Confirmed.")

    async def progress(self, text: str) -> None:
        """Show how far the work has come, unless that was done less than two seconds ago."""
        if text != self._shown and time.monotonic() - self._edited_at >= EDIT_SECONDS:
            await self.show(text)

    async def show(self, text: str, shown: Shown | None = None) -> None:
        """Show a text, without buttons; a reply that Discord no longer takes does not end the work."""
        self._edited_at, self._shown = time.monotonic(), text
        more: dict[str, Any] = {}
        if shown is not None and shown.embed is not None:
            more["embed"] = shown.embed
        if shown is not None and shown.file is not None:
            name, content = shown.file
            more["attachments"] = [discord.File(io.BytesIO(content), name)]
        try:
            async with asyncio.timeout(30):
                await self._interaction.edit_original_response(content=text[:MESSAGE_LENGTH], view=None, **more)
        except (discord.DiscordException, OSError, TimeoutError) as exc:
            _log.warning("the reply to a command could not be edited: %r", exc)

    async def follow(self) -> None:
        """Show the steps of an action as they come, for as long as this is not cancelled."""
        while True:
            await asyncio.sleep(EDIT_SECONDS)
            if self._step is not None:
                await self.progress(str(self._step))


Work = Callable[[Reply], Awaitable[str | Outcome | Shown]]


async def operate(interaction: discord.Interaction[Guildbook], command: str, work: Work, **arguments: Any) -> None:
    """Run an operator's command: defer, check who asks, show what `work` returns, and write it all down.

    `arguments` go into `ops.admin_actions`. A `GuildbookError` is shown as its one line; anything else as a line that
    points to the log. What takes longer than Discord takes answers for goes on, and is written down when it has ended.
    """
    bot = interaction.client
    reply = Reply(interaction, bot.confirmations)
    try:
        await interaction.response.defer(ephemeral=True, thinking=True)
    except (discord.DiscordException, OSError) as exc:  # Discord waits for 3 s: the operator sees that it failed
        _log.warning("/%s was not answered in time, and is not run: %r", command, exc)
        return
    running = asyncio.create_task(_run(bot, interaction.user.id, command, work, reply, arguments), name=f"/{command}")
    bot.operators.keep(running)
    follower = asyncio.create_task(reply.follow())
    done, _ = await asyncio.wait({running}, timeout=COMMAND_SECONDS)
    follower.cancel()
    if not done:
        minutes = f"{COMMAND_SECONDS / 60:g} minutes"
        await reply.show(
            f"Not finished within {minutes}: it goes on, and will stand in the log and in ops.admin_actions"
        )


async def _run(bot: Guildbook, user_id: int, command: str, work: Work, reply: Reply, arguments: dict[str, Any]) -> None:
    shown: Shown | None = None
    try:
        if await bot.operators.includes(user_id):
            async with asyncio.timeout(ACTION_SECONDS):
                shown = _shown(await work(reply))
            text = result = shown.text
        else:
            text, result = REFUSAL, "refused: no operator"
    except (GuildbookError, discord.DiscordException) as exc:
        text = result = redact(f"Failed: {exc}")
    except TimeoutError:
        text = result = f"Failed: not finished within {ACTION_SECONDS / 3600:g} hours"
    except Exception as exc:
        _log.exception("/%s failed", command)
        text = result = f"Failed: an unexpected {type(exc).__name__}; the log says more"
    _log.info("/%s of user %s: %s", command, user_id, result)
    try:
        await record_action(bot.db, command, arguments, result, user_id=user_id)
    except GuildbookError as exc:
        _log.error("/%s of user %s was not written down: %s (%s)", command, user_id, result, exc)
        text += "\n(This use could not be written down: the database does not take it.)"
    await reply.show(text, shown)


def _shown(result: str | Outcome | Shown) -> Shown:
    if isinstance(result, Shown):
        return result
    if isinstance(result, str):
        return Shown(result)
    name_and_text = result.file
    file = None if name_and_text is None else (name_and_text[0], name_and_text[1].encode())
    return Shown(redact(result.text), file=file)


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

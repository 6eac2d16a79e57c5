"""/cogs: list, load, unload and reload cogs while the bot runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import discord
from discord import app_commands

from utils.base_cog import BaseCog, Guildbook
from utils.bot.loader import CogState
from utils.bot.periodic import loops_of
from utils.bot.registrations import is_within
from utils.exceptions import GuildbookError
from utils.operations import slash
from utils.operations.slash import MESSAGE_LENGTH, Answer, Reply
from utils.text import format_count

#: The maximum number of choices (Discord API reference, "Application Command Option Choice").
MAX_CHOICES = 25
#: Seconds to find out whether the user is an operator. Discord expects the choices within 3 seconds.
OPERATOR_TIMEOUT = 2.0


class CogCommands(BaseCog):
    """Operator commands for the cogs."""

    cogs = app_commands.Group(name="cogs", description="Manage the cogs of this bot (operators only)")

    @cogs.command(name="list", description="List all cogs and their states")
    async def list_(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the state of every cog."""

        async def work(reply: Reply) -> Answer:
            states = self.bot.loader.states()
            notes = [self._loops(state) + _warnings(state) for state in states]
            lines = ["\n- ".join([_format(state), *found]) for state, found in zip(states, notes, strict=True)]
            whole = "\n".join(lines) or "There are no cogs."
            if len(whole) <= MESSAGE_LENGTH:
                return Answer(whole)
            brief = "\n".join(_format(state) + _count(state) for state in states)
            return Answer(brief, file=("cogs.txt", whole.encode()))

        await slash.operate(interaction, "cogs list", work)

    def _loops(self, state: CogState) -> list[str]:
        """Return a line about each loop of the cogs of a module."""
        cogs = [cog for cog in self.bot.cogs.values() if is_within(type(cog).__module__, state.module)]
        return [loop.describe() for cog in cogs for loop in loops_of(cog)]

    @cogs.command(name="load", description="Load a cog that is not loaded")
    @app_commands.describe(name="The short name: tally for cogs/tally.py")
    async def load(self, interaction: discord.Interaction[Guildbook], name: str) -> None:
        """Load a cog."""
        await self._run(interaction, "load", name, self.bot.loader.load)

    @cogs.command(name="unload", description="Unload a cog until the next start")
    @app_commands.describe(name="The short name: tally for cogs/tally.py")
    async def unload(self, interaction: discord.Interaction[Guildbook], name: str) -> None:
        """Unload a cog."""
        await self._run(interaction, "unload", name, self.bot.loader.unload)

    @cogs.command(name="reload", description="Load a cog's changed code; if that fails, keep the previous code")
    @app_commands.describe(name="The short name: tally for cogs/tally.py")
    async def reload(self, interaction: discord.Interaction[Guildbook], name: str) -> None:
        """Reload a cog."""
        await self._run(interaction, "reload", name, self.bot.loader.reload)

    @load.autocomplete("name")
    @unload.autocomplete("name")
    @reload.autocomplete("name")
    async def names(self, interaction: discord.Interaction[Guildbook], typed: str) -> list[app_commands.Choice[str]]:
        """Suggest the cogs that the subcommand applies to; nothing for users who are not operators."""
        try:
            async with asyncio.timeout(OPERATOR_TIMEOUT):
                if not await self.bot.operators.includes(interaction.user.id):
                    return []
        except (GuildbookError, TimeoutError):
            return []
        is_load = interaction.command is not None and interaction.command.name == "load"
        matching = [
            state.name
            for state in self.bot.loader.states()
            if (state.state == "loaded") != is_load and typed.strip().lower() in state.name
        ]
        return [app_commands.Choice(name=name, value=name) for name in matching[:MAX_CHOICES]]

    async def _run(
        self,
        interaction: discord.Interaction[Guildbook],
        verb: str,
        name: str,
        action: Callable[[str], Awaitable[CogState]],
    ) -> None:
        async def work(reply: Reply) -> str:
            state = await action(name.strip().removeprefix("cogs."))
            return "\n- ".join([_format(state), *_warnings(state)])

        await slash.operate(interaction, f"cogs {verb}", work, name=name)


def _format(state: CogState) -> str:
    """Return a cog's line."""
    seconds = "" if state.seconds is None or state.state != "loaded" else f" in {state.seconds:.2f} s"
    reason = "" if state.reason is None else f": {discord.utils.escape_markdown(state.reason)}"
    failure = " (the last reload failed)" if state.state == "loaded" and state.reason else ""
    pack = "" if state.pack is None else f" (pack {state.pack})"
    return f"**{state.name}**{pack} {state.state}{seconds}{failure}{reason}"


def _warnings(state: CogState) -> list[str]:
    """Return a line about each thing of a cog that cannot work."""
    return [f"warning: {discord.utils.escape_markdown(warning)}" for warning in state.warnings]


def _count(state: CogState) -> str:
    """Return how many warnings of a cog are in the attached file."""
    return f" ({format_count(len(state.warnings), 'warning')}, see the file)" if state.warnings else ""


async def setup(bot: Guildbook) -> None:
    """Add the cog for operators."""
    await slash.add_cog(bot, CogCommands(bot))

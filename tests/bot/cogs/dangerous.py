"""A command that asks before it does anything."""

from __future__ import annotations

import discord
from discord import app_commands

from utils.base_cog import BaseCog
from utils.bot.client import Guildbook
from utils.operations import slash
from utils.operations.slash import Reply


class Dangerous(BaseCog):
    """A command that asks first."""

    def __init__(self, bot: Guildbook) -> None:
        super().__init__(bot)
        self.done = 0

    @app_commands.command(name="danger", description="Do it")
    async def danger(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Ask, then do it."""

        async def work(reply: Reply) -> str:
            await reply.confirm("Sure?", "Do it")
            self.done += 1
            return "done"

        await slash.operate(interaction, "danger", work)


async def setup(bot: Guildbook) -> None:
    """Add the cog where operators are."""
    await slash.add_cog(bot, Dangerous(bot))

"""A cog whose command asks for confirmation."""

from __future__ import annotations

import discord
from discord import app_commands

from utils.base_cog import BaseCog, Guildbook
from utils.operations import slash
from utils.operations.slash import Reply


class Confirming(BaseCog):
    """Counts how often its command was confirmed."""

    def __init__(self, bot: Guildbook) -> None:
        super().__init__(bot)
        self.runs = 0

    @app_commands.command(name="danger", description="Ask, then run")
    async def danger(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Ask for confirmation, then count."""

        async def work(reply: Reply) -> str:
            await reply.confirm("Sure?", "Run")
            self.runs += 1
            return "done"

        await slash.operate(interaction, "danger", work)


async def setup(bot: Guildbook) -> None:
    """Add the cog for operators."""
    await slash.add_cog(bot, Confirming(bot))

"""A command that asks before it does anything."""

from __future__ import annotations

import discord
from discord import app_commands

from utils import operators
from utils.bot import Guildbook
from utils.cog import BaseCog
from utils.operators import Reply


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

        await operators.operate(interaction, "danger", work)


async def setup(bot: Guildbook) -> None:
    """Add the cog where operators are."""
    await operators.add_cog(bot, Dangerous(bot))

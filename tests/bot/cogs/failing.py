"""A cog whose `cog_load` raises."""

from __future__ import annotations

from discord.ext import commands

from utils.base_cog import Guildbook


class Failing(commands.Cog):
    """Cannot be added."""

    async def cog_load(self) -> None:
        """Raise."""
        raise RuntimeError("cog_load fails")


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Failing())

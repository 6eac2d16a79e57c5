"""A cog that fails when it is loaded."""

from __future__ import annotations

from discord.ext import commands

from utils.bot.client import Guildbook


class Failing(commands.Cog):
    """Fails."""

    async def cog_load(self) -> None:
        """Fail."""
        raise RuntimeError("this cog is broken at its loading")


async def setup(bot: Guildbook) -> None:
    """Add it."""
    await bot.add_cog(Failing())

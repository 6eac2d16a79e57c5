"""A cog with one command whose description a test may change."""

from __future__ import annotations

import os

import discord
from discord import app_commands
from discord.ext import commands

from utils.bot.client import Guildbook

#: Holds the command's description; the module is imported anew at each start, so it cannot be set on it.
VARIABLE = "GREETER_DESCRIPTION"


async def hello(interaction: discord.Interaction[Guildbook]) -> None:
    """Say hello."""
    await interaction.response.send_message("hello")


class Greeter(commands.Cog):
    """Says hello."""

    def __init__(self, bot: Guildbook) -> None:
        self.bot: Guildbook = bot

    async def cog_load(self) -> None:
        """Add the command as it is described just now."""
        description = os.environ.get(VARIABLE, "Say hello")
        command: app_commands.Command[Greeter, [], None]
        command = app_commands.Command(name="hello", description=description, callback=hello)
        self.bot.tree.add_command(command)


async def setup(bot: Guildbook) -> None:
    """Add it."""
    await bot.add_cog(Greeter(bot))

"""A cog whose command has a description that tests can change."""

from __future__ import annotations

import os

import discord
from discord import app_commands
from discord.ext import commands

from utils.base_cog import Guildbook

#: The environment variable with the description. Each load imports the module again, so tests cannot set an attribute.
VARIABLE = "GREETER_DESCRIPTION"


async def hello(interaction: discord.Interaction[Guildbook]) -> None:
    """Say hello."""
    await interaction.response.send_message("hello")


class Greeter(commands.Cog):
    """Says hello."""

    def __init__(self, bot: Guildbook) -> None:
        self.bot: Guildbook = bot

    async def cog_load(self) -> None:
        """Add the command with its current description."""
        description = os.environ.get(VARIABLE, "Say hello")
        command: app_commands.Command[Greeter, [], None]
        command = app_commands.Command(name="hello", description=description, callback=hello)
        self.bot.tree.add_command(command)


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Greeter(bot))

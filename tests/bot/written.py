"""Cogs that a test writes, in a package of its own, and changes while the bot runs."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import pytest

_numbers = itertools.count()

#: What every cog of the tests begins with.
HEAD = """
from __future__ import annotations
import asyncio
import discord
from discord import app_commands
from discord.ext import commands, tasks
from utils.bot.command_errors import Declined
from utils.bot.client import Guildbook
from utils.base_cog import BaseCog
"""
#: A cog with one command, `/NAME`, that answers TEXT.
PLAIN = """
class Plain(BaseCog, name="NAME"):
    @app_commands.command(name="NAME", description="Say something")
    async def say(self, interaction: discord.Interaction[Guildbook]) -> None:
        await interaction.response.send_message("TEXT")

    @commands.Cog.listener()
    async def on_something(self) -> None: ...

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Plain(bot))
"""


class WrittenCogs:
    """A package of cogs, to be handed to a bot as its extensions."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package = f"written{next(_numbers)}"
        self.directory = directory / self.package
        self.directory.mkdir()
        (self.directory / "__init__.py").touch()
        monkeypatch.syspath_prepend(directory)

    @property
    def extensions(self) -> list[str]:
        """The modules that were written so far."""
        return [self.module(path.stem) for path in sorted(self.directory.glob("[a-z]*.py"))]

    def module(self, name: str) -> str:
        """Return the module of a short name."""
        return f"{self.package}.{name}"

    def write(self, name: str, text: str, *, head: bool = True) -> None:
        """Write or change a cog."""
        (self.directory / f"{name}.py").write_text((HEAD if head else "") + textwrap.dedent(text))

    def plain(self, name: str, text: str) -> None:
        """Write or change a cog whose command `/NAME` answers a text."""
        self.write(name, PLAIN.replace("NAME", name).replace("TEXT", text))

"""Cogs that a test writes into a package of its own and changes while the bot runs."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path

import pytest

_numbers = itertools.count()

#: The imports of every temporary cog.
IMPORTS = """
from __future__ import annotations
import asyncio
import discord
from discord import app_commands
from discord.ext import commands, tasks
from utils.base_cog import BaseCog, Guildbook
from utils.exceptions import Declined
"""
#: A cog whose command `/NAME` answers TEXT.
ANSWERING = """
class Answering(BaseCog, name="NAME"):
    @app_commands.command(name="NAME", description="Say something")
    async def say(self, interaction: discord.Interaction[Guildbook]) -> None:
        await interaction.response.send_message("TEXT")

    @commands.Cog.listener()
    async def on_something(self) -> None: ...

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Answering(bot))
"""


class TemporaryCogs:
    """A package of cogs, whose modules a bot can load as extensions."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.package = f"temporary_cogs_{next(_numbers)}"
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

    def write(self, name: str, text: str, *, with_imports: bool = True) -> None:
        """Write or overwrite a cog."""
        (self.directory / f"{name}.py").write_text((IMPORTS if with_imports else "") + textwrap.dedent(text))

    def write_answering(self, name: str, text: str) -> None:
        """Write or overwrite a cog whose command `/name` answers `text`."""
        self.write(name, ANSWERING.replace("NAME", name).replace("TEXT", text))

"""A cog that saves numbers in every way that a cog can."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import discord
from discord import app_commands
from sqlalchemy import text

from utils.base_cog import BaseCog, Guildbook

INSERT = "INSERT INTO numbers VALUES ($1)"
#: Ways of `Saving.save`, each with the number that it saves.
WAYS = {"plain": 1, "many": 2, "copy": 3, "transaction": 4, "session": 5, "repeated": 6, "gathered": 7, "stubborn": 8}


class Saving(BaseCog):
    """Saves numbers."""

    @app_commands.command()
    async def save(self, interaction: discord.Interaction[Guildbook], way: str) -> None:
        await self.write(way, WAYS[way])
        await interaction.response.send_message("saved")

    @app_commands.command()
    async def spawn_later(self, interaction: discord.Interaction[Guildbook]) -> None:
        self.later = asyncio.create_task(self.save_later())
        await asyncio.Event().wait()

    async def save_later(self) -> None:
        await self.released.wait()
        await self.db.execute(INSERT, 9)

    async def cog_load(self) -> None:
        self.released = asyncio.Event()
        await super().cog_load()

    async def write(self, way: str, number: int) -> None:
        """Write a number."""
        match way:
            case "plain":
                await self.db.execute(INSERT, number)
            case "many":
                await self.db.execute_many(INSERT, [(number,)])
            case "copy":
                await self.db.copy_records_to_table("numbers", records=[(number,)], columns=["number"])
            case "transaction":
                async with self.db.transaction():
                    await self.db.execute(INSERT, number)
            case "session":
                async with self.session() as session:
                    await session.execute(text("INSERT INTO numbers VALUES (:number)"), {"number": number})
            case "repeated":
                await self.db.run(lambda: self.write("plain", number))
            case "gathered":
                await asyncio.gather(self.write("plain", number), self.write("transaction", number))
            case "stubborn":
                try:
                    await self.write("plain", number)
                finally:  # also after the command was given up
                    with contextlib.suppress(Exception):
                        await self.write("plain", number)


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    cog: Any = Saving(bot)
    await bot.add_cog(cog)

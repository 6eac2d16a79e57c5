"""/tally: members count and give points to each other. A table of the cog's own, and transactions."""

from __future__ import annotations

import discord
from discord import app_commands
from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake
from utils.base_cog import BaseCog, Guildbook
from utils.exceptions import Declined


class Tally(Base):
    """The points of a member."""

    __tablename__ = "tallies"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    #: `erase` says what happens to a column when a user's data is erased.
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    points: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")


ADD = """
INSERT INTO tallies AS tally (guild_id, user_id, points) VALUES ($1, $2, $3)
ON CONFLICT (guild_id, user_id) DO UPDATE SET points = tally.points + excluded.points
RETURNING points
"""
#: In the order of the keys: members who give to each other at the same moment wait in turn, not for each other.
LOCK = """
SELECT FROM tallies WHERE guild_id = $1 AND user_id = ANY($2) ORDER BY user_id FOR UPDATE
"""
TAKE = """
UPDATE tallies SET points = points - $3 WHERE guild_id = $1 AND user_id = $2 AND points >= $3
RETURNING points
"""


class TallyCommands(BaseCog):
    """Counts points."""

    tally = app_commands.Group(name="tally", description="Points", guild_only=True)

    @tally.command(name="add", description="Add a point to your tally")
    async def add(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Add a point. A single statement needs no transaction."""
        points = await self.db.fetchval(ADD, interaction.guild_id, interaction.user.id, 1)
        await interaction.response.send_message(f"You have {points:,} points.", ephemeral=True)

    @tally.command(name="give", description="Give points to another member")
    async def give(
        self,
        interaction: discord.Interaction[Guildbook],
        member: discord.Member,
        points: app_commands.Range[int, 1, 1000],
    ) -> None:
        """Move points. The statements commit together, and `Declined` rolls all of them back."""
        guild_id, giver = interaction.guild_id, interaction.user.id
        if member.id == giver:
            raise Declined("You cannot give points to yourself.")

        async def move() -> int:
            await self.db.execute(LOCK, guild_id, [giver, member.id])
            left = await self.db.fetchval(TAKE, guild_id, giver, points, as_=int)
            if left is None:
                raise Declined(f"You do not have {points:,} points.")
            await self.db.fetchval(ADD, guild_id, member.id, points)
            return left

        left = await self.db.run(move)
        await interaction.response.send_message(f"{member.mention} got {points:,} points. You have {left:,} left.")


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(TallyCommands(bot))

"""/leaderboard: who writes most. Repositories, the cog's cache, and SQL on the mirrored tables."""

from __future__ import annotations

import discord
from discord import app_commands

from models import User
from utils.base_cog import BaseCog, Guildbook
from utils.exceptions import Declined
from utils.repositories import MemberStatsRepository

RANK = """
SELECT message_count, 1 + (
    SELECT count(*) FROM member_stats AS other JOIN members USING (guild_id, user_id)
    WHERE guild_id = $1 AND left_at IS NULL AND other.message_count > stats.message_count
) AS rank
FROM member_stats AS stats WHERE guild_id = $1 AND user_id = $2
"""


class Leaderboard(BaseCog):
    """Shows how many messages members have written."""

    leaderboard = app_commands.Group(name="leaderboard", description="Who writes most", guild_only=True)

    @leaderboard.command(name="top", description="Show the five members with the most messages")
    async def top(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the top five. The list is cached for five minutes, and concurrent requests share one query."""
        guild_id = interaction.guild_id
        assert guild_id is not None, "guild_only"

        async def load() -> str:
            stats = await MemberStatsRepository(self.bot.get_db_session).top(guild_id, by="message_count", limit=5)
            users = await self.users.list(User.id.in_([row.user_id for row in stats]))
            names = {user.id: user.username for user in users.items}
            lines = [f"{row.message_count:,} {names.get(row.user_id, row.user_id)}" for row in stats]
            return discord.utils.escape_markdown("\n".join(lines))

        text = await self.cache.get_or_load(guild_id, load)
        await interaction.response.send_message(text or "Nobody has written a message yet.")

    @leaderboard.command(name="rank", description="Show your place")
    async def rank(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the user's own place. `bot.db` caches the result until one of the tables changes."""
        row = await self.db.fetchrow(RANK, interaction.guild_id, interaction.user.id)
        if row is None:
            raise Declined("You have not written a message yet.")
        await interaction.response.send_message(
            f"You are number {row['rank']:,} with {row['message_count']:,} messages.", ephemeral=True
        )


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Leaderboard(bot))

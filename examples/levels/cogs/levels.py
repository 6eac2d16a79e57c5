"""Experience for messages and stars, levels with roles as rewards, and text commands: !rank, !top, !prefix, !reward."""

from __future__ import annotations

from math import isqrt
from typing import Any

import discord
from discord.ext import commands
from pydantic import BaseModel, Field

from utils.base_cog import BaseCog, Guildbook
from utils.exceptions import DatabaseUnavailable, Declined

from ..models import Score

Context = commands.Context[Guildbook]

#: Experience for a message, by its length, and for a star that another member gives to it.
MESSAGE_XP, LONGEST_XP, STAR_XP = 5, 25, 10
#: Seconds in which further messages of a member give nothing.
COOLDOWN = 60.0
STAR = "⭐"

_SCORE = "SELECT xp, messages, stars FROM levels_scores WHERE guild_id = $1 AND user_id = $2"
_RANK = "SELECT count(*) + 1 FROM levels_scores WHERE guild_id = $1 AND xp > $2"
_TOP = "SELECT user_id, xp FROM levels_scores WHERE guild_id = $1 ORDER BY xp DESC, user_id LIMIT 10"


class LevelSettings(BaseModel):
    """The settings of a guild."""

    prefix: str = Field(default="!", min_length=1, max_length=5)
    #: Roles by the level that gives them.
    rewards: dict[int, int] = Field(default_factory=dict, max_length=50)


def level_of(xp: int) -> int:
    """Return the level: 50 experience for the first, 200 for the second, 450 for the third."""
    return isqrt(xp // 50)


class Levels(BaseCog):
    """Counts experience."""

    intents = discord.Intents(guild_messages=True, message_content=True, guild_reactions=True)

    def __init__(self, bot: Guildbook) -> None:
        super().__init__(bot)
        self.config = self.documents("levels", LevelSettings)

    async def start(self) -> None:
        """Write experience in batches: a busy guild then costs one statement a second, and no message waits for it."""
        self.scores = self.batch(Score, size=500, seconds=1, increments=("xp", "messages", "stars"))

    async def command_prefix(self, message: discord.Message) -> str | None:
        """Return the prefix that the guild has chosen."""
        if message.guild is None:
            return None
        return (await self.config.guild(message.guild.id).get("settings")).prefix

    @commands.Cog.listener()
    async def on_message(self, message: discord.Message) -> None:
        """Give experience for a message, but not to bots, and not again within a minute."""
        author, guild = message.author, message.guild
        if guild is None or author.bot or message.webhook_id is not None:
            return
        rested = ("rested", guild.id, author.id)
        xp = 0 if self.cache.get(rested) else min(MESSAGE_XP + len(message.content) // 20, LONGEST_XP)
        if xp:
            self.cache.set(rested, True, ttl=COOLDOWN)
        await self._give(guild, author.id, xp=xp, messages=1)

    @commands.Cog.listener()
    async def on_raw_reaction_add(self, payload: discord.RawReactionActionEvent) -> None:
        """Give experience to the author of a message that somebody else has starred."""
        guild = self.bot.get_guild(payload.guild_id or 0)
        author = payload.message_author_id
        if guild is not None and author not in (None, payload.user_id) and str(payload.emoji) == STAR:
            await self._give(guild, author, xp=STAR_XP, stars=1)

    @commands.command()
    @commands.guild_only()
    async def rank(self, ctx: Context, member: discord.Member | None = None) -> None:
        """Show level, experience and rank."""
        assert ctx.guild is not None, "guild_only"
        user = member or ctx.author
        await self.scores.flush()
        row = await self.db.fetchrow(_SCORE, ctx.guild.id, user.id)
        if row is None:
            raise Declined(f"{user.mention} has no experience yet.")
        place = await self.db.fetchval(_RANK, ctx.guild.id, row["xp"])
        await ctx.send(
            f"{user.mention} is on level {level_of(row['xp'])} with {row['xp']:,} experience, place {place:,}:"
            f" {row['messages']:,} messages, {row['stars']:,} stars."
        )

    @commands.command()
    @commands.guild_only()
    async def top(self, ctx: Context) -> None:
        """Show the ten members with the most experience."""
        assert ctx.guild is not None, "guild_only"
        rows = await self.db.fetch(_TOP, ctx.guild.id)
        lines = [f"{place}. <@{row['user_id']}>: level {level_of(row['xp'])}" for place, row in enumerate(rows, 1)]
        await ctx.send("\n".join(lines) or "Nobody has experience yet.")

    @commands.command()
    @commands.guild_only()
    @commands.has_permissions(manage_guild=True)
    async def prefix(self, ctx: Context, prefix: str) -> None:
        """Choose the prefix of text commands."""
        await self._change(ctx, prefix=prefix)
        await ctx.send(f"Text commands now begin with {prefix}")

    @commands.command()
    @commands.guild_only()
    @commands.has_permissions(manage_guild=True)
    async def reward(self, ctx: Context, level: int, role: discord.Role) -> None:
        """Give a role to members who reach a level."""
        assert ctx.guild is not None, "guild_only"
        known = (await self.config.guild(ctx.guild.id).get("settings")).rewards
        await self._change(ctx, rewards=known | {level: role.id})
        await ctx.send(f"Level {level} gives the role {role.name}.")

    async def _change(self, ctx: Context, **fields: Any) -> None:
        assert ctx.guild is not None, "guild_only"

        def change(settings: LevelSettings) -> LevelSettings:
            return LevelSettings.model_validate(settings.model_dump() | fields)

        await self.config.guild(ctx.guild.id).update("settings", change)

    async def _give(self, guild: discord.Guild, user_id: int | None, **amounts: int) -> None:
        """Add to a member's score, and give the reward of a level that is reached by it."""
        assert user_id is not None

        async def load() -> int:
            return int(await self.db.fetchval(_SCORE, guild.id, user_id, use_cache=False) or 0)

        key = (guild.id, user_id)
        try:
            loaded: int | None = await self.cache.get_or_load(key, load)
        except DatabaseUnavailable:
            loaded = None  # the batch keeps what is added during an outage; a level is noticed later
        self.scores.add({"guild_id": guild.id, "user_id": user_id, **amounts})
        if loaded is None:
            return
        before: int = self.cache.get(key) or loaded  # another message may have come first while this one waited
        after = before + amounts.get("xp", 0)
        self.cache.set(key, after)
        if level_of(after) == level_of(before):
            return
        self.log.info("user %s reached level %s in guild %s", user_id, level_of(after), guild.id)
        role_id = (await self.config.guild(guild.id).get("settings")).rewards.get(level_of(after))
        member = None if role_id is None else await self.members.as_discord(guild, user_id)
        if role_id is not None and member is not None:
            await member.add_roles(discord.Object(role_id), reason=f"level {level_of(after)}")


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Levels(bot))

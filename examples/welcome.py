"""/welcome: greets new members in a channel. Settings without a table, and events of the mirror."""

from __future__ import annotations

import discord
from discord import app_commands
from discord.ext import commands
from pydantic import BaseModel

from utils.base_cog import BaseCog, Guildbook, MirrorChange


class WelcomeSettings(BaseModel):
    """The settings of one guild."""

    #: None while greetings are off.
    channel_id: int | None = None
    text: str = "Welcome, {member}!"


class Welcome(BaseCog):
    """Greets new members."""

    def __init__(self, bot: Guildbook) -> None:
        super().__init__(bot)
        self.settings = self.documents("welcome", WelcomeSettings)

    @app_commands.command(description="Greet new members in a channel; without a channel, stop greeting")
    @app_commands.describe(channel="Where to greet", text="The greeting; {member} becomes a mention")
    @app_commands.guild_only()
    @app_commands.default_permissions(manage_guild=True)
    async def welcome(
        self,
        interaction: discord.Interaction[Guildbook],
        channel: discord.TextChannel | None = None,
        text: app_commands.Range[str, 1, 500] = "Welcome, {member}!",
    ) -> None:
        """Store the guild's settings."""
        assert interaction.guild_id is not None, "guild_only"
        new = WelcomeSettings(channel_id=None if channel is None else channel.id, text=text)
        await self.settings.guild(interaction.guild_id).set("settings", new)
        answer = "Greetings are off." if channel is None else f"New members are greeted in {channel.mention}."
        await interaction.response.send_message(answer, ephemeral=True)

    @commands.Cog.listener()
    async def on_mirror_change(self, change: MirrorChange) -> None:
        """Greet a member who joined. An `inferred` join happened while the bot was offline: too late to greet."""
        if change.action != "join" or change.inferred or change.guild_id is None:
            return
        settings = await self.settings.guild(change.guild_id).get("settings")
        channel = None if settings.channel_id is None else self.bot.get_channel(settings.channel_id)
        if not isinstance(channel, discord.TextChannel):
            return
        try:
            await channel.send(
                settings.text.replace("{member}", f"<@{change.user_id}>"),
                allowed_mentions=discord.AllowedMentions(users=True),
            )
        except discord.HTTPException as exc:
            self.log.warning("could not greet in channel %s: %s", channel.id, exc)


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Welcome(bot))

"""/warn, /timeout, /ban, /case and /cases: numbered cases without gaps, and bans that end by themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import discord
from discord import app_commands

from utils.base_cog import BaseCog, Guildbook
from utils.exceptions import Declined

Interaction = discord.Interaction[Guildbook]
Reason = app_commands.Range[str, 1, 400]
Minutes = app_commands.Range[int, 1, 40_320]
Days = app_commands.Range[int, 1, 3650]
Length = timedelta | None
Act = Callable[[], Awaitable[object]] | None
Person = discord.User | discord.Member

# One statement takes the number and writes the case, so a failure leaves no gap.
_OPEN = """
WITH taken AS (
    INSERT INTO moderation_last_cases AS last (guild_id, number) VALUES ($1, 1)
    ON CONFLICT (guild_id) DO UPDATE SET number = last.number + 1
    RETURNING number
)
INSERT INTO moderation_cases (guild_id, number, user_id, moderator_id, action, reason, expires_at)
SELECT $1, number, $2, $3, $4, $5, now() + $6::interval FROM taken
RETURNING number
"""
_CLOSE = "UPDATE moderation_cases SET state = $3 WHERE guild_id = $1 AND number = $2"
_DUE = """
SELECT guild_id, number, user_id FROM moderation_cases
WHERE action = 'ban' AND state = 'done' AND expires_at <= now() ORDER BY expires_at LIMIT 100
"""
_ONE = "SELECT * FROM moderation_cases WHERE guild_id = $1 AND number = $2"
_OF_MEMBER = "SELECT * FROM moderation_cases WHERE guild_id = $1 AND user_id = $2 ORDER BY number DESC LIMIT 20"
_REASON = "UPDATE moderation_cases SET reason = $3 WHERE guild_id = $1 AND number = $2 RETURNING number"


class ReasonForm(discord.ui.Modal, title="Change the reason"):
    """Asks for a new reason of a case."""

    reason: discord.ui.TextInput[ReasonForm] = discord.ui.TextInput(label="Reason", max_length=400)

    def __init__(self, cog: Moderation, number: int) -> None:
        super().__init__()
        self.cog, self.number = cog, number

    async def on_submit(self, interaction: discord.Interaction[Any]) -> None:
        """Store the reason."""
        changed = await self.cog.db.fetchval(_REASON, interaction.guild_id, self.number, self.reason.value)
        if changed is None:
            raise Declined(f"There is no case {self.number} any more.")
        await interaction.response.send_message(f"Changed the reason of case {self.number}.", ephemeral=True)


class Moderation(BaseCog):
    """Warnings, timeouts and bans."""

    async def start(self) -> None:
        """Lift expired bans twice a minute. After an outage or a restart this goes on, with all that came due."""
        self.every(30, self.lift_expired_bans, key="moderation: expired bans")

    @app_commands.command(description="Warn a member")
    @app_commands.guild_only()
    @app_commands.default_permissions(moderate_members=True)
    async def warn(self, interaction: Interaction, member: discord.Member, reason: Reason) -> None:
        """Write a case."""
        await self._act(interaction, "warn", member, reason, None)

    @app_commands.command(description="Silence a member for some minutes")
    @app_commands.guild_only()
    @app_commands.default_permissions(moderate_members=True)
    async def timeout(self, interaction: Interaction, member: discord.Member, minutes: Minutes, reason: Reason) -> None:
        """Time the member out. Discord ends timeouts by itself."""
        length = timedelta(minutes=minutes)
        await self._act(interaction, "timeout", member, reason, length, lambda: member.timeout(length, reason=reason))

    @app_commands.command(description="Ban a user, for some days or for good")
    @app_commands.guild_only()
    @app_commands.default_permissions(ban_members=True)
    async def ban(self, interaction: Interaction, user: discord.User, reason: Reason, days: Days | None = None) -> None:
        """Ban the user. `lift_expired_bans` ends the ban."""
        guild = interaction.guild
        assert guild is not None, "guild_only"
        length = None if days is None else timedelta(days=days)
        await self._act(interaction, "ban", user, reason, length, lambda: guild.ban(user, reason=reason))

    @app_commands.command(description="Show a case, and change its reason")
    @app_commands.guild_only()
    @app_commands.default_permissions(moderate_members=True)
    async def case(self, interaction: Interaction, number: app_commands.Range[int, 1]) -> None:
        """Show a case with a button that opens a form."""
        row = await self.db.fetchrow(_ONE, interaction.guild_id, number)
        if row is None:
            raise Declined(f"There is no case {number:,}.")
        view, button = discord.ui.View(timeout=300), discord.ui.Button[discord.ui.View](label="Change the reason")

        async def ask(pressed: discord.Interaction[Any]) -> None:
            await pressed.response.send_modal(ReasonForm(self, number))

        button.callback = ask  # type: ignore[assignment, method-assign]
        view.add_item(button)
        await interaction.response.send_message(_describe(row), view=view, ephemeral=True)

    @app_commands.command(description="Show the cases of a user")
    @app_commands.guild_only()
    @app_commands.default_permissions(moderate_members=True)
    async def cases(self, interaction: Interaction, user: discord.User) -> None:
        """Show the latest cases of somebody, also after they have left."""
        rows = await self.db.fetch(_OF_MEMBER, interaction.guild_id, user.id)
        if not rows:
            raise Declined(f"There are no cases about {user.mention}.")
        await interaction.response.send_message("\n".join(map(_describe, rows))[:2000], ephemeral=True)

    async def _act(
        self, interaction: Interaction, action: str, user: Person, reason: str, length: Length, act: Act = None
    ) -> None:
        """Open a case, do what it is about, and close it. It stays `failed` if Discord refuses."""
        assert interaction.guild is not None, "guild_only"
        if user.id in (interaction.user.id, interaction.guild.owner_id, self.bot.application_id):
            raise Declined("You cannot do that to yourself, the owner of the server or me.")
        await interaction.response.defer(ephemeral=True)
        guild_id, moderator = interaction.guild.id, interaction.user.id
        number = await self.db.fetchval(_OPEN, guild_id, user.id, moderator, action, reason, length)
        try:
            if act is not None:
                await act()
        except discord.HTTPException as exc:
            await self.db.execute(_CLOSE, guild_id, number, "failed")
            raise Declined(f"Case {number:,} failed, because Discord refused: {exc.text or exc.status}.") from exc
        await self.db.execute(_CLOSE, guild_id, number, "done")
        await interaction.followup.send(f"Case {number:,}: {action} {user.mention}.", ephemeral=True)

    async def lift_expired_bans(self) -> None:
        """Lift bans whose time has passed. One that was lifted by hand counts as lifted."""
        for row in await self.db.fetch(_DUE, use_cache=False):
            guild = self.bot.get_guild(row["guild_id"])
            if guild is None:
                continue  # an outage, or the bot was removed: next time
            try:
                await guild.unban(discord.Object(row["user_id"]), reason=f"case {row['number']} has expired")
            except discord.NotFound:
                pass
            except discord.HTTPException as exc:
                self.log.warning("could not lift the ban of case %s: %s", row["number"], exc)
                continue
            await self.db.execute(_CLOSE, row["guild_id"], row["number"], "expired")


def _describe(row: Any) -> str:
    until = "" if row["expires_at"] is None else f" until {discord.utils.format_dt(row['expires_at'])}"
    return f"{row['number']:,}. {row['action']} <@{row['user_id']}>{until} ({row['state']}): {row['reason']}"


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Moderation(bot))

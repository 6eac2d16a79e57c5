"""/balance, /daily, /pay, /richest and /shop: coins that members earn, give and spend."""

from __future__ import annotations

import discord
from discord import app_commands
from pydantic import BaseModel, Field

from utils.base_cog import BaseCog, Guildbook
from utils.exceptions import Declined

from ..settings import Settings

Interaction = discord.Interaction[Guildbook]

_OPEN = """
INSERT INTO economy_accounts (guild_id, user_id)
SELECT $1, user_id FROM unnest($2::bigint[]) AS user_id ORDER BY user_id
ON CONFLICT DO NOTHING
"""
# In the order of the key: two members who pay each other at once then wait in line instead of for each other.
_LOCK = """
SELECT user_id, coins FROM economy_accounts WHERE guild_id = $1 AND user_id = ANY ($2::bigint[])
ORDER BY user_id FOR UPDATE
"""
_ADD = "UPDATE economy_accounts SET coins = coins + $3 WHERE guild_id = $1 AND user_id = $2 RETURNING coins"
_DAILY = """
INSERT INTO economy_accounts AS account (guild_id, user_id, coins, daily_at) VALUES ($1, $2, $3, now())
ON CONFLICT (guild_id, user_id) DO UPDATE SET coins = account.coins + excluded.coins, daily_at = now()
WHERE account.daily_at IS NULL OR account.daily_at <= now() - interval '20 hours'
RETURNING coins
"""
_NEXT_DAILY = "SELECT daily_at + interval '20 hours' FROM economy_accounts WHERE guild_id = $1 AND user_id = $2"
_BUY = """
INSERT INTO economy_purchases AS purchase (guild_id, user_id, item) VALUES ($1, $2, $3)
ON CONFLICT (guild_id, user_id, item) DO UPDATE SET quantity = purchase.quantity + 1
RETURNING quantity
"""
_RICHEST = """
SELECT user_id, coins FROM economy_accounts WHERE guild_id = $1 AND coins > 0 ORDER BY coins DESC, user_id LIMIT 10
"""


class Shop(BaseModel):
    """What a guild's shop sells: prices by item."""

    prices: dict[str, int] = Field(default_factory=dict, max_length=25)


class Economy(BaseCog):
    """Coins of the members of each guild."""

    settings: Settings
    shop = app_commands.Group(name="shop", description="What coins can buy", guild_only=True)

    def __init__(self, bot: Guildbook) -> None:
        super().__init__(bot)
        self.shops = self.documents("economy", Shop)

    @app_commands.command(description="Show your coins, or another member's")
    @app_commands.guild_only()
    async def balance(self, interaction: Interaction, member: discord.Member | None = None) -> None:
        """Show the coins of a member."""
        user = member or interaction.user
        query = "SELECT coins FROM economy_accounts WHERE guild_id = $1 AND user_id = $2"
        coins = await self.db.fetchval(query, interaction.guild_id, user.id)
        await interaction.response.send_message(f"{user.mention} has {coins or 0:,} coins.", ephemeral=True)

    @app_commands.command(description="Take your daily coins")
    @app_commands.guild_only()
    async def daily(self, interaction: Interaction) -> None:
        """Give the daily coins, once in 20 hours. One statement checks and gives, so nobody gets them twice."""
        coins = await self.db.fetchval(_DAILY, interaction.guild_id, interaction.user.id, self.settings.daily)
        if coins is None:
            at = await self.db.fetchval(_NEXT_DAILY, interaction.guild_id, interaction.user.id, use_cache=False)
            raise Declined(f"You have taken today's coins. The next are there {discord.utils.format_dt(at, 'R')}.")
        await interaction.response.send_message(f"You got {self.settings.daily:,} coins and have {coins:,}.")

    @app_commands.command(description="Give coins to another member")
    @app_commands.guild_only()
    async def pay(
        self, interaction: Interaction, member: discord.Member, coins: app_commands.Range[int, 1, 1_000_000]
    ) -> None:
        """Move coins. `db.run` repeats the transaction if PostgreSQL resolves a deadlock at its expense."""
        payer, guild_id = interaction.user.id, interaction.guild_id
        if member.id == payer:
            raise Declined("You cannot pay yourself.")

        async def move() -> int:
            await self.db.execute(_OPEN, guild_id, [payer, member.id])
            held = {row["user_id"]: row["coins"] for row in await self.db.fetch(_LOCK, guild_id, [payer, member.id])}
            if held[payer] < coins:
                raise Declined(f"You have {held[payer]:,} coins, not {coins:,}.")
            await self.db.fetchval(_ADD, guild_id, member.id, coins)
            return int(await self.db.fetchval(_ADD, guild_id, payer, -coins))

        left = await self.db.run(move)
        await interaction.response.send_message(f"{member.mention} got {coins:,} coins. You have {left:,} left.")

    @app_commands.command(description="Show who has the most coins")
    @app_commands.guild_only()
    async def richest(self, interaction: Interaction) -> None:
        """Show the ten richest members."""
        rows = await self.db.fetch(_RICHEST, interaction.guild_id)
        if not rows:
            raise Declined("Nobody has coins yet. Use /daily first.")
        lines = [f"{place}. <@{row['user_id']}>: {row['coins']:,}" for place, row in enumerate(rows, 1)]
        await interaction.response.send_message("\n".join(lines))

    @shop.command(name="sell", description="Set the price of an item; 0 removes it")
    @app_commands.checks.has_permissions(manage_guild=True)
    async def sell(
        self,
        interaction: Interaction,
        item: app_commands.Range[str, 1, 50],
        price: app_commands.Range[int, 0, 1_000_000],
    ) -> None:
        """Change the shop of the guild. `update` tries again if somebody else changes it at the same time."""
        assert interaction.guild_id is not None, "guild_only"

        def change(shop: Shop) -> Shop:
            others = {name: value for name, value in shop.prices.items() if name != item}
            return Shop(prices=others | ({item: price} if price else {}))

        await self.shops.guild(interaction.guild_id).update("shop", change)
        answer = f"{item} costs {price:,} coins." if price else f"{item} is no longer sold."
        await interaction.response.send_message(answer, ephemeral=True)

    @shop.command(name="buy", description="Buy an item")
    async def buy(self, interaction: Interaction, item: str) -> None:
        """Pay and get the item: both or neither."""
        assert interaction.guild_id is not None, "guild_only"
        guild_id, user_id = interaction.guild_id, interaction.user.id
        price = (await self.shops.guild(guild_id).get("shop")).prices.get(item)
        if price is None:
            raise Declined(f"The shop does not sell {item[:50]!r}.")

        async def purchase() -> int:
            account = await self.db.fetchrow(_LOCK, guild_id, [user_id])
            coins = 0 if account is None else account["coins"]
            if coins < price:
                raise Declined(f"{item} costs {price:,} coins, and you have {coins:,}.")
            await self.db.fetchval(_ADD, guild_id, user_id, -price)
            return int(await self.db.fetchval(_BUY, guild_id, user_id, item))

        quantity = await self.db.run(purchase)
        await interaction.response.send_message(f"You own {quantity:,} of {item}.", ephemeral=True)

    @buy.autocomplete("item")
    async def complete_item(self, interaction: Interaction, typed: str) -> list[app_commands.Choice[str]]:
        """Suggest items whose names contain what was typed."""
        assert interaction.guild_id is not None, "guild_only"
        prices = (await self.shops.guild(interaction.guild_id).get("shop")).prices
        found = sorted(name for name in prices if typed.casefold() in name.casefold())
        return [app_commands.Choice(name=f"{name} ({prices[name]:,})", value=name) for name in found]


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(Economy(bot))

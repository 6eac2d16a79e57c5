"""Coins are earned, given and spent, and none appears or disappears."""

from __future__ import annotations

import asyncio
import random

import pytest

from testing import RunningBot

_ALL = "SELECT sum(coins)::bigint FROM economy_accounts WHERE guild_id = $1"


async def test_daily_coins_come_once(bot: RunningBot) -> None:
    anna = bot.people[0]
    assert await anna.slash("daily") == "You got 100 coins and have 100."
    replies = await asyncio.gather(*(anna.slash("daily") for _ in range(5)))
    assert all("The next are there <t:" in reply for reply in replies)
    assert await anna.slash("balance") == f"{anna.mention} has 100 coins."


async def test_200_transfers_at_once_conserve_coins(bot: RunningBot, monkeypatch: pytest.MonkeyPatch) -> None:
    await bot.new_guild(members=16)
    people = bot.people[:10]
    assert len(people) == 10
    await asyncio.gather(*(person.slash("daily") for person in people))
    # Discord's three seconds, on a machine that may have other things to do beside 200 commands.
    monkeypatch.setattr(bot.simulator.interactions, "response_deadline", 15.0)
    draw = random.Random(7)
    pairs = [draw.sample(people, 2) for _ in range(200)]
    replies = await asyncio.gather(
        *(payer.slash("pay", member=payee, coins=draw.randint(1, 60)) for payer, payee in pairs)
    )
    # A member too many is told so instead of being left without an answer.
    assert all(reply.text for reply in replies), replies
    assert any("You have" in reply for reply in replies)
    assert await bot.fetchval(_ALL, bot.guild_id) == 1000
    assert await bot.fetchval("SELECT min(coins) >= 0 FROM economy_accounts")


async def test_refuses_payments_that_make_no_sense(bot: RunningBot) -> None:
    anna, ben = bot.people[:2]
    assert await anna.slash("pay", member=anna, coins=1) == "You cannot pay yourself."
    assert await anna.slash("pay", member=ben, coins=5) == "You have 0 coins, not 5."
    assert await anna.slash("richest") == "Nobody has coins yet. Use /daily first."


async def test_shop_takes_the_price_and_gives_the_item(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    assert await owner.slash("shop sell", item="hat", price=60) == "hat costs 60 coins."
    await ben.slash("daily")
    assert await ben.complete("shop buy", "item", "HA") == ["hat (60)"]
    assert await ben.slash("shop buy", item="hat") == "You own 1 of hat."
    assert await ben.slash("shop buy", item="hat") == "hat costs 60 coins, and you have 40."
    assert await ben.slash("shop buy", item="car") == "The shop does not sell 'car'."
    assert await owner.slash("shop sell", item="hat", price=0) == "hat is no longer sold."
    assert await bot.fetchval("SELECT quantity FROM economy_purchases WHERE user_id = $1", ben.id) == 1


async def test_only_managers_change_the_shop(bot: RunningBot) -> None:
    ben = bot.people[1]
    bot.world.update_member(bot.guild_id, ben.id, roles=[])
    answer = await ben.slash("shop sell", item="hat", price=1)
    assert answer.text.startswith("You need the permission Manage Guild")

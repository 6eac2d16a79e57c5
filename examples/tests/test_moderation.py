"""Cases have numbers without gaps, and bans end."""

from __future__ import annotations

import asyncio

import pytest

from simulator.entities import Permission
from testing import RunningBot

_CASES = "SELECT number, action, state, reason FROM moderation_cases ORDER BY number"


@pytest.fixture(autouse=True)
def permitted(bot: RunningBot) -> None:
    """Let the bot ban and time out."""
    granted = bot.world.guild(bot.guild_id).granted()
    bot.world.grant(bot.guild_id, granted | Permission.BAN_MEMBERS | Permission.MODERATE_MEMBERS)


async def test_numbers_have_no_gaps(bot: RunningBot) -> None:
    owner, *others = bot.people
    replies = await asyncio.gather(
        *(owner.slash("warn", member=others[n % len(others)], reason=f"reason {n}") for n in range(30))
    )
    assert all(reply.text.startswith("Case ") for reply in replies), replies
    assert [row["number"] for row in await bot.fetch(_CASES)] == list(range(1, 31))


async def test_a_ban_ends_by_itself(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    assert await owner.slash("ban", user=ben, reason="spam", days=3) == f"Case 1: ban {ben.mention}."
    assert ben.id in bot.world.guild(bot.guild_id).bans
    await bot.pool.execute("UPDATE moderation_cases SET expires_at = now()")
    await bot.clock.advance(31)
    await bot.until("SELECT state = 'expired' FROM moderation_cases")
    assert ben.id not in bot.world.guild(bot.guild_id).bans


async def test_a_refusal_by_discord_is_told_and_kept(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    bot.simulator.faults.rest_fail(f"/bans/{ben.id}", status=403)
    assert "Case 1 failed, because Discord refused" in await owner.slash("ban", user=ben, reason="spam")
    assert await owner.slash("warn", member=ben, reason="spam") == f"Case 2: warn {ben.mention}."
    assert [row["state"] for row in await bot.fetch(_CASES)] == ["failed", "done"]


async def test_reasons_are_changed_in_a_form(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    await owner.slash("timeout", member=ben, minutes=10, reason="loud")
    assert bot.world.member(bot.guild_id, ben.id).timed_out_until is not None
    shown = await owner.slash("case", number=1)
    assert shown.text.startswith(f"1. timeout {ben.mention} until <t:")
    form = await shown.press("Change the reason")
    assert form.form == "Change the reason"
    assert await form.fill(Reason="very loud") == "Changed the reason of case 1."
    assert (await owner.slash("cases", user=ben)).text.endswith("(done): very loud")


async def test_nobody_moderates_the_owner(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    assert "You cannot do that" in await ben.slash("warn", member=owner, reason="because")
    assert await bot.fetch(_CASES) == []

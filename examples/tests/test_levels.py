"""Messages and stars give experience, and text commands show it."""

from __future__ import annotations

from testing import RunningBot

_SCORE = "SELECT xp, messages, stars FROM levels_scores WHERE guild_id = $1 AND user_id = $2"


async def score(bot: RunningBot, user_id: int) -> tuple[int, ...]:
    rows = await bot.fetch(_SCORE, bot.guild_id, user_id)
    return tuple(rows[0]) if rows else ()


async def test_messages_and_stars_give_experience(bot: RunningBot) -> None:
    anna, ben = bot.people[:2]
    first = await anna.say("x" * 100)
    await anna.say("again")
    await ben.react(first, "⭐")
    await anna.react(first, "⭐")
    await bot.until("SELECT stars = 1 AND messages = 2 FROM levels_scores WHERE user_id = $1", anna.id)
    assert await score(bot, anna.id) == (10 + 10, 2, 1)
    assert await score(bot, ben.id) == ()


async def test_rank_and_top_answer_as_text(bot: RunningBot) -> None:
    anna, ben = bot.people[:2]
    await anna.say("x" * 400)
    await bot.until("SELECT xp FROM levels_scores WHERE user_id = $1", anna.id)
    assert await (await ben.say(f"!rank {anna.mention}")).answer() == (
        f"{anna.mention} is on level 0 with 25 experience, place 1: 1 messages, 0 stars."
    )
    assert (await (await ben.say("!top")).answer()).startswith(f"1. {anna.mention}: level 0")


async def test_the_guild_chooses_the_prefix(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    bot.world.update_member(bot.guild_id, ben.id, roles=[])
    assert await (await owner.say("!prefix ?")).answer() == "Text commands now begin with ?"
    assert "You need the permission" in await (await ben.say("?prefix !")).answer()


async def test_a_level_gives_its_role(bot: RunningBot) -> None:
    owner, ben = bot.people[:2]
    guild = bot.world.guild(bot.guild_id)
    role_id = next(id for id in guild.roles if id != guild.id and id not in guild.members[ben.id].roles)
    await (await owner.say(f"!reward 1 {role_id}")).answer()
    for _ in range(4):
        message = await ben.say("hello")
        await owner.react(message, "⭐")
    await bot.until("SELECT xp >= 45 FROM levels_scores WHERE user_id = $1", ben.id)
    await owner.react(await ben.say("hello"), "⭐")
    await bot.until(
        "SELECT $2 = ANY (roles) FROM members WHERE user_id = $1 AND guild_id = $3", ben.id, role_id, guild.id
    )

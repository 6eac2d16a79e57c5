"""GuildRepository: owners and statistics."""

from __future__ import annotations

from datetime import timedelta

import pytest

from models import Guild, User
from tests.repositories.conftest import NOW
from utils.exceptions import Conflict, NotFound, ValidationError
from utils.repositories import (
    ChannelRepository,
    GuildRepository,
    GuildStatistics,
    GuildTotals,
    MemberRepository,
    RoleRepository,
    SessionFactory,
    UserRepository,
)


def days_ago(days: float) -> object:
    return NOW - timedelta(days=days)


async def test_statistics_cover_only_guilds_the_bot_is_in(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    assert await guilds.statistics() == GuildTotals(0, 0, None, 0, 0, 0, None, None)
    names = ("id", "member_count", "premium_subscription_count", "large", "premium_tier", "joined_at", "left_at")
    rows = [
        (1, 100, 3, False, 1, days_ago(10), None),
        (2, 301, 14, True, 3, days_ago(20), None),
        (3, None, None, None, None, None, None),
        (4, 9_000, 99, True, 3, days_ago(1), NOW),
    ]
    await guilds.upsert_many(dict(zip(names, row, strict=True)) for row in rows)
    await guilds.upsert_many([{"id": 5, "member_count": 70, "unavailable": True}])  # in an outage
    totals = await guilds.statistics()
    assert (totals.guilds, totals.members, totals.average_members, totals.boosts) == (3, 401, 200.5, 17)
    assert (totals.large, totals.premium, totals.last_joined_at) == (1, 2, days_ago(10))
    assert totals.average_age_days == pytest.approx(15, abs=0.5)


async def test_statistics_of_counts_rows_of_one_guild(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    await guilds.upsert_many([{"id": 1, "member_count": 77}, {"id": 2, "member_count": 1}])
    await UserRepository(sessions).upsert_many({"id": id, "bot": id == 11} for id in (10, 11, 12))
    names = ("guild_id", "user_id", "joined_at", "premium_since", "left_at")
    rows = [
        (1, 10, days_ago(400), days_ago(3), None),
        (1, 11, days_ago(6.9), None, None),
        (1, 12, days_ago(7.1), None, None),
        (1, 13, days_ago(1), None, None),  # no row in users
        (1, 14, days_ago(1), days_ago(1), NOW),
        (2, 10, days_ago(1), None, None),
    ]
    await MemberRepository(sessions).upsert_many(dict(zip(names, row, strict=True)) for row in rows)
    roles, channels = RoleRepository(sessions), ChannelRepository(sessions)
    await roles.upsert_many({"guild_id": 1, "id": id} for id in (1, 20, 21))
    await roles.delete((1, 21))
    await channels.upsert_many({"guild_id": 1, "id": id} for id in range(30, 35))
    assert await guilds.statistics_of(1) == GuildStatistics(
        guild_id=1, members=4, bots=1, boosters=1, joined_last_7_days=2, roles=2, channels=5
    )
    assert await guilds.statistics_of(2) == GuildStatistics(2, 1, 0, 0, 1, 0, 0)
    await guilds.delete(2)
    for missing in (2, 3):
        with pytest.raises(NotFound, match=f"not in guild {missing}"):
            await guilds.statistics_of(missing)


async def test_create_with_owner_writes_guild_and_owner(sessions: SessionFactory) -> None:
    guilds, users = GuildRepository(sessions), UserRepository(sessions)
    created = await guilds.create_with_owner({"id": 1, "name": "One"}, {"id": 7, "username": "ada"})
    assert created.owner is not None
    assert (created.owner_id, created.owner.username, created.is_active) == (7, "ada", True)
    again = await guilds.create_with_owner({"id": 2, "owner_id": 7}, {"id": 7, "global_name": "Ada"})
    assert again.owner is not None
    assert (again.owner.username, again.owner.global_name) == ("ada", "Ada")
    assert [guild.id for guild in await guilds.owned_by(7)] == [1, 2]
    assert (await guilds.with_owner(1)).owner is not None
    assert await users.count() == 1
    members = MemberRepository(sessions)
    assert [(member.guild_id, member.user_id) async for member in members.stream()] == [(1, 7), (2, 7)]


async def test_create_with_owner_keeps_a_membership(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    await members.upsert(guild_id=1, user_id=7, nick="Countess")
    await members.delete((1, 7))
    await GuildRepository(sessions).create_with_owner({"id": 1}, {"id": 7})
    assert (await members.get((1, 7))).nick == "Countess"


async def test_create_with_owner_rolls_back_on_conflict(sessions: SessionFactory) -> None:
    guilds, users = GuildRepository(sessions), UserRepository(sessions)
    await guilds.add(Guild(id=1))
    await users.add(User(id=7, username="ada"))
    with pytest.raises(Conflict) as caught:
        await guilds.create_with_owner({"id": 1}, {"id": 7, "username": "eve"})
    assert caught.value.constraint == "pk_guilds"
    assert (await users.get(7)).username == "ada"
    assert (await guilds.get(1)).owner_id is None


async def test_create_with_owner_validates_rows(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    with pytest.raises(ValidationError, match="owner_id of the guild is 8, but id of the owner is 7"):
        await guilds.create_with_owner({"id": 1, "owner_id": 8}, {"id": 7})
    with pytest.raises(ValidationError, match="users needs an id"):
        await guilds.create_with_owner({"id": 1}, {"username": "ada"})
    with pytest.raises(ValidationError, match="nmae"):
        await guilds.create_with_owner({"id": 1, "nmae": "x"}, {"id": 7})
    assert await guilds.count() == 0


async def test_set_member_count(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=1))
    assert (await guilds.set_member_count(1, 12)).member_count == 12
    with pytest.raises(NotFound):
        await guilds.set_member_count(2, 12)
    with pytest.raises(ValidationError, match="-1"):
        await guilds.set_member_count(1, -1)


async def test_active_omits_left_and_unavailable_guilds(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    await guilds.upsert_many({"id": id, "unavailable": id == 2} for id in (1, 2, 3, 4))
    await guilds.delete(3)
    page = await guilds.active(limit=1)
    assert [guild.id for guild in page.items] == [1]
    assert [guild.id for guild in (await guilds.active(after=page.next)).items] == [4]

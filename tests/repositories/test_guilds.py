"""Guilds: statistics, owners, and what they are made of."""

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
    Sessions,
    ThreadRepository,
    UserRepository,
)


def days_ago(days: float) -> object:
    return NOW - timedelta(days=days)


async def test_the_totals_are_of_the_guilds_that_the_bot_is_in(sessions: Sessions) -> None:
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
    totals = await guilds.statistics()
    assert (totals.guilds, totals.members, totals.average_members, totals.boosts) == (3, 401, 200.5, 17)
    assert (totals.large, totals.premium, totals.last_joined_at) == (1, 2, days_ago(10))
    assert totals.average_age_days == pytest.approx(15, abs=0.5)  # the clock goes on while other tests run


async def test_the_statistics_of_a_guild_are_counted(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    await guilds.upsert_many([{"id": 1, "member_count": 77}, {"id": 2, "member_count": 1}])
    await UserRepository(sessions).upsert_many({"id": id, "bot": id == 11} for id in (10, 11, 12))
    names = ("guild_id", "user_id", "joined_at", "premium_since", "left_at")
    rows = [
        (1, 10, days_ago(400), days_ago(3), None),
        (1, 11, days_ago(6.9), None, None),
        (1, 12, days_ago(7.1), None, None),
        (1, 13, days_ago(1), None, None),  # nobody's account was seen yet
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
        with pytest.raises(NotFound, match=f"no guild {missing}"):
            await guilds.statistics_of(missing)


async def test_a_guild_is_made_together_with_its_owner(sessions: Sessions) -> None:
    guilds, users = GuildRepository(sessions), UserRepository(sessions)
    made = await guilds.create_with_owner({"id": 1, "name": "One"}, {"id": 7, "username": "ada"})
    assert made.owner is not None
    assert (made.owner_id, made.owner.username, made.is_active) == (7, "ada", True)
    again = await guilds.create_with_owner({"id": 2, "owner_id": 7}, {"id": 7, "global_name": "Ada"})
    assert again.owner is not None
    assert (again.owner.username, again.owner.global_name) == ("ada", "Ada")
    assert [guild.id for guild in await guilds.owned_by(7)] == [1, 2]
    assert (await guilds.with_owner(1)).owner is not None
    assert await users.count() == 1


async def test_a_guild_that_is_there_already_leaves_the_owner_as_they_were(sessions: Sessions) -> None:
    guilds, users = GuildRepository(sessions), UserRepository(sessions)
    await guilds.add(Guild(id=1))
    await users.add(User(id=7, username="ada"))
    with pytest.raises(Conflict) as caught:
        await guilds.create_with_owner({"id": 1}, {"id": 7, "username": "eve"})
    assert caught.value.constraint == "pk_guilds"
    assert (await users.get(7)).username == "ada"
    assert (await guilds.get(1)).owner_id is None


async def test_a_guild_and_an_owner_who_do_not_fit_are_refused(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    with pytest.raises(ValidationError, match="owner_id is 8, the owner's id 7"):
        await guilds.create_with_owner({"id": 1, "owner_id": 8}, {"id": 7})
    with pytest.raises(ValidationError, match="users needs its id"):
        await guilds.create_with_owner({"id": 1}, {"username": "ada"})
    with pytest.raises(ValidationError, match="nmae"):
        await guilds.create_with_owner({"id": 1, "nmae": "x"}, {"id": 7})
    assert await guilds.count() == 0


async def test_the_size_of_a_guild_can_be_set(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=1))
    assert (await guilds.set_member_count(1, 12)).member_count == 12
    with pytest.raises(NotFound):
        await guilds.set_member_count(2, 12)
    with pytest.raises(ValidationError, match="-1"):
        await guilds.set_member_count(1, -1)


async def test_guilds_that_were_left_or_are_in_an_outage_are_not_active(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    await guilds.upsert_many({"id": id, "unavailable": id == 2} for id in (1, 2, 3, 4))
    await guilds.delete(3)
    page = await guilds.active(limit=1)
    assert [guild.id for guild in page.items] == [1]
    assert [guild.id for guild in (await guilds.active(after=page.next)).items] == [4]


async def test_roles_come_from_the_lowest_to_the_highest(sessions: Sessions) -> None:
    roles = RoleRepository(sessions)
    await roles.upsert_many(
        {"guild_id": 1, "id": id, "position": 10 - id, "name": f"Name {id // 2}"} for id in (1, 2, 3, 4)
    )
    await MemberRepository(sessions).upsert_many(
        [{"guild_id": 1, "user_id": 9, "roles": [1, 3, 99]}, {"guild_id": 1, "user_id": 8, "roles": []}]
    )
    assert [role.id for role in await roles.of_guild(1)] == [4, 3, 2, 1]
    assert [role.id for role in await roles.of_member(1, 9)] == [3, 1]
    assert await roles.of_member(1, 8) == await roles.of_member(1, 7) == []
    assert [role.id for role in await roles.by_name(1, "nAME 1")] == [2, 3]
    await roles.delete((1, 3))
    assert [role.id for role in await roles.of_member(1, 9)] == [1]
    assert len(await roles.of_guild(1, include_gone=True)) == 4


async def test_channels_and_threads_are_found_by_where_they_stand(sessions: Sessions) -> None:
    channels, threads = ChannelRepository(sessions), ThreadRepository(sessions)
    names = ("guild_id", "id", "parent_id", "position", "hidden")
    rows = [(1, 10, None, 0, False), (1, 11, 10, 2, False), (1, 12, 10, 1, True), (2, 13, 10, 0, False)]
    await channels.upsert_many(dict(zip(names, row, strict=True)) for row in rows)
    assert [row.id for row in await channels.of_guild(1)] == [10, 12, 11]
    assert [row.id for row in await channels.of_guild(1, visible_only=True)] == [10, 11]
    assert [row.id for row in await channels.in_category(1, 10)] == [12, 11]
    assert [row.id for row in await channels.in_category(1, None)] == [10]

    await threads.upsert_many(
        {"guild_id": 1, "id": id, "parent_id": 11 + id % 2, "archived": id > 22} for id in range(20, 26)
    )
    assert [row.id for row in (await threads.of_guild(1)).items] == [20, 21, 22, 23, 24, 25]
    assert [row.id for row in (await threads.of_guild(1, archived=False)).items] == [20, 21, 22]
    first = await threads.of_channel(1, 11, limit=2, with_="parent")
    assert [(row.id, row.parent and row.parent.position) for row in first.items] == [(20, 2), (22, 2)]
    assert [row.id for row in (await threads.of_channel(1, 11, after=first.next)).items] == [24]
    assert [row.id for row in (await threads.of_channel(1, 11, archived=True)).items] == [24]
    channel = await channels.get((1, 12), with_="threads")
    assert [row.id for row in channel.threads] == [21, 23, 25]

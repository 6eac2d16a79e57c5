"""RoleRepository, ChannelRepository and ThreadRepository."""

from __future__ import annotations

from utils.repositories import ChannelRepository, MemberRepository, RoleRepository, SessionFactory, ThreadRepository


async def test_roles_are_ordered_from_lowest_to_highest(sessions: SessionFactory) -> None:
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
    assert len(await roles.of_guild(1, include_deleted=True)) == 4


async def test_channels_by_category_and_threads_by_channel(sessions: SessionFactory) -> None:
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
    first = await threads.of_channel(1, 11, limit=2, load="parent")
    assert [(row.id, row.parent and row.parent.position) for row in first.items] == [(20, 2), (22, 2)]
    assert [row.id for row in (await threads.of_channel(1, 11, after=first.next)).items] == [24]
    assert [row.id for row in (await threads.of_channel(1, 11, archived=True)).items] == [24]
    channel = await channels.get((1, 12), load="threads")
    assert [row.id for row in channel.threads] == [21, 23, 25]

"""The world is deterministic and agrees with its oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest

from simulator import World
from simulator.oracle import TABLES


def everything(world: World) -> dict[str, list[dict[str, Any]]]:
    return {table: list(world.expected_rows(table)) for table in TABLES}


def test_world_is_deterministic() -> None:
    def live(seed: int) -> tuple[World, list[str]]:
        world = World(seed=seed)
        for members in (300, 40):
            world.add_guild(members=members)
        rng = random.Random(5)
        return world, [world.random_event(rng) for _ in range(500)]

    (first, told), (second, told_again), (other, _) = live(1), live(1), live(2)
    assert told == told_again
    assert everything(first) == everything(second) != everything(other)


def test_add_guild_creates_what_was_requested() -> None:
    world = World(seed=3)
    world.add_guild(members=500)
    gid = world.add_guild(members=400, roles=6, channels=10, threads=4, archived_threads=2, shared_users=0.5)
    guild = world.guild(gid)
    assert (len(guild.members), len(guild.roles), len(guild.channels)) == (400, 7, 10)
    assert sum(thread.archived for thread in guild.threads.values()) == 2
    assert sum(channel.hidden for channel in guild.channels.values()) == 2
    assert sum(len(world.users[user_id].guild_ids) > 1 for user_id in guild.members) >= 190
    assert world.bot.id in guild.members


def test_members_have_realistic_variety() -> None:
    world = World(seed=1)
    gid = world.add_guild(members=20_000)
    rows = list(world.expected_rows("members", gid))
    users = list(world.expected_rows("users", gid))
    assert {"", None} <= {row["nick"] for row in rows}
    assert any(row["joined_at"] is None for row in rows)
    for column in ("premium_since", "timed_out_until", "avatar", "pending", "flags", "roles"):
        assert any(row[column] for row in rows), column
    assert {user["discriminator"] == "0" for user in users if not user["bot"]} == {True}
    assert all(len(str(user["discriminator"])) == 4 for user in users if user["bot"])


def test_deleted_role_is_removed_from_members() -> None:
    world = World()
    gid = world.add_guild(members=100)
    role = next(role for member in world.guild(gid).members.values() for role in member.roles)
    world.delete_role(gid, role)
    assert not any(role in row["roles"] for row in world.expected_rows("members", gid))  # type: ignore[operator]


def test_deleted_channel_removes_threads_and_references() -> None:
    world = World()
    gid = world.add_guild(members=10)
    place = world.guild(gid).system_channel_id
    assert place is not None
    thread = world.create_thread(gid, place)
    world.delete_channel(gid, place)
    assert thread not in {row["id"] for row in world.expected_rows("threads", gid)}
    assert next(world.expected_rows("guilds", gid))["system_channel_id"] is None


def test_threads_of_hidden_channels_are_hidden() -> None:
    world = World()
    gid = world.add_guild(members=10)
    place = next(thread.parent_id for thread in world.guild(gid).threads.values())
    world.hide_channel(gid, place)
    inside = {thread.id for thread in world.guild(gid).threads.values() if thread.parent_id == place}
    assert world.hidden_thread_ids(gid) == inside
    assert not inside & {row["id"] for row in world.expected_rows("threads", gid)}
    hidden = next(row for row in world.expected_rows("channels", gid) if row["id"] == place)
    assert hidden.keys() == {"guild_id", "id", "type", "position", "hidden"}
    world.reveal_channel(gid, place)
    assert not world.hidden_thread_ids(gid)


def test_user_of_two_guilds_remains_after_leaving_one() -> None:
    world = World()
    first, second = world.add_guild(members=10), world.add_guild(members=10)
    user_id = world.join(first)
    world.join(second, user_id)
    world.leave(first, user_id)
    assert user_id in {row["id"] for row in world.expected_rows("users")}
    world.leave(second, user_id)
    assert user_id not in {row["id"] for row in world.expected_rows("users")}


def test_guilds_without_the_bot_are_not_expected() -> None:
    world = World()
    gid = world.add_guild(members=10)
    world.remove_bot(gid)
    assert {table: len(rows) for table, rows in everything(world).items() if rows} == {"users": 1}
    world.add_bot_back(gid)
    assert len(list(world.expected_rows("members"))) == 10


def test_invalid_calls_raise_clear_errors() -> None:
    world = World()
    gid = world.add_guild(members=10)
    with pytest.raises(LookupError, match="the world has no guild 5"):
        world.join(5)
    with pytest.raises(TypeError, match="a role has no field colour"):
        world.create_role(gid, colour=1)
    with pytest.raises(ValueError, match="unknown table 'people'"):
        list(world.expected_rows("people"))
    with pytest.raises(LookupError, match="has no role 5"):
        world.update_member(gid, world.guild(gid).owner_id, roles=[5])

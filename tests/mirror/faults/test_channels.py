"""Hidden channels, archived threads, and what the deletion of a role or a channel implies."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import Simulator
from simulator.entities import ChannelType
from tests.mirror.harness import changes, differences, mirrored, removals, small_world, versions
from tests.waiting import until
from utils.database import Pool


def text_channel(simulator: Simulator, guild_id: int) -> int:
    """Create a text channel that sets every field that can be hidden."""
    return simulator.world.create_channel(
        guild_id, "secret plans", ChannelType.TEXT, topic="what was last seen", slowmode=5, nsfw=True
    )


async def channel_row(database: Pool, channel_id: int) -> dict[str, Any]:
    """Return a channel's row."""
    row = await database.fetchrow("SELECT * FROM channels WHERE id = $1", channel_id)
    assert row is not None
    return dict(row)


@pytest.mark.parametrize("how", ["live", "while away"])
async def test_hiding_a_channel_only_sets_hidden(database: Pool, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    thread_id = world.create_thread(guild_id, channel_id)
    ignored = {"hidden", "stamp", "updated_at"}
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            before = await channel_row(database, channel_id)
            assert not before["hidden"]
            if how == "live":
                world.hide_channel(guild_id, channel_id)
                await bot.settled()
        if how == "while away":
            world.hide_channel(guild_id, channel_id)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            await bot.mirror.sync(guild_id)  # REST leaves the channel out, which proves nothing
            await bot.settled()
            hidden = await channel_row(database, channel_id)
            assert hidden["hidden"]
            assert {k: v for k, v in hidden.items() if k not in ignored} == {
                k: v for k, v in before.items() if k not in ignored
            }
            thread = "SELECT deleted_at FROM threads WHERE id = $1"
            assert await database.fetchval(thread, thread_id) is None
            assert await changes(database) == []
            world.update_channel(guild_id, channel_id, topic="changed behind the veil", name="renamed")
            await bot.settled()
            assert (await channel_row(database, channel_id))["topic"] == "what was last seen"
            world.reveal_channel(guild_id, channel_id)
            await bot.settled()
    assert await differences(database, simulator) == []
    told = await changes(database, table_name="channels")
    assert [(key, action) for _, key, action, _, _ in told] == [(channel_id, "update")]
    assert told[0][3] == {"topic": "what was last seen", "name": "secret plans"}
    assert told[0][4] == {"topic": "changed behind the veil", "name": "renamed"}


async def test_hidden_channel_gets_a_row(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    world.hide_channel(guild_id, channel_id)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        row = await channel_row(database, channel_id)
        assert (row["hidden"], row["name"], row["topic"], row["type"]) == (True, None, None, 0)
        world.reveal_channel(guild_id, channel_id)
        await bot.settled()
        row = await channel_row(database, channel_id)
        assert (row["hidden"], row["name"], row["topic"]) == (False, "secret plans", "what was last seen")
        world.hide_channel(guild_id, channel_id)
        world.delete_channel(guild_id, channel_id)  # gone is gone, seen or not
        await bot.settled()
    assert await removals(database) == {("channels", channel_id)}
    assert await differences(database, simulator) == []


async def test_unhidden_channel_is_updated(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    deleted, archived, kept = (world.create_thread(guild_id, channel_id) for _ in range(3))
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        world.hide_channel(guild_id, channel_id)
        world.delete_thread(guild_id, deleted)
        world.archive_thread(guild_id, archived)
        born = world.create_thread(guild_id, channel_id)
        born_archived = world.create_thread(guild_id, channel_id)
        world.archive_thread(guild_id, born_archived)
        await bot.settled()
        assert await removals(database) == set()
        world.reveal_channel(guild_id, channel_id)
        await bot.settled()
        stored = await database.fetch("SELECT id FROM threads WHERE parent_id = $1 AND deleted_at IS NULL", channel_id)
    assert {row["id"] for row in stored} == {archived, kept, born, born_archived}
    assert await removals(database) == {("threads", deleted)}
    assert await differences(database, simulator) == []


async def test_offline_thread_changes_are_found(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    deleted, archived = (world.create_thread(guild_id, channel_id) for _ in range(2))
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        world.delete_thread(guild_id, deleted)
        world.archive_thread(guild_id, archived)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    assert await removals(database) == {("threads", deleted)}
    assert await differences(database, simulator) == []


async def test_unreadable_archive_tombstones_no_thread(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """403 means unknown: each thread is requested by itself."""
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    archived, unknown = (world.create_thread(guild_id, channel_id) for _ in range(2))
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        world.archive_thread(guild_id, archived)
        world.archive_thread(guild_id, unknown)
        simulator.faults.rest_fail("/threads/archived", 403, times=1_000)
        simulator.faults.rest_fail(f"/channels/{unknown}", 403, times=1_000)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        assert simulator.faults.injected["rest_fail"] > 2
    rows = await database.fetch("SELECT id, archived, deleted_at FROM threads WHERE parent_id = $1", channel_id)
    assert {tuple(row) for row in rows} == {(archived, True, None), (unknown, False, None)}
    assert await removals(database) == set()


async def test_failed_archive_read_is_retried(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, _ = small_world(monkeypatch, 6)
    simulator.faults.rest_fail("/threads/archived", 500, times=11)  # discord.py tries five times each
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
    assert simulator.faults.injected["rest_fail"] == 11
    assert await differences(database, simulator) == []


async def test_thread_deleted_during_an_archive_read_stays_deleted(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response was made before the deletion and arrives after it: the thread, never stored, must not appear."""
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    doomed, buried = world.create_thread(guild_id, channel_id), text_channel(simulator, guild_id)
    inside = world.create_thread(guild_id, buried)
    for id in (doomed, inside):
        world.archive_thread(guild_id, id)
    for parent in (channel_id, buried):
        simulator.faults.rest_delay(f"/channels/{parent}/threads/archived", 0.2, times=2)
    asked = simulator.rules.requests
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.ready()
        todo = {
            f"GET /channels/{channel_id}/threads/archived/public": lambda: world.delete_thread(guild_id, doomed),
            f"GET /channels/{buried}/threads/archived/public": lambda: world.delete_channel(guild_id, buried),
        }
        while todo:  # whichever comes first
            await until(lambda: any(asked[request] for request in todo))
            todo.pop(next(request for request in todo if asked[request]))()
        await bot.settled()
    assert await differences(database, simulator) == []


async def test_live_deletions_of_channels_and_roles_cascade(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id, _) = small_world(monkeypatch, 15, 6)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    threads = [world.create_thread(guild_id, channel_id) for _ in range(3)]
    role, kept = world.create_role(guild_id), world.create_role(guild_id)
    members = list(world.guild(guild_id).members)[:4]
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        for id in members:
            world.update_member(guild_id, id, roles=[role, kept])
        await bot.settled()
        before = (await versions(database))["members"]
        world.delete_channel(guild_id, channel_id)
        world.delete_role(guild_id, role)
        await bot.settled()
    assert len(before - (await versions(database))["members"]) == len(members)
    gone = {("channels", channel_id), ("roles", role), *(("threads", id) for id in threads)}
    assert await removals(database) == gone
    told = await changes(database, table_name="members")
    assert {(change[1], change[2]) for change in told} == {(id, "update") for id in members}
    assert all(change[3:] == ({"roles": [role, kept]}, {"roles": [kept]}) for change in told)
    assert await differences(database, simulator) == []


async def test_offline_role_and_channel_deletions_cascade(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    world, channel_id = simulator.world, text_channel(simulator, guild_id)
    thread, role = world.create_thread(guild_id, channel_id), world.create_role(guild_id)
    for id in list(world.guild(guild_id).members)[:20]:
        world.update_member(guild_id, id, roles=[role])
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        world.delete_channel(guild_id, channel_id)
        world.delete_role(guild_id, role)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    assert await removals(database) == {("channels", channel_id), ("roles", role), ("threads", thread)}
    assert await differences(database, simulator) == []

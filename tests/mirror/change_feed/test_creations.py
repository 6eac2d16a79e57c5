"""Creations of channels, threads, roles and guilds: those heard live, and those that a listing proves."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from models import DISCORD_EPOCH_MS
from tests.mirror.harness import mirrored, small_world
from tests.waiting import until
from utils.database import Pool

CREATIONS = "SELECT table_name, key, inferred, user_id, before, after FROM changes WHERE action = 'create' ORDER BY id"


async def creations(database: Pool) -> dict[tuple[str, int], tuple[bool, dict[str, Any]]]:
    """Return (inferred, after) by table and id; each may be recorded once only."""
    rows = await database.fetch(CREATIONS)
    assert all(row["before"] is None for row in rows)
    found = {(row["table_name"], row["key"]["id"]): (row["inferred"], row["after"]) for row in rows}
    assert len(found) == len(rows)
    return found


async def test_first_sync_records_none(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, _ = small_world(monkeypatch, 30, 5)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
    assert await creations(database) == {}


async def test_live_creations_are_recorded_once_and_certain(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 5)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        role, channel = world.create_role(guild_id, "new role"), world.create_channel(guild_id, "new channel")
        await bot.settled()
        thread = world.create_thread(guild_id, channel, "new thread")
        world.update_channel(guild_id, channel, name="renamed")
        added = world.add_guild(members=3)
        await until(lambda: added in bot.mirror.reconciler.guilds)
        await bot.settled()
        await bot.mirror.sync(guild_id)
    found = await creations(database)
    assert set(found) == {("roles", role), ("channels", channel), ("threads", thread), ("guilds", added)}
    assert {inferred for inferred, _ in found.values()} == {False}
    assert found["channels", channel][1]["name"] == "new channel"
    assert found["guilds", added][1]["name"] == world.guild(added).name
    renamed = await database.fetchval("SELECT after ->> 'name' FROM changes WHERE table_name = 'channels'"
                                      " AND action = 'update'")  # fmt: skip
    assert renamed == "renamed"


async def test_listings_prove_what_was_created_while_nobody_was_connected(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 5)
    world = simulator.world
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        # The simulated clock is not the database's.
        now = datetime.fromtimestamp(((world.new_id() >> 22) + DISCORD_EPOCH_MS) / 1000, UTC)
        await database.execute("UPDATE sync_runs SET started_at = $1", now)
        # What was created before the first listing has not been created since, even if it is seen only now.
        old = next(iter(world.guild(guild_id).channels))
        await database.execute("DELETE FROM channels WHERE id = $1", old)
        role, channel = world.create_role(guild_id, "new role"), world.create_channel(guild_id, "new channel")
        gone = world.create_channel(guild_id, "gone again")
        world.delete_channel(guild_id, gone)
        added = world.add_guild(members=3)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    found = await creations(database)
    assert {key: inferred for key, (inferred, _) in found.items()} == {
        ("roles", role): True, ("channels", channel): True, ("guilds", added): True,
    }  # fmt: skip
    assert await database.fetchval("SELECT count(*) FROM channels WHERE id = $1", old) == 1

"""A world is mirrored over a real gateway connection, then its changes."""

from __future__ import annotations

import random

import pytest

from simulator import Limits, Simulator, World
from tests.mirror.harness import differences, mirrored, small_world
from utils.database import Pool


async def test_mirrors_a_changing_world(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(seed=3)
    world.add_guild(members=2500)
    world.add_guild(members=300)
    world.add_guild(members=40)
    async with Simulator(world, limits=Limits.none()) as simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        assert await differences(database, simulator) == []
        rng = random.Random(7)
        for _ in range(300):
            world.random_event(rng)
        await bot.settled()
        assert await differences(database, simulator) == []


async def test_an_error_after_a_commit_repeats_and_stops_nothing(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tables: frozenset[str]) -> None:
        raise RuntimeError("a mistake of ours")

    simulator, (guild_id, _) = small_world(monkeypatch, 45, 6)
    async with simulator, mirrored(database, simulator, monkeypatch, on_written=fail) as bot:
        await bot.settled()
        user_id = simulator.world.join(guild_id)
        channel_id = next(iter(simulator.world.guild(guild_id).channels))
        for _ in range(3):
            simulator.world.message(guild_id, channel_id, user_id, "hello")
            await bot.settled()
        await bot.mirror.sync(guild_id)
        assert await differences(database, simulator) == []
        assert await database.fetchval("SELECT message_count FROM member_stats WHERE user_id = $1", user_id) == 3
        assert not bot.mirror.writer.overlay.is_tracking

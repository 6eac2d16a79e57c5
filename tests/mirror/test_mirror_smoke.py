"""A world is mirrored over a real gateway connection, then its changes."""

from __future__ import annotations

import random

import pytest

from simulator import Limits, Simulator, World
from tests.mirror.harness import differences, mirrored
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

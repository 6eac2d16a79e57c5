"""A small world and the simulator that serves it, without Discord's limits."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from simulator import Limits, Simulator, World


@pytest.fixture
def world() -> World:
    """Two guilds: one of several pages, and a small one."""
    world = World(seed=11)
    world.add_guild(members=3_500, name="Large")
    world.add_guild(members=40, name="Small")
    return world


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[Simulator]:
    """The world served without limits."""
    async with Simulator(world, limits=Limits.none()) as running:
        yield running


@pytest.fixture
def large(world: World) -> int:
    """The id of the guild with several pages."""
    return next(iter(world.guilds))


@pytest.fixture
def small(world: World) -> int:
    """The id of the small guild."""
    return list(world.guilds)[1]

"""A small world and the simulator that serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from simulator import Limits, Simulator, World


@pytest.fixture
def world() -> World:
    """A small world: one guild of several pages, one small one."""
    world = World(seed=7)
    world.add_guild(members=3500)
    world.add_guild(members=40)
    return world


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[Simulator]:
    """The small world served without limits."""
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

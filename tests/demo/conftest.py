"""The simulator of the demo's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from simulator import Limits, Simulator, World


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[Simulator]:
    """The test's world, served without rate limits."""
    async with Simulator(world, limits=Limits.none()) as running:
        yield running

"""After any interleaving of events, faults and restarts, the tables equal the world once a reconcile is complete."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.conftest import cloned
from tests.mirror.driver import STEPS, Driver, Step, empty
from utils.database import Pool
from utils.database.embedded import EmbeddedServer

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("GUILDBOOK_PROPERTY_EXAMPLES", "12"))

#: What happens most of the time in Discord is drawn most of the time.
_common = st.sampled_from(["event", "events", "renick", "grant", "rename", "leave", "rejoin"])
_step = st.tuples(_common | st.sampled_from(STEPS), st.integers(0, 9_999), st.integers(0, 3))


@pytest.fixture
def runner(server: EmbeddedServer, template: str) -> Iterator[tuple[asyncio.Runner, Pool]]:
    """One event loop and one database for all examples."""
    with asyncio.Runner() as loop:
        lent = cloned(server, template)
        database = Pool(loop.run(lent.__aenter__()), pool_max=8, connect_timeout=10, acquire_timeout=10)
        loop.run(database.connect())
        yield loop, database
        loop.run(database.close())
        loop.run(lent.__aexit__(None, None, None))


@pytest.mark.timeout(60 + 10 * EXAMPLES)
@settings(max_examples=EXAMPLES)
@given(
    seed=st.integers(1, 1_000),
    guilds=st.integers(1, 4),
    steps=st.lists(_step, min_size=10, max_size=60),
    pooled=st.booleans(),
)
def test_the_tables_equal_the_world_after_any_interleaving(
    runner: tuple[asyncio.Runner, Pool], seed: int, guilds: int, steps: list[Step], pooled: bool
) -> None:
    loop, database = runner

    async def example() -> list[str]:
        await empty(database)
        with pytest.MonkeyPatch.context() as monkeypatch:
            if pooled:
                monkeypatch.setattr(database, "target", replace(database.target, pooled=True))
            return await Driver(database, monkeypatch, seed, guilds).run(steps)

    wrong = loop.run(example())
    note(f"wrong afterwards: {wrong}")
    assert wrong == []

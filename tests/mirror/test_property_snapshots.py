"""A database restored to any snapshot, or dropped, at any point of any history equals the world after a reconcile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from tests.mirror.driver import STEPS, Step
from tests.mirror.restoring import OFTEN, Droppable, History, droppable, find_differences
from utils.database.embedded import EmbeddedServer

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("GUILDBOOK_PROPERTY_EXAMPLES", "6"))

_step = st.tuples(st.sampled_from(OFTEN) | st.sampled_from(STEPS), st.integers(0, 9_999), st.integers(0, 3))


@pytest.fixture
def runner(server: EmbeddedServer, template: str) -> Iterator[tuple[asyncio.Runner, Droppable]]:
    """One event loop and one database for all examples."""
    with asyncio.Runner() as loop:
        lent = droppable(server, template)
        yield loop, loop.run(lent.__aenter__())
        loop.run(lent.__aexit__(None, None, None))


#: The bot runs on, events are spooled, and the database forgets all of it.
_WHILE_RUNNING: list[Step] = [
    ("snapshot", 0, 3),
    ("rejoin", 1, 3),
    ("leave", 2, 3),
    ("go_back", 0, 3),
    ("renick", 3, 3),
]
_AFTER_A_KILL: list[Step] = [
    ("snapshot", 0, 3), ("rejoin", 5, 0), ("leave", 7, 0), ("kill", 0, 0), ("go_back", 0, 0), ("start", 0, 3),
    ("renick", 3, 3),
]  # fmt: skip
_EMPTIED: list[Step] = [("rejoin", 1, 0), ("leave", 2, 0), ("kill", 0, 0), ("go_back", 0, 0), ("start", 0, 3)]
#: Once with empty tables, once without any.
_DROPPED: list[Step] = [
    ("snapshot", 0, 3), ("rejoin", 1, 0), ("drop", 1, 0), ("renick", 3, 3), ("drop", 0, 3), ("leave", 2, 0),
    ("go_back", 0, 3),
]  # fmt: skip


@pytest.mark.timeout(60 + 20 * EXAMPLES)
@settings(max_examples=EXAMPLES)
@example(seed=1, guilds=2, steps=_WHILE_RUNNING)
@example(seed=1, guilds=2, steps=_AFTER_A_KILL)
@example(seed=1, guilds=2, steps=_EMPTIED)
@example(seed=1, guilds=2, steps=_DROPPED)
@given(seed=st.integers(1, 1_000), guilds=st.integers(1, 3), steps=st.lists(_step, min_size=5, max_size=30))
def test_any_restored_snapshot_ends_equal_to_the_world(
    runner: tuple[asyncio.Runner, Droppable], seed: int, guilds: int, steps: list[Step]
) -> None:
    loop, database = runner
    wrong = loop.run(find_differences(database, History(seed, guilds, steps)))
    note(f"wrong afterwards: {wrong}")
    assert wrong == []


@pytest.mark.exhaustive
@pytest.mark.timeout(7_200)
@settings(max_examples=500)
@given(seed=st.integers(1, 1_000), guilds=st.integers(1, 4), steps=st.lists(_step, min_size=10, max_size=60))
def test_500_histories_of_restored_snapshots(
    runner: tuple[asyncio.Runner, Droppable], seed: int, guilds: int, steps: list[Step]
) -> None:
    loop, database = runner
    assert loop.run(find_differences(database, History(seed, guilds, steps))) == []

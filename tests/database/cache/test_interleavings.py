"""Whatever two processes do at once, no read is older than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.database.cache.conftest import UPDATE, Process
from tests.waiting import until
from utils.database.cache import QueryCache
from utils.exceptions import DatabaseError

pytestmark = pytest.mark.direct("nothing listens through a pooler")

#: Seconds that another process's write may stay unseen, and what a busy machine may add.
UNSEEN_SECONDS = 1.0
SLACK_SECONDS = 1.0
READS = ("SELECT value FROM counter WHERE id = $1", "SELECT value FROM counted WHERE id = $1")

Kind = Literal["read", "write", "roll back", "kill write", "cancel write", "cancel read", "kill channel", "wait"]
CALM: tuple[Kind, ...] = ("read", "read", "read", "read", "write", "roll back", "cancel read", "wait")
#: Without its channel a process caches nothing for a moment, and after a write whose end is not known for seconds: both
#: have plans of their own, so that in the others there is something cached that could be too old.
UNHEARD: tuple[Kind, ...] = (*CALM, *CALM, "kill channel")
WILD: tuple[Kind, ...] = (*CALM, "kill channel", "kill write", "cancel write")


@dataclass(frozen=True)
class Step:
    kind: Kind
    process: int
    row: int
    #: How often the loop turns before the next step, or before the cancellation.
    turns: int


@dataclass
class History:
    """What was written, when that was known to its process, and what was read too late."""

    writes: list[tuple[int, int, int, float]] = field(default_factory=list)
    reads: int = 0
    stale: list[str] = field(default_factory=list)

    async def write(self, processes: tuple[Process, Process], step: Step) -> None:
        process = processes[step.process]
        with contextlib.suppress(DatabaseError):
            value = await process.write(
                UPDATE, step.row, commit=step.kind != "roll back", killed=step.kind == "kill write"
            )
            if step.kind != "roll back":
                self.writes.append((step.process, step.row, value, time.monotonic()))

    async def read(self, processes: tuple[Process, Process], step: Step) -> None:
        began = time.monotonic()
        known = [
            (value, at)
            for process, row, value, at in self.writes
            if row == step.row and (process == step.process or began - at > UNSEEN_SECONDS + SLACK_SECONDS)
        ]
        value = await processes[step.process].read(READS[step.turns % 2], step.row, late=0.002 * step.turns)
        self.reads += 1
        if known and value < max(known)[0]:
            self.stale.append(f"{step}: {value}, but {max(known)[0]} was written {began - max(known)[1]:.3f} s before")


def steps(kinds: tuple[Kind, ...]) -> st.SearchStrategy[list[Step]]:
    step = st.builds(Step, st.sampled_from(kinds), st.integers(0, 1), st.integers(1, 2), st.integers(0, 12))
    return st.lists(step, min_size=20, max_size=80)


# Each example takes seconds: to shrink one would take minutes.
@pytest.mark.slow
@settings(max_examples=12, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(plan=steps(CALM) | steps(UNHEARD) | steps(WILD))
async def test_no_read_is_too_old(processes: tuple[Process, Process], plan: list[Step]) -> None:
    history = History()
    await processes[0].database.execute("UPDATE counter SET value = 0")
    for process in processes:
        await until(lambda cache=process.cache: cache.is_trusted)  # type: ignore[misc]
        process.cache.flush()
        process.cache._distrusted.clear()
        await process.read(READS[0], 1)
    tasks = []
    for step in plan:
        if step.kind == "wait":
            await asyncio.sleep(0.02 * step.turns)
            continue
        if step.kind == "kill channel":
            await processes[step.process].kill_channel()
            continue
        does = history.read if step.kind in ("read", "cancel read") else history.write
        task = asyncio.create_task(does(processes, step))
        tasks.append(task)
        for _ in range(step.turns):
            await asyncio.sleep(0)
        if step.kind.startswith("cancel"):
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results if isinstance(result, Exception)] == []
    end = time.monotonic() + UNSEEN_SECONDS + SLACK_SECONDS + 0.1
    while time.monotonic() < end:
        await asyncio.sleep(0.05)
        for row, number in itertools.product((1, 2), (0, 1)):
            await history.read(processes, Step("read", number, row, row))
    assert history.stale == []


async def test_the_check_detects_a_deaf_cache(processes: tuple[Process, Process]) -> None:
    deaf = processes[1]
    deaf.cache = deaf.access.cache = QueryCache()
    await deaf.cache.load(deaf.database)
    history = History()
    await deaf.read(READS[0], 1)
    await history.write(processes, Step("write", 0, 1, 0))
    await asyncio.sleep(UNSEEN_SECONDS + SLACK_SECONDS + 0.1)
    await history.read(processes, Step("read", 1, 1, 0))
    assert len(history.stale) == 1

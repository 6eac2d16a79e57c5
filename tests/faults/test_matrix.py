"""Every fault of the matrix in its short form: afterwards the tables equal the world, nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.matrix import FAULTS
from tests.faults.rig import rigged

#: Seconds that events come before the fault and after it.
BEFORE, AFTER = 1.0, 0.5


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the server's own account may enter, whatever else is tested at the same time."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", FAULTS)
async def test_nothing_is_lost_and_nothing_is_doubled(place: Path, name: str) -> None:
    fault, seconds, _ = FAULTS[name]
    async with rigged(place, seed=1) as rig:
        bot = rig.new_bot()
        await rig.start(bot)
        await rig.begin()
        await asyncio.sleep(BEFORE)
        await fault(rig, seconds)
        await asyncio.sleep(AFTER)
        wrong = await rig.verdict()
        told = len(rig.books.messages)
        assert not wrong, "\n".join([*wrong, rig.last_words()])
    assert told > 300

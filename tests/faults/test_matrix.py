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

pytestmark = pytest.mark.slow

#: Seconds that events come before the fault and after it.
BEFORE, AFTER = 1.0, 0.5
#: Worlds that share the faults: each takes some seconds to be made.
WORLDS = 3


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the server's own account may enter, whatever else is tested at the same time."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(WORLDS))
async def test_nothing_is_lost_and_nothing_is_doubled(place: Path, first: int) -> None:
    """A world goes through its part of the faults, one after the other, with a verdict after each."""
    async with rigged(place, seed=first + 1) as rig:
        await rig.start(rig.new_bot())
        for name in list(FAULTS)[first::WORLDS]:
            fault, seconds, _ = FAULTS[name]
            told = len(rig.books.messages)
            await rig.begin()
            await asyncio.sleep(BEFORE)
            await fault(rig, seconds)
            await asyncio.sleep(AFTER)
            wrong = await rig.verdict()
            assert not wrong, "\n".join([f"after {name}:", *wrong, rig.last_words()])
            assert len(rig.books.messages) - told > 200, name

"""Inject every fault for a short time: afterwards the tables equal the world, without lost or duplicate events."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS
from tests.faults.rig import MODERATE_RATE, running_rig

pytestmark = pytest.mark.slow

#: Seconds of traffic before and after each fault.
BEFORE, AFTER = 1.0, 0.5
#: Number of rigs that share the faults. Starting one takes several seconds.
RIGS = 3


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the PostgreSQL account may enter, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="guildbook-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(RIGS))
async def test_loses_and_duplicates_nothing(directory: Path, number: int) -> None:
    async with running_rig(directory, number + 1, MODERATE_RATE) as rig:
        await rig.start(rig.new_bot())
        for name in list(FAULTS)[number::RIGS]:
            fault = FAULTS[name]
            sent = len(rig.audit.messages)
            await rig.start_traffic()
            await asyncio.sleep(BEFORE)
            await fault.inject(rig, fault.short)
            await asyncio.sleep(AFTER)
            wrong = await rig.verify()
            assert not wrong, "\n".join([f"after {name}:", *wrong, rig.log_tail()])
            assert len(rig.audit.messages) - sent > 100, name

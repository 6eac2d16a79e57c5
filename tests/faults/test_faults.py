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
#: What `make test` injects: each side is killed or cut off from another, and writes that have to wait. The others have
#: tests of their own: tests/bot/test_process_standby.py, tests/service/ and tests/mirror/spool/.
SAMPLE = (
    "kill -9 of the bot",
    "kill -9 of PostgreSQL",
    "active bot cut off from the database, standby takes over",
    "connections to the database half-open",
    "network to Discord frozen",
    "tables locked",
)
OTHERS = tuple(name for name in FAULTS if name not in SAMPLE)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the PostgreSQL account may enter, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="guildbook-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("names", "seed"),
    [
        pytest.param(SAMPLE, 1, id="sample"),
        pytest.param(OTHERS[::2], 2, id="others", marks=pytest.mark.exhaustive),
        pytest.param(OTHERS[1::2], 3, id="more", marks=pytest.mark.exhaustive),
    ],
)
async def test_loses_and_duplicates_nothing(directory: Path, names: tuple[str, ...], seed: int) -> None:
    async with running_rig(directory, seed, MODERATE_RATE) as rig:
        await rig.start(rig.new_bot())
        for name in names:
            fault = FAULTS[name]
            sent = len(rig.audit.messages)
            await rig.start_traffic()
            await asyncio.sleep(BEFORE)
            await fault.inject(rig, fault.short)
            await asyncio.sleep(AFTER)
            wrong = await rig.verify()
            assert not wrong, "\n".join([f"after {name}:", *wrong, rig.log_tail()])
            assert len(rig.audit.messages) - sent > 100, name

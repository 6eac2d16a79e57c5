"""How reconciles end with the mirror."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from simulator import Simulator
from tests.mirror.harness import mirrored
from utils.database import Pool


async def test_stop_ends_work_that_has_swallowed_a_cancellation(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    swallowed = asyncio.Event()

    async def goes_on() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        swallowed.set()
        await asyncio.Event().wait()

    async with asyncio.timeout(60):
        async with mirrored(database, simulator, monkeypatch) as bot:
            bot.mirror.reconciler.spawn(goes_on())
            await asyncio.sleep(0)
    assert swallowed.is_set()

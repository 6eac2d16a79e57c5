"""Cancelling a migration: nothing hangs, and the database is unchanged."""

from __future__ import annotations

import asyncio
import logging

import asyncpg
import pytest

from utils.database import ConnectTarget
from utils.operations import migrations
from utils.operations.migrations.environment import LOCK_KEY

TIMEOUT_SECONDS = 20.0
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'alembic_version'::regclass"


async def test_cancels_while_waiting_for_a_table(
    empty_target: ConnectTarget,
) -> None:
    await migrations.upgrade(empty_target, "0001")
    other = await asyncpg.connect(**empty_target.connect_kwargs())
    async with asyncio.timeout(TIMEOUT_SECONDS), other.transaction():
        await other.execute("LOCK TABLE alembic_version")
        migrating = asyncio.create_task(migrations.upgrade(empty_target))
        while not await other.fetchval(WAITING):  # noqa: ASYNC110 - the server is asked
            await asyncio.sleep(0.02)
        migrating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await migrating
        assert await other.fetchval(WAITING) == 0
    await other.close()
    assert await migrations.current(empty_target) == "0001"
    await migrations.upgrade(empty_target)


async def test_cancels_while_waiting_for_another_process(
    empty_target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = await asyncpg.connect(**empty_target.connect_kwargs())
    await other.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        migrating = asyncio.create_task(migrations.upgrade(empty_target))
        while "waiting for another process" not in caplog.text:  # noqa: ASYNC110 - logged by a thread
            await asyncio.sleep(0.02)
        migrating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await migrating
    await other.close()
    assert await migrations.current(empty_target) is None

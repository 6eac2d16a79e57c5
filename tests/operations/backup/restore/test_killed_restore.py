"""A restore that is killed at any point leaves the old or the new rows complete, and the next one works."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.operations.backup.helpers import (
    connect,
    dropping_scratch_databases,
    execute,
    make_backup,
    make_service,
    run_backup_command,
    scratch_databases,
    scratch_schema_names,
    table_checksums,
)
from utils.database import ConnectTarget, Pool
from utils.operations.backup.scratch import databases
from utils.operations.development import seed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


async def acquire_lease(target: ConnectTarget) -> None:
    """Write as a bot does when it starts: no lock of the killed process may block it for longer than its end takes."""
    async with asyncio.timeout(30), connect(target) as connection:
        await connection.execute(
            "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, 'next', 1) ON CONFLICT (shard) DO UPDATE SET"
            " epoch = leases.epoch + 1"
        )
        await connection.execute("UPDATE guilds SET name = name")


async def run_killed_restores(tmp_path: Path, database: Pool, *options: str, calls: int, times: int) -> None:
    """Kill restores before some database calls and after some times, and look at what each has left."""
    rng = random.Random(2026)
    target = database.target
    await seed.seed(database, guilds=2, members=100)
    new = await table_checksums(target)
    backup = await make_backup(make_service(tmp_path), database)
    command = ("restore", backup.id, "--yes", *options)
    outcomes: set[str] = set()
    started = time.monotonic()
    complete = await run_backup_command(tmp_path, target, *command, KILL_AT="0")
    seconds = time.monotonic() - started
    assert complete.code == 0, complete
    total = int(complete.err.split()[-1])
    # What makes the rows live is in the last third; what comes before only prepares it.
    points = [*rng.sample(range(1, total), calls), *rng.sample(range(total * 2 // 3, total), calls), total - 2]
    kills: list[dict[str, Any]] = [{"KILL_AT": str(point)} for point in points]
    kills += [{"kill_after": rng.uniform(0.2, 1.0) * seconds} for _ in range(times)]
    for number, kill in enumerate(kills):
        await execute(target, f"INSERT INTO guilds (id, name) VALUES ({number + 1}, 'since')")  # noqa: S608
        old = await table_checksums(target)
        killed = await run_backup_command(tmp_path, target, *command, **kill)
        assert killed.code in (0, -signal.SIGKILL), killed
        await acquire_lease(target)
        found = await table_checksums(target)
        outcomes.add("old" if found == old else "new" if found == new else f"neither, {kill}")
    assert outcomes == {"old", "new"}
    last = await run_backup_command(tmp_path, target, *command, "--json")
    assert last.code == 0, last
    assert await table_checksums(target) == new
    assert await scratch_schema_names(target) == []


async def test_leaves_the_old_or_the_new_rows(tmp_path: Path, database: Pool) -> None:
    await run_killed_restores(tmp_path, database, calls=2, times=1)


@pytest.mark.exhaustive
async def test_leaves_the_old_or_the_new_rows_at_many_points(tmp_path: Path, database: Pool) -> None:
    await run_killed_restores(tmp_path, database, calls=10, times=10)


@pytest.mark.exhaustive
async def test_leaves_the_old_or_the_new_rows_of_a_table(tmp_path: Path, database: Pool) -> None:
    await run_killed_restores(tmp_path, database, "--table", "guilds", calls=6, times=10)


@pytest.mark.exhaustive
async def test_leaves_the_old_or_the_new_database(tmp_path: Path, database: Pool) -> None:
    async with dropping_scratch_databases(database.target):
        await run_killed_restores(tmp_path, database, "--whole-database", calls=6, times=10)
        assert await scratch_databases(database.target, databases.RESTORE) == []
        assert len(await scratch_databases(database.target, databases.BEFORE)) == 1

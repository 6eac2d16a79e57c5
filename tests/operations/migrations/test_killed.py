"""kill -9 during an upgrade or a downgrade: the database is at exactly one revision, and the next run continues."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.forkserver import BotCommand, start_bot
from tests.operations.migrations.support import HEAD, KNOWN
from utils.database import ConnectTarget
from utils.operations import migrations
from utils.operations.migrations import schema_catalog

pytestmark = pytest.mark.slow

#: The advisory lock that blocks the chosen statement; the process is killed there.
STOP = 5_150
#: Counts this session's DDL commands and blocks at the chosen one.
TRAP = """
CREATE SCHEMA trap;
CREATE TABLE trap.at (number int);
CREATE FUNCTION trap.count() RETURNS event_trigger LANGUAGE plpgsql AS $$
DECLARE seen int := coalesce(nullif(current_setting('trap.seen', true), ''), '0')::int + 1;
BEGIN
    PERFORM set_config('trap.seen', seen::text, false);
    IF seen = (SELECT number FROM trap.at) THEN PERFORM pg_advisory_xact_lock(5150); END IF;
END $$;
CREATE EVENT TRIGGER trap ON ddl_command_start EXECUTE FUNCTION trap.count();
"""
UNTRAP = "DROP EVENT TRIGGER trap; DROP SCHEMA trap CASCADE"
WAITING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 5150 AND NOT granted"
OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
#: Fewer than a whole upgrade or downgrade has; a run that reaches its end without the trap fails the test.
COMMANDS = 30
TIMEOUT_SECONDS = 60.0
SEED = 20_260_102


@pytest.fixture(scope="module")
def catalogs() -> dict[str | None, dict[str, str]]:
    """The catalog at each revision, filled by the first test that needs it."""
    return {}


async def command(directory: Path, target: ConnectTarget, *arguments: str) -> BotCommand:
    return await start_bot(directory, "db", *arguments, settings={"DATABASE_URL": target.libpq_url()})


async def kill_at(directory: Path, target: ConnectTarget, number: int, *arguments: str) -> None:
    """Run a command, kill it at its nth DDL command, and wait until the server has ended its session."""
    watch = await asyncpg.connect(**target.connect_kwargs())
    await watch.execute("SELECT pg_advisory_lock($1)", STOP)
    await watch.execute(TRAP)
    await watch.execute("INSERT INTO trap.at VALUES ($1)", number)
    process = await command(directory, target, *arguments)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not await watch.fetchval(WAITING):
            assert process.returncode is None, (await process.communicate())[0].decode()
            await watch.execute("SELECT pg_sleep(0.01)")
        process.kill()
        await process.communicate()
        await watch.execute("SELECT pg_advisory_unlock($1)", STOP)
        while await watch.fetchval(OTHERS):  # the server notices at its next write to the socket
            await watch.execute("SELECT pg_sleep(0.01)")
    await watch.execute(UNTRAP)
    await watch.close()


async def check_is_at_one_revision(
    target: ConnectTarget, empty_target: ConnectTarget, catalogs: dict[str | None, dict[str, str]]
) -> str | None:
    if not catalogs:
        catalogs[None] = {}
        for revision in KNOWN:
            await migrations.upgrade(empty_target, revision)
            catalogs[revision] = await schema_catalog.read(empty_target)
    at = await migrations.current(target)
    assert await schema_catalog.read(target) == catalogs[at]
    return at


def points(kind: str, count: int) -> list[Any]:
    """Return every DDL command to kill at, all but a random sample marked exhaustive."""
    numbers = range(1, COMMANDS + 1)
    sample = random.Random(f"{SEED} {kind}").sample(numbers, count)
    return [it if it in sample else pytest.param(it, marks=pytest.mark.exhaustive) for it in numbers]


async def check_upgrade_continues(directory: Path, target: ConnectTarget) -> None:
    process = await command(directory, target, "upgrade")
    async with asyncio.timeout(TIMEOUT_SECONDS):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert await migrations.current(target) == HEAD
    assert await migrations.check_drift(target) == []
    assert await migrations.find_pause(target) is None


@pytest.mark.parametrize("number", points("upgrade", 3))
async def test_upgrade_continues_after_a_kill(
    tmp_path: Path, target: ConnectTarget, empty_target: ConnectTarget, catalogs: dict[str | None, dict[str, str]],
    number: int,
) -> None:  # fmt: skip
    await migrations.downgrade(target, "base")
    await kill_at(tmp_path, target, number, "upgrade")
    assert await check_is_at_one_revision(target, empty_target, catalogs) != HEAD
    await check_upgrade_continues(tmp_path, target)


@pytest.mark.parametrize("number", points("downgrade", 3))
async def test_a_killed_downgrade_stays_paused(
    tmp_path: Path, target: ConnectTarget, empty_target: ConnectTarget, catalogs: dict[str | None, dict[str, str]],
    number: int,
) -> None:  # fmt: skip
    arguments = ("downgrade", "base", "--no-backup", "--yes-destroy", str(target.database))
    await kill_at(tmp_path, target, number, *arguments)
    assert await check_is_at_one_revision(target, empty_target, catalogs) is not None
    if number > 1:
        assert await migrations.find_pause(target) is not None  # or the next start would undo it
    await check_upgrade_continues(tmp_path, target)

"""kill -9 in the middle of an upgrade or a downgrade: the database is at exactly one revision, and goes on from it."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

import asyncpg
import pytest

from tests.operations.migrations.test_admin import HEAD, KNOWN
from utils.database import ConnectTarget
from utils.demo.child import ENTRY, environment
from utils.operations import migrations
from utils.operations.migrations import schema_catalog, switch

#: An advisory lock that the chosen statement of the migration stops at; whoever is killed is killed there.
STOP = 5_150
#: Counts the commands that change the schema, each before it runs, in this session.
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
#: Commands of a whole upgrade and a whole downgrade, at least; a run that meets no trap is not a kill, and fails.
COMMANDS = 30
PATIENCE = 60.0
SEED = 20_260_102


@pytest.fixture(scope="module")
def made() -> dict[str | None, dict[str, str]]:
    """What the catalogue is at each revision, filled by who needs it first."""
    return {}


async def command(directory: Path, target: ConnectTarget, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, str(ENTRY), "db", *arguments),
        cwd=directory,
        env=environment(DATABASE_URL=target.libpq_url()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def killed_at(directory: Path, target: ConnectTarget, number: int, *arguments: str) -> None:
    """Run a command of ours and kill it as its migration reaches its so manieth command; wait until all is settled."""
    watch = await asyncpg.connect(**target.connect_kwargs())
    await watch.execute("SELECT pg_advisory_lock($1)", STOP)
    await watch.execute(TRAP)
    await watch.execute("INSERT INTO trap.at VALUES ($1)", number)
    process = await command(directory, target, *arguments)
    async with asyncio.timeout(PATIENCE):
        while not await watch.fetchval(WAITING):
            assert process.returncode is None, (await process.communicate())[0].decode()
            await watch.execute("SELECT pg_sleep(0.01)")
        process.kill()
        await process.communicate()
        await watch.execute("SELECT pg_advisory_unlock($1)", STOP)
        while await watch.fetchval(OTHERS):  # the server notices when it next writes to the dead
            await watch.execute("SELECT pg_sleep(0.01)")
    await watch.execute(UNTRAP)
    await watch.close()


async def is_at_one_revision(
    target: ConnectTarget, empty_target: ConnectTarget, made: dict[str | None, dict[str, str]]
) -> str | None:
    if not made:
        made[None] = {}
        for revision in KNOWN:
            await migrations.upgrade(empty_target, revision)
            made[revision] = await schema_catalog.read(empty_target)
    at = await migrations.current(target)
    assert await schema_catalog.read(target) == made[at]
    return at


def points(kind: str, count: int) -> list[int]:
    return sorted(random.Random(f"{SEED} {kind}").sample(range(1, COMMANDS + 1), count))


async def goes_on(directory: Path, target: ConnectTarget) -> None:
    process = await command(directory, target, "upgrade")
    async with asyncio.timeout(PATIENCE):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    assert await migrations.current(target) == HEAD
    assert await migrations.check_drift(target) == []
    assert await switch.is_off(target) is None


@pytest.mark.parametrize("number", points("upgrade", 5))
async def test_an_upgrade_that_is_killed(
    tmp_path: Path, target: ConnectTarget, empty_target: ConnectTarget, made: dict[str | None, dict[str, str]],
    number: int,
) -> None:  # fmt: skip
    await migrations.downgrade(target, "base")
    await killed_at(tmp_path, target, number, "upgrade")
    assert await is_at_one_revision(target, empty_target, made) != HEAD
    await goes_on(tmp_path, target)


@pytest.mark.parametrize("number", points("downgrade", 5))
async def test_a_downgrade_that_is_killed(
    tmp_path: Path, target: ConnectTarget, empty_target: ConnectTarget, made: dict[str | None, dict[str, str]],
    number: int,
) -> None:  # fmt: skip
    arguments = ("downgrade", "base", "--no-backup", "--yes-destroy", str(target.database))
    await killed_at(tmp_path, target, number, *arguments)
    assert await is_at_one_revision(target, empty_target, made) is not None
    if number > 1:
        assert await switch.is_off(target) is not None  # or the next start would undo half of it
    await goes_on(tmp_path, target)

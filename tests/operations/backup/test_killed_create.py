"""A backup that is killed is complete or does not exist, and the next one cleans up after it."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bot.running import run_cli
from tests.conftest import IS_EXHAUSTIVE
from tests.forkserver import ROOT, start_bot
from tests.operations.backup.helpers import (
    execute,
    fill,
    make_backup,
    make_service,
    scratch_schema_names,
    table_checksums,
    until_query,
)
from utils.database import ConnectTarget, Pool
from utils.operations.backup.archive.manifest import MANIFEST_SUFFIX
from utils.operations.backup.service import BackupService
from utils.operations.backup.store import UNFINISHED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

#: Number of kills of a restore's safety backup.
SAFETY_KILLS = 4 if IS_EXHAUSTIVE else 2
#: Rows that take pg_dump a few tenths of a second.
MORE = (
    "INSERT INTO users (id, username, avatar) SELECT n, 'u' || n, md5(n::text) FROM generate_series(4000, 90000) AS n"
)
NO_DUMP = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'pg_dump' AND datname = $1)"


async def run_and_kill(
    *arguments: str, has_begun: Callable[[], bool], after: float | None, **variables: str
) -> tuple[int, float]:
    """Run a command, kill it `after` seconds from when `has_begun`, and return its exit code and how long it ran.

    It is not killed if `after` is None.
    """
    process = await start_bot(ROOT, *arguments, settings=variables)
    ended = asyncio.ensure_future(process.wait())
    try:
        async with asyncio.timeout(60):
            while not has_begun() and not ended.done():  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.002)
            started = time.monotonic()
            await asyncio.wait({ended}, timeout=after)
            if not ended.done():
                process.kill()
            return await ended, time.monotonic() - started
    finally:
        if process.returncode is None:
            process.kill()


async def verify_all(service: BackupService, known: set[str]) -> set[str]:
    """Verify every backup, check that the known ones still exist, and return the ids of the new ones."""
    entries = await service.catalog.entries()
    for entry in entries:
        assert entry.problem is None, entry.problem
        assert (await service.verify(entry.id)).ok
    ids = {entry.id for entry in entries}
    assert known <= ids
    return ids - known


def hidden_files(service: BackupService) -> list[str]:
    return sorted(path.name for path in service.catalog.local.path.glob(".*") if path.name != ".lock")


@pytest.mark.parametrize(
    ("kills", "is_encrypted"),
    [
        pytest.param(3, False, id="plain"),
        pytest.param(2, True, id="encrypted"),
        pytest.param(30, False, id="plain-many", marks=pytest.mark.exhaustive),
        pytest.param(15, True, id="encrypted-many", marks=pytest.mark.exhaustive),
    ],
)
async def test_a_killed_backup_is_complete_or_absent(
    tmp_path: Path, database: Pool, database_url: str, kills: int, is_encrypted: bool
) -> None:
    rng = random.Random(19 + is_encrypted)
    await fill(database)
    await database.execute(MORE)
    service, lock = make_service(tmp_path), tmp_path / "backups" / ".lock"
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path)}
    if is_encrypted:
        pyrage = pytest.importorskip("pyrage")
        recipient = str(pyrage.x25519.Identity.generate().to_public())
        variables |= {"BACKUP_AGE_RECIPIENT": recipient, "DRILL_EVERY": "1d"}
    code, seconds = await run_and_kill("backup", "create", has_begun=lock.exists, after=None, **variables)
    assert code == 0
    ids = await verify_all(service, set())
    assert len(ids) == 1
    new_backups, unfinished = [], 0

    def is_unfinished() -> bool:
        return any(name.startswith(UNFINISHED) for name in hidden_files(service))

    for number in range(kills):
        lock.unlink()
        # The first kill hits a backup that is being written, the others any part of the time measured.
        has_begun, after = (lock.exists, rng.uniform(0, seconds)) if number else (is_unfinished, 0.0)
        code, _ = await run_and_kill("backup", "create", has_begun=has_begun, after=after, **variables)
        assert code in (0, -signal.SIGKILL)
        unfinished += is_unfinished()
        await until_query(database.target, NO_DUMP, database.target.database)  # its pg_dump ends with it
        new = await verify_all(service, ids)
        new_backups.append(len(new))
        ids |= new
    assert set(new_backups) <= {0, 1}
    assert unfinished, "no kill hit a backup while it was written, so this run shows nothing"
    code, output = await run_cli(tmp_path, "backup", "create", **variables)
    assert code == 0, output
    new = await verify_all(service, ids)
    assert len(new) == 1
    assert hidden_files(service) == ([f".plain-{new.pop()}"] if is_encrypted else [])


async def test_a_restore_killed_while_it_backs_up(
    tmp_path: Path, database: Pool, database_url: str, target: ConnectTarget
) -> None:
    rng = random.Random(23)
    await fill(database)
    await database.execute(MORE)
    service = make_service(tmp_path)
    first = await make_backup(service, database)
    new = await table_checksums(target)
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path)}
    command = ("backup", "restore", first.id, "--yes")

    def is_backing_up() -> bool:
        return any(name.startswith(UNFINISHED) for name in hidden_files(service))

    await database.execute("UPDATE members SET nick = 'since'")
    await database.close()
    code, seconds = await run_and_kill(*command, has_begun=is_backing_up, after=None, **variables)
    assert code == 0
    assert await table_checksums(target) == new
    ids = {first.id} | await verify_all(service, {first.id})
    for number in range(SAFETY_KILLS):
        await execute(target, f"INSERT INTO guilds (id, name) VALUES ({1_000 + number}, 'since')")  # noqa: S608
        old = await table_checksums(target)
        for name in hidden_files(service):
            (service.catalog.local.path / name).unlink()  # so that `is_backing_up` is about this run
        # The backup is the first part of the time measured; the last kill may hit any part.
        after = rng.uniform(0, seconds / (3 if number < SAFETY_KILLS - 1 else 1))
        code, _ = await run_and_kill(*command, has_begun=is_backing_up, after=after, **variables)
        assert code in (0, -signal.SIGKILL)
        assert await table_checksums(target) in (old, new)
        ids |= await verify_all(service, ids)
    code, output = await run_cli(tmp_path, *command, **variables)
    assert code == 0, output
    assert await table_checksums(target) == new
    assert hidden_files(service) == []
    assert await scratch_schema_names(target) == []
    assert all((service.catalog.local.path / f"{id}{MANIFEST_SUFFIX}").exists() for id in ids)

"""A `kill -9` while a backup is made leaves a whole one or none, and the next one cleans up after it."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bot.running import run_cli
from tests.operations.backup.making import filled, vault_in
from tests.operations.backup.restoring import cleaned, sums, until_true
from utils.database import ConnectTarget, Pool
from utils.demo.bot_process import ENTRY, environment
from utils.operations.backup import scratch
from utils.operations.backup.manifest import SUFFIX
from utils.operations.backup.service import BackupService
from utils.operations.backup.store import UNFINISHED

pytestmark = pytest.mark.slow

#: Kills of a backup in the clear, of an encrypted one, and of the backup that a restore makes before.
PLAIN, ENCRYPTED, SAFETY = 10, 5, 6
#: Rows that take pg_dump a few tenths of a second.
MORE = (
    "INSERT INTO users (id, username, avatar) SELECT n, 'u' || n, md5(n::text) FROM generate_series(4000, 90000) AS n"
)
NO_DUMP = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'pg_dump' AND datname = $1)"


async def killed(
    *arguments: str, begun: Callable[[], bool], after: float | None, **variables: str
) -> tuple[int, float]:
    """Type a command, kill it so many seconds after it has begun, and return its exit code and how long it took then.

    `after`: None does not kill it.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ENTRY), *arguments, env=environment(**variables), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    ended = asyncio.ensure_future(process.wait())
    try:
        async with asyncio.timeout(60):
            while not begun() and not ended.done():  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.002)
            started = time.monotonic()
            await asyncio.wait({ended}, timeout=after)
            if not ended.done():
                process.kill()
            return await ended, time.monotonic() - started
    finally:
        if process.returncode is None:
            process.kill()


async def is_whole_or_none(vault: BackupService, before: set[str]) -> set[str]:
    """Verify every backup that there is, and return the ids that are new."""
    entries = await vault.known()
    for entry in entries:
        assert entry.problem is None, entry.problem
        assert (await vault.verify(entry.id)).ok
    ids = {entry.id for entry in entries}
    assert before <= ids
    return ids - before


def hidden(vault: BackupService) -> list[str]:
    """Return what lies among the backups under a name that no store lists."""
    return sorted(path.name for path in vault.local.path.glob(".*") if path.name != ".lock")


@pytest.mark.parametrize(("kills", "is_sealed"), [(PLAIN, False), (ENCRYPTED, True)], ids=["plain", "encrypted"])
async def test_a_whole_backup_or_none_is_there_wherever_it_is_killed(
    tmp_path: Path, database: Pool, database_url: str, kills: int, is_sealed: bool
) -> None:
    dice = random.Random(19 + is_sealed)
    await filled(database)
    await database.execute(MORE)
    vault, lock = vault_in(tmp_path), tmp_path / "backups" / ".lock"
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path)}
    if is_sealed:
        pyrage = pytest.importorskip("pyrage")
        recipient = str(pyrage.x25519.Identity.generate().to_public())
        variables |= {"BACKUP_AGE_RECIPIENT": recipient, "DRILL_EVERY": "1d"}
    code, seconds = await killed("backup", "create", begun=lock.exists, after=None, **variables)
    assert code == 0
    ids = await is_whole_or_none(vault, set())
    assert len(ids) == 1
    came, left = [], 0
    for _ in range(kills):
        lock.unlink()
        after = dice.uniform(0, seconds)
        code, _ = await killed("backup", "create", begun=lock.exists, after=after, **variables)
        assert code in (0, -signal.SIGKILL)
        left += any(name.startswith(UNFINISHED) for name in hidden(vault))
        await until_true(database.target, NO_DUMP, database.target.database)  # what it had started ends with it
        new = await is_whole_or_none(vault, ids)
        came.append(len(new))
        ids |= new
    assert set(came) <= {0, 1}
    assert left, "none was killed while it was at work: then this test shows nothing"
    code, output = await run_cli(tmp_path, "backup", "create", **variables)
    assert code == 0, output
    new = await is_whole_or_none(vault, ids)
    assert len(new) == 1
    assert hidden(vault) == ([f".plain-{new.pop()}"] if is_sealed else [])


async def test_a_restore_killed_while_it_saves_leaves_the_old_database_or_the_new_one(
    tmp_path: Path, database: Pool, database_url: str, target: ConnectTarget
) -> None:
    dice = random.Random(23)
    await filled(database)
    await database.execute(MORE)
    vault = vault_in(tmp_path)
    await vault.create(database)
    new = await sums(target)
    [first] = await vault.known()
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path)}
    command = ("backup", "restore", first.id, "--yes")

    def saving() -> bool:
        return any(name.startswith(UNFINISHED) for name in hidden(vault))

    async with cleaned(target):
        await database.execute("UPDATE members SET nick = 'since'")
        await database.close()
        code, seconds = await killed(*command, begun=saving, after=None, **variables)
        assert code == 0
        assert await sums(target) == new
        ids = {first.id} | await is_whole_or_none(vault, {first.id})
        for number in range(SAFETY):
            await said(target, number)
            old = await sums(target)
            for name in hidden(vault):
                (vault.local.path / name).unlink()  # so that `saving` tells of this one
            # The backup is the first part of what comes after its file was made; all of it ends with the new database.
            after = dice.uniform(0, seconds / (3 if number < SAFETY - 1 else 1))
            code, _ = await killed(*command, begun=saving, after=after, **variables)
            assert code in (0, -signal.SIGKILL)
            assert await sums(target) in (old, new)
            ids |= await is_whole_or_none(vault, ids)
        code, output = await run_cli(tmp_path, *command, **variables)
        assert code == 0, output
        assert await sums(target) == new
        assert hidden(vault) == []
        async with scratch.connected(await scratch.home(target, str(target.database))) as connection:
            assert await scratch.there(connection, str(target.database), scratch.RESTORE) == []
    assert all((vault.local.path / f"{id}{SUFFIX}").exists() for id in ids)


async def said(target: ConnectTarget, number: int) -> None:
    """Make the live database unlike any other."""
    async with scratch.connected(target) as connection:
        await connection.execute("INSERT INTO guilds (id, name) VALUES ($1, 'since')", 1_000 + number)

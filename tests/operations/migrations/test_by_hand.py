"""A backup of an older revision, restored with the lines of docs/how-to/migrations.md: the next upgrade goes on."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncpg
import pytest

from tests.docs.blocks import ROOT, blocks_of
from tests.operations.backup.helpers import fill, make_service
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.bot_process import ENTRY, environment
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.backup.archive.manifest import Manifest

pytestmark = [pytest.mark.slow, pytest.mark.direct("pg_dump needs a direct connection")]

REVISION = "0003"
PAGE = ROOT / "docs" / "how-to" / "migrations.md"


async def make_older_backup(directory: Path, target: ConnectTarget) -> Manifest:
    """Return a backup, made at `REVISION`, of a database that is then upgraded."""
    await migrations.upgrade(target, REVISION)
    pool = Pool(target)
    await pool.connect()
    try:
        await fill(pool)
        service = make_service(directory / "data")
        manifest = Manifest(**(await service.create(pool)).data)
        await migrations.upgrade(pool)
    finally:
        await pool.close()
    return manifest


async def run_lines(directory: Path, server: EmbeddedServer, target: ConnectTarget, id: str, lines: str) -> str:
    """Run lines of the page in bash; return what they print."""
    variables = environment(DATABASE_URL=target.libpq_url(), BACKUP=f"data/backups/{id}", DATA_DIR="data")
    variables["PATH"] = f"{server.bin_dir}:{variables['PATH']}"
    lines = lines.replace("python bot.py", f"{sys.executable} {ENTRY}").replace("guildbook\n", f"{target.database}\n")
    process = await asyncio.create_subprocess_exec(
        "bash", "-ec", lines, cwd=directory, env=variables, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(100):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output


async def rows_of(target: ConnectTarget) -> tuple[int, int, int]:
    connection = await asyncpg.connect(**target.connect_kwargs())
    try:
        row = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM guilds), (SELECT count(*) FROM members), (SELECT count(*) FROM documents)"
        )
    finally:
        await connection.close()
    assert row is not None
    return row[0], row[1], row[2]


def documented_lines() -> str:
    return next(block.text for block in blocks_of(PAGE) if "pg_restore" in block.text)


async def test_the_documented_lines_restore_an_older_backup(
    tmp_path: Path, server: EmbeddedServer, empty_target: ConnectTarget
) -> None:
    manifest = await make_older_backup(tmp_path, empty_target)
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    await connection.execute("DELETE FROM members; UPDATE guilds SET name = 'lost'; DELETE FROM documents")
    await connection.close()
    output = await run_lines(tmp_path, server, empty_target, manifest.id, documented_lines())
    assert "backup made before: " in output
    assert output.splitlines()[-1].startswith("applied: 0004, ")
    assert await rows_of(empty_target) == (20, 3_000, 1)
    assert await migrations.check_drift(empty_target) == []
    assert await migrations.find_pause(empty_target) is None


async def test_into_an_empty_database(
    tmp_path: Path, server: EmbeddedServer, empty_target: ConnectTarget, target: ConnectTarget
) -> None:
    manifest = await make_older_backup(tmp_path, empty_target)
    await migrations.downgrade(target, "base")
    connection = await asyncpg.connect(**target.connect_kwargs())
    await connection.execute("DROP TABLE guildbook_version")
    await connection.close()
    lines = documented_lines().replace("DROP TABLE guildbook_version; ", "").split("\n", 1)[1]
    await run_lines(tmp_path, server, target, manifest.id, lines)
    assert await rows_of(target) == (20, 3_000, 1)
    assert await migrations.check_drift(target) == []


async def test_tables_of_newer_revisions_beside_older_ones_are_named_with_what_to_drop(
    empty_target: ConnectTarget,
) -> None:
    await migrations.upgrade(empty_target, REVISION)
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    await connection.execute("CREATE TABLE ops.table_sizes (at timestamptz)")
    names = "ops.table_sizes"
    with pytest.raises(MigrationError, match=f"has tables that later revisions create: {names}") as caught:
        await migrations.upgrade(empty_target)
    assert await migrations.current(empty_target) == REVISION
    assert f"(DROP TABLE {names}), and try again" in str(caught.value)
    await connection.execute(f"DROP TABLE {names}")
    await connection.close()
    await migrations.upgrade(empty_target)
    assert await migrations.check_drift(empty_target) == []

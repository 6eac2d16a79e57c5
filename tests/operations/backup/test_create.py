"""A backup is made: whole, of one moment, and nothing is left of one that failed."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bot.running import run_cli
from tests.operations.backup.making import filled, vault_in
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError
from utils.operations.action import Step
from utils.operations.backup import create, pipeline, tools
from utils.operations.backup.create import Wanted
from utils.operations.backup.manifest import unpacked


def files(directory: Path) -> list[str]:
    """Return what lies among the backups, hidden files too."""
    return sorted(path.name for path in (directory / "backups").iterdir() if path.name != ".lock")


async def test_a_backup_counts_every_row_and_says_what_it_is(tmp_path: Path, database: Pool) -> None:
    await filled(database)
    vault = vault_in(tmp_path)
    steps: list[Step] = []
    outcome = await vault.create(database, progress=steps.append)
    manifest = (await vault.find("latest")).manifest
    assert manifest is not None
    assert files(tmp_path) == [manifest.file, f"{manifest.id}.json"]
    assert manifest.rows["public.members"] == manifest.rows["public.users"] == 3_000
    assert manifest.rows["ops.suppressions"] == 1
    assert (manifest.kind, manifest.reason, manifest.revision) == ("full", "manual", await revision(database))
    assert manifest.major == database.server_version_num // 10_000
    assert manifest.size == manifest.plain_size == (tmp_path / "backups" / manifest.file).stat().st_size
    assert manifest.line in outcome.text
    assert json.loads(json.dumps(outcome.data))["sha256"] == manifest.sha256


async def revision(database: Pool) -> str:
    return str(await database.fetchval("SELECT version_num FROM alembic_version"))


async def test_only_its_owner_can_read_a_backup(tmp_path: Path, database: Pool) -> None:
    await vault_in(tmp_path).create(database)
    assert stat.S_IMODE((tmp_path / "backups").stat().st_mode) == 0o700
    modes = {stat.S_IMODE((tmp_path / "backups" / name).stat().st_mode) for name in files(tmp_path)}
    assert modes == {0o600}


async def test_rows_and_counts_are_of_one_moment(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(database)
    counted = create._counted

    async def later(connection: Any, tables: Any) -> dict[str, int]:
        await database.execute("DELETE FROM members WHERE user_id > 10")  # after the snapshot, before the counts
        return await counted(connection, tables)

    monkeypatch.setattr(create, "_counted", later)
    vault = vault_in(tmp_path)
    await vault.create(database)
    manifest = (await vault.find("latest")).manifest
    assert manifest is not None
    assert manifest.rows["public.members"] == 3_000
    assert await database.fetchval("SELECT count(*) FROM members") == 10
    assert (await vault.drill(database)).ok, "and so many come back"


async def test_some_tables_and_the_bare_schema_are_marked_as_such(tmp_path: Path, database: Pool) -> None:
    await filled(database)
    vault = vault_in(tmp_path)
    await vault.create(database, tables=["members", "public.changes"])
    await vault.create(database, schema_only=True)
    kinds = {entry.manifest.kind: entry.manifest for entry in await vault.known() if entry.manifest}
    assert kinds["tables"].rows == {"public.members": 3_000, "public.changes": 0}
    assert kinds["schema"].rows == {}
    with pytest.raises(BackupError, match="there is no full backup"):
        await vault.find("latest")
    with pytest.raises(BackupError, match=r"there is no table public\.memebrs; there is .*members"):
        await vault.create(database, tables=["memebrs"])


async def test_nothing_is_left_of_a_backup_that_was_called_off(tmp_path: Path, database: Pool) -> None:
    vault = vault_in(tmp_path)
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")  # pg_dump waits for it
        making = asyncio.create_task(vault.create(database))
        await until_waiting(database, 1)
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        await until_waiting(database, 0)
    assert files(tmp_path) == []


async def until_waiting(database: Pool, number: int) -> None:
    """Wait until so many of pg_dump's sessions wait for a lock."""
    async with asyncio.timeout(20):
        while number != await database.fetchval(  # noqa: ASYNC110 - it is another process
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pg_dump'"
            " AND wait_event_type = 'Lock'"
        ):
            await asyncio.sleep(0.01)


async def test_a_table_that_stays_locked_is_told_and_nothing_is_left(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "LOCK_SECONDS", 1)
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")
        with pytest.raises(BackupError, match="stayed locked by somebody else for 1 s"):
            await vault_in(tmp_path).make(database, Wanted(tables=("guilds",), schema_only=True))
    assert files(tmp_path) == []


async def test_what_a_killed_process_left_is_swept_away_but_not_what_another_makes(
    tmp_path: Path, database: Pool
) -> None:
    vault = vault_in(tmp_path)
    await vault.create(database)
    left = tmp_path / "backups" / ".unfinished-1-dead.dump"
    left.write_bytes(b"half")
    with vault.local.unfinished("mine") as mine:
        mine.write_bytes(b"in the making")
        await vault.create(database)
        assert mine.exists()
        assert left.exists(), "while somebody is at work, nobody can tell whose it is"
    await vault.create(database)
    assert not left.exists()


async def test_a_server_that_no_tools_fit_is_told_what_to_install() -> None:
    with pytest.raises(BackupError, match=r"the server is PostgreSQL 99.*postgresql-client-99"):
        await tools.found(99)


async def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(out: Any, part: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "_write", full)
    with pytest.raises(BackupError, match="No space left"):
        await vault_in(tmp_path).create(database)
    assert files(tmp_path) == []


async def test_the_password_stands_in_no_process_list(database: Pool, empty_target: ConnectTarget) -> None:
    target = replace(empty_target, password="hush-5up3r")
    command = create._dump(Path("/bin"), target, "snap", [], Wanted())
    assert "hush-5up3r" not in " ".join(command.arguments)
    assert command.environment["PGPASSWORD"] == "hush-5up3r"


async def test_the_command_line_makes_lists_and_verifies(tmp_path: Path, database: Pool, database_url: str) -> None:
    await filled(database)
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path / "data")}
    code, output = await run_cli(tmp_path, "backup", "create", "--json", **variables)
    assert code == 0
    made = json.loads(output)
    path = tmp_path / "data" / "backups" / f"{made['id']}.json"
    assert unpacked(path.read_bytes(), path.name).rows == made["rows"]
    code, output = await run_cli(tmp_path, "backup", "list", **variables)
    assert (code, made["id"] in output) == (0, True)
    assert (await run_cli(tmp_path, "backup", "verify", **variables))[0] == 0
    os.truncate(tmp_path / "data" / "backups" / made["file"], 1_000)
    code, output = await run_cli(tmp_path, "backup", "verify", **variables)
    assert (code, "has 1,000 bytes, the manifest says" in output) == (1, True)
    commands = await database.fetch("SELECT command, result FROM ops.admin_actions ORDER BY id")
    assert [row["command"] for row in commands] == ["backup create", "backup list", "backup verify", "backup verify"]
    assert commands[-1]["result"].startswith("Failed: ")

"""A backup is complete and consistent, and a failed one leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from tests.bot.running import run_cli
from tests.operations.backup.helpers import fill, make_backup, make_service
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError, ClientToolsMissing, DatabaseError
from utils.operations.action import Step
from utils.operations.backup import create
from utils.operations.backup.archive import client_tools, pipeline
from utils.operations.backup.archive.manifest import checksum_of, parse_manifest
from utils.operations.backup.archive.pipeline import Command
from utils.operations.backup.create import BackupRequest
from utils.service import application

#: Timeouts that a server may set and that a backup of an hour would exceed.
TIMEOUTS = ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout")
_SESSIONS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND (application_name = 'pg_dump' OR query LIKE '%count(*) FROM public%')
"""
_WAITING_DUMPS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'pg_dump' AND wait_event_type = 'Lock'
"""


def backup_files(directory: Path) -> list[str]:
    """Return the names of all files among the backups, hidden ones included."""
    return sorted(path.name for path in (directory / "backups").iterdir() if path.name != ".lock")


async def until_no_sessions(pool: Pool) -> None:
    """Wait until no session of a backup is left."""
    await until(lambda: pool.fetchval(f"SELECT ({_SESSIONS}) = 0"))


async def until_dumps_waiting(pool: Pool, number: int) -> None:
    """Wait until so many sessions of pg_dump wait for a lock."""
    await until(lambda: pool.fetchval(f"SELECT ({_WAITING_DUMPS}) = $1", number))


async def test_counts_every_row_and_describes_itself(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    service = make_service(tmp_path)
    steps: list[Step] = []
    outcome = await service.create(database, progress=steps.append)
    manifest = (await service.catalog.find("latest")).manifest
    assert manifest is not None
    assert backup_files(tmp_path) == [manifest.file, f"{manifest.id}.json"]
    assert manifest.rows["public.members"] == manifest.rows["public.users"] == 3_000
    assert manifest.rows["ops.suppressions"] == 1
    revision = await database.fetchval("SELECT version_num FROM guildbook_version")
    assert (manifest.kind, manifest.reason, manifest.revision) == ("full", "manual", revision)
    assert manifest.major == database.server_version_num // 10_000
    assert manifest.size == manifest.plain_size == (tmp_path / "backups" / manifest.file).stat().st_size
    assert manifest.line in outcome.text
    assert json.loads(json.dumps(outcome.data))["sha256"] == manifest.sha256


async def test_records_what_it_is_a_backup_of(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    before = await make_backup(service, database)
    await application.claim(database, 123)
    after = await make_backup(service, database)
    assert (before.application_id, after.application_id) == (None, 123)
    assert (after.host, after.database) == (database.target.location, database.target.database)


def test_a_backup_that_does_not_say_what_it_is_of_can_be_read() -> None:
    old = {"id": "20260102T030405Z-abcdef", "file": "20260102T030405Z-abcdef.dump", "rows": {"public.guilds": 1},
           "created_at": "2026-01-02T03:04:05+00:00", "kind": "full", "reason": "manual", "size": 1, "sha256": "0",
           "plain_size": 1, "plain_sha256": "0", "recipient": None, "database": "d", "server": "18", "tool": "18",
           "revision": "0001", "seconds": 1.0, "project": "guildbook", "format": 1}  # fmt: skip
    manifest = parse_manifest(orjson.dumps(old | {"seal": checksum_of(old)}), f"{old['id']}.json")
    assert (manifest.application_id, manifest.host, manifest.total_rows) == (None, None, 1)


async def test_only_the_owner_can_read_a_backup(tmp_path: Path, database: Pool) -> None:
    await make_backup(make_service(tmp_path), database)
    assert stat.S_IMODE((tmp_path / "backups").stat().st_mode) == 0o700
    modes = {stat.S_IMODE((tmp_path / "backups" / name).stat().st_mode) for name in backup_files(tmp_path)}
    assert modes == {0o600}


async def test_marks_partial_backups(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    service = make_service(tmp_path)
    await service.create(database, tables=["members", "public.changes"])
    await service.create(database, schema_only=True)
    kinds = {entry.manifest.kind: entry.manifest for entry in await service.catalog.entries() if entry.manifest}
    assert kinds["tables"].rows == {"public.members": 3_000, "public.changes": 0}
    assert kinds["schema"].rows == {}
    with pytest.raises(BackupError, match="there is no full backup"):
        await service.catalog.find("latest")
    with pytest.raises(BackupError, match=r"there is no table public\.memebrs: choose from .*members"):
        await service.create(database, tables=["memebrs"])


# --- the snapshot


async def test_rows_and_counts_are_of_one_snapshot(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(database)
    count_rows = create._count_rows

    async def delete_then_count(connection: Any, tables: Any) -> dict[str, int]:
        await database.execute("DELETE FROM members WHERE user_id > 10")  # after the snapshot, before the counts
        return await count_rows(connection, tables)

    monkeypatch.setattr(create, "_count_rows", delete_then_count)
    service = make_service(tmp_path)
    backup = await make_backup(service, database)
    assert backup.rows["public.members"] == 3_000
    assert await database.fetchval("SELECT count(*) FROM members") == 10
    assert (await service.drill(database)).ok


@pytest.mark.parametrize("timeout", TIMEOUTS)
async def test_server_timeouts_do_not_interrupt_it(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch, timeout: str
) -> None:
    if not await database.fetchval("SELECT count(*) FROM pg_settings WHERE name = $1", timeout):
        pytest.skip(f"this server has no {timeout}")
    await fill(database)
    await database.execute(
        await database.fetchval(
            "SELECT format('ALTER DATABASE %I SET %I = ''300ms''', current_database(), $1::text)", timeout
        )
    )
    count_rows = create._count_rows

    async def count_slowly(connection: Any, tables: Any) -> dict[str, int]:
        if timeout == "idle_in_transaction_session_timeout":
            await asyncio.sleep(0.5)  # must be idle
        else:
            await connection.execute("SELECT pg_sleep(0.5)")
        return await count_rows(connection, tables)

    monkeypatch.setattr(create, "_count_rows", count_slowly)
    assert (await make_backup(make_service(tmp_path), database)).rows["public.members"] == 3_000


# --- failures leave nothing behind


async def test_a_cancelled_backup_leaves_nothing(tmp_path: Path, database: Pool) -> None:
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")  # pg_dump waits for it
        task = asyncio.create_task(make_backup(make_service(tmp_path), database))
        await until_dumps_waiting(database, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_dumps_waiting(database, 0)
    assert backup_files(tmp_path) == []


async def test_a_locked_table_is_named_with_its_holder(tmp_path: Path, database: Pool) -> None:
    request = BackupRequest(tables=("guilds",), schema_only=True)
    catalog = make_service(tmp_path).catalog
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")
        pid = await connection.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(BackupError, match=f"guilds is locked by process {pid}"):
            await create.create(database, catalog, request, lock_seconds=1)
    assert backup_files(tmp_path) == []


async def test_a_failed_pg_dump_stops_the_counting(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = asyncio.Event()

    async def never_end(connection: Any, tables: Any) -> dict[str, int]:
        try:
            await connection.execute("SELECT pg_sleep(3600) /* count(*) FROM public */", timeout=3_600)
        finally:
            stopped.set()
        raise AssertionError("unreachable within the test's timeout")

    failing = Command(["/bin/sh", "-c", "echo no room >&2; exit 3"], {})
    monkeypatch.setattr(create, "_count_rows", never_end)
    monkeypatch.setattr(create, "_dump_command", lambda *_, **__: failing)
    with pytest.raises(BackupError, match="sh failed: no room"):
        async with asyncio.timeout(20):
            await make_backup(make_service(tmp_path), database)
    assert stopped.is_set()
    await until_no_sessions(database)
    assert backup_files(tmp_path) == []


async def test_a_failed_count_stops_pg_dump(tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(connection: Any, tables: Any) -> dict[str, int]:
        await until(lambda: database.fetchval(_SESSIONS))
        raise asyncpg.DataCorruptedError("invalid page in block 7 of relation members")

    monkeypatch.setattr(create, "_count_rows", fail)
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")  # pg_dump waits for it
        with pytest.raises(DatabaseError, match="invalid page in block 7"):
            await make_backup(make_service(tmp_path), database)
        await until_no_sessions(database)
    assert backup_files(tmp_path) == []


async def test_a_full_disk_leaves_nothing(tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(out: Any, chunk: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "_write", fail)
    with pytest.raises(BackupError, match="No space left"):
        await make_backup(make_service(tmp_path), database)
    assert backup_files(tmp_path) == []


async def test_deletes_leftovers_but_no_file_being_written(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    await make_backup(service, database)
    leftover = tmp_path / "backups" / ".unfinished-1-dead.dump"
    leftover.write_bytes(b"half")
    with service.catalog.local.unfinished("mine") as mine:
        mine.write_bytes(b"being written")
        await make_backup(service, database)
        assert mine.exists()
        assert leftover.exists(), "it may belong to the process that is writing"
    await make_backup(service, database)
    assert not leftover.exists()


# --- pg_dump


async def test_missing_client_tools_say_what_to_install() -> None:
    with pytest.raises(ClientToolsMissing, match=r"the server is PostgreSQL 99.*postgresql-client-99"):
        await client_tools.find_directory(99)


async def test_the_password_is_not_an_argument(empty_target: ConnectTarget) -> None:
    target = replace(empty_target, password="hush-5up3r")
    command = create._dump_command(Path("/bin"), target, "snap", [], BackupRequest())
    assert "hush-5up3r" not in " ".join(command.arguments)
    assert command.environment["PGPASSWORD"] == "hush-5up3r"


def test_pg_dump_cannot_be_led_to_another_server(empty_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PGPASSFILE", "/p"), ("PGSSLROOTCERT", "/r"), ("PGHOSTADDR", "1.2.3.4"), ("PGSERVICE", "x")):
        monkeypatch.setenv(name, value)
    command = create._dump_command(Path("/bin"), empty_target, "snap", [], BackupRequest())
    assert {"PGPASSFILE", "PGSSLROOTCERT", "PGOPTIONS"} <= command.environment.keys()
    assert not {"PGHOSTADDR", "PGSERVICE"} & command.environment.keys()


def test_postgresql_13_gets_no_client_check(empty_target: ConnectTarget) -> None:
    command = create._dump_command(Path("/bin"), empty_target, "snap", [], BackupRequest(), checks_client=False)
    assert "PGOPTIONS" not in command.environment


# --- the command line


async def test_command_line_creates_lists_and_verifies(tmp_path: Path, database: Pool, database_url: str) -> None:
    await fill(database)
    variables = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path / "data")}
    code, output = await run_cli(tmp_path, "backup", "create", "--json", **variables)
    assert code == 0
    backup = json.loads(output)
    path = tmp_path / "data" / "backups" / f"{backup['id']}.json"
    assert parse_manifest(path.read_bytes(), path.name).rows == backup["rows"]
    code, output = await run_cli(tmp_path, "backup", "list", **variables)
    assert (code, backup["id"] in output) == (0, True)
    assert (await run_cli(tmp_path, "backup", "verify", **variables))[0] == 0
    os.truncate(tmp_path / "data" / "backups" / backup["file"], 1_000)
    code, output = await run_cli(tmp_path, "backup", "verify", **variables)
    assert (code, "has 1,000 bytes, expected" in output) == (1, True)
    actions = await database.fetch("SELECT command FROM ops.admin_actions ORDER BY id")
    assert [row["command"] for row in actions] == ["backup create"], "the others need no database"

"""A backup is restored as it was made, or everything stays as it is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    connect,
    dropping_scratch_databases,
    dump,
    execute,
    fill,
    make_backup,
    make_service,
    open_pool,
    run_backup_command,
    scratch_schema_names,
    table_checksums,
)
from tests.operations.migrations.support import KNOWN
from tests.waiting import until
from utils.cli import backup as cli
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.database.placement import Placement
from utils.exceptions import BackupError, ValidationError
from utils.operations import migrations
from utils.operations.action import Step
from utils.operations.backup.archive.script import Archive, SequenceState
from utils.operations.backup.restore import drill
from utils.operations.backup.restore.restore import restore_archive
from utils.operations.backup.scratch import load, schemas
from utils.operations.backup.scratch.tables import open_scratch_tables
from utils.operations.backup.service import BackupService
from utils.operations.development import seed
from utils.operations.migrations import admin
from utils.settings import Settings

pytestmark = pytest.mark.slow


async def no_safety_backup() -> tuple[None, str]:
    return None, "There was nothing to back up."


@pytest.fixture
async def archive(tmp_path: Path, server: EmbeddedServer, database: Pool) -> Archive:
    """A dump of two guilds, and a live database that has changed since."""
    await seed.seed(database, guilds=2, members=120, seed=3)
    made = await dump(server, database.target, tmp_path / "it's a dump")
    await add_guild(database)
    return made


async def add_guild(pool: Pool) -> None:
    await seed.seed(pool, guilds=1, members=30, seed=4, more=True)
    await execute(pool.target, "INSERT INTO ops.suppressions (user_id) VALUES (9)")


async def test_restores_rows_and_keeps_ops(database: Pool, archive: Archive) -> None:
    first = await restore_archive(database, archive, safety_backup=no_safety_backup)
    assert first.ok, first.text
    assert await database.fetchval("SELECT count(*) FROM guilds") == 2
    assert await database.fetchval("SELECT user_id FROM ops.suppressions") == 9
    assert await database.fetchval("SELECT count(*) FROM pg_stats WHERE tablename = 'members'") > 0
    assert first.data["deleted"] > 30
    assert await scratch_schema_names(database.target) == []
    second = await restore_archive(database, archive, safety_backup=no_safety_backup)
    assert [second.data[name] for name in ("deleted", "changed", "added")] == [0, 0, 0], "only what differs is written"


async def test_ends_a_pause_of_auto_migrate(database: Pool, archive: Archive) -> None:
    await migrations.pause_auto_migrate(database, migrations.known_revisions()[-1].id)
    await restore_archive(database, archive, safety_backup=no_safety_backup)
    assert await migrations.find_pause(database) is None


async def test_restored_rows_have_the_same_checksums(tmp_path: Path, server: EmbeddedServer, database: Pool) -> None:
    await seed.seed(database, guilds=2, members=50)
    expected = await table_checksums(database.target)
    made = await dump(server, database.target, tmp_path / "dump")
    await database.execute("DELETE FROM members")
    await restore_archive(database, made, safety_backup=no_safety_backup)
    assert await table_checksums(database.target) == expected
    assert await migrations.check_drift(database) == []


async def test_other_processes_drop_what_they_have_cached(database: Pool, archive: Archive) -> None:
    messages: list[str] = []
    async with connect(database.target) as connection:
        await connection.add_listener("guildbook_cache", lambda *message: messages.append(message[-1]))
        await restore_archive(database, archive, safety_backup=no_safety_backup)
        await until(lambda: any("public.members" in message for message in messages))


async def test_sequences_continue_after_the_restored_rows(
    tmp_path: Path, server: EmbeddedServer, database: Pool
) -> None:
    await database.execute("SELECT setval('ops.change_ids', 777)")
    service = make_service(tmp_path)
    await make_backup(service, database)
    archive_file = next((tmp_path / "backups").glob("*.dump"))
    archive = Archive("test", archive_file, server.bin_dir, database.now(), 18, None)
    states = await load.read_sequences(archive)
    assert states["ops", "change_ids"] == SequenceState(777, is_called=True)


async def test_reports_every_step(database: Pool, archive: Archive) -> None:
    steps: list[Step] = []
    await restore_archive(database, archive, safety_backup=no_safety_backup, progress=steps.append)
    texts = list(dict.fromkeys(step.text for step in steps))
    assert texts == ["restoring", "counting rows", "replacing rows"]
    assert max(step.done for step in steps if step.text == "restoring") > 5
    assert next(step for step in reversed(steps) if step.text == "counting rows").done == len(archive.counts)


async def test_migrates_an_older_backup(tmp_path: Path, server: EmbeddedServer, empty_target: ConnectTarget) -> None:
    revisions = await migrations.pending(empty_target)
    await migrations.upgrade(empty_target, revisions[0])
    await execute(empty_target, "INSERT INTO guilds (id, name) VALUES (1, 'old')")
    made = await dump(server, empty_target, tmp_path / "dump")
    await migrations.upgrade(empty_target)
    async with open_pool(empty_target) as pool:
        outcome = await restore_archive(pool, made, safety_backup=no_safety_backup)
        assert outcome.data["migrated"] == revisions[1:]
        assert await pool.fetchval("SELECT name FROM guilds") == "old"
        assert await migrations.pending(pool) == []
        assert await migrations.check_drift(pool) == []


@pytest.mark.parametrize("change", ["revision", "counts", "truncated", "no revision"])
async def test_refuses_an_archive_unlike_its_manifest(database: Pool, archive: Archive, change: str) -> None:
    before = await table_checksums(database.target)
    message = "was not restored as it was made"
    if change == "revision":
        archive, message = dataclasses.replace(archive, revision="9999"), "newer Guildbook"
    elif change == "no revision":
        archive, message = dataclasses.replace(archive, revision=None), "contains no tables"
    elif change == "counts":
        counts = {**archive.counts, ("public", "members"): archive.counts["public", "members"] + 1}
        archive = dataclasses.replace(archive, counts=counts)
    else:
        archive.file.write_bytes(archive.file.read_bytes()[: archive.file.stat().st_size // 2])
        message = "pg_restore (cannot|could not) read"
    with pytest.raises(BackupError, match=message):
        await restore_archive(database, archive, safety_backup=no_safety_backup)
    assert await table_checksums(database.target) == before
    assert await scratch_schema_names(database.target) == []


@pytest.mark.parametrize("phase", ["restoring", "counting rows", "replacing rows"])
async def test_a_cancelled_restore_leaves_nothing_behind(database: Pool, archive: Archive, phase: str) -> None:
    before = await table_checksums(database.target)
    reached = asyncio.Event()

    def progress(step: Step) -> None:
        if step.text == phase and step.done:
            reached.set()

    task = asyncio.create_task(restore_archive(database, archive, safety_backup=no_safety_backup, progress=progress))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await table_checksums(database.target) == before
    assert await scratch_schema_names(database.target) == []


async def test_refuses_a_pooler(database: Pool, archive: Archive) -> None:
    database.direct = dataclasses.replace(database.target, pooled=True)
    with pytest.raises(BackupError, match="DATABASE_UNPOOLED_URL"):
        await restore_archive(database, archive, safety_backup=no_safety_backup)


async def test_a_failure_after_the_swap_is_reported(database: Pool, archive: Archive) -> None:
    async def after() -> None:
        raise BackupError("the guilds cannot be fetched")

    outcome = await restore_archive(database, archive, safety_backup=no_safety_backup, after=after)
    assert not outcome.ok
    assert "the guilds cannot be fetched" in outcome.text
    assert await database.fetchval("SELECT count(*) FROM guilds") == 2


async def test_drops_what_a_killed_restore_left(database: Pool, archive: Archive) -> None:
    leftover, foreign = f"{schemas.PREFIX}20200101_000000_abcd", f"{schemas.PREFIX}of_mine"
    await database.execute(f"CREATE SCHEMA {leftover}; CREATE SCHEMA {leftover}_ops; CREATE SCHEMA {foreign}")
    await database.execute(f"CREATE TABLE {leftover}.members (LIKE members)")
    async with open_scratch_tables(database, is_restore=True) as first:
        assert leftover not in await scratch_schema_names(database.target)
        with pytest.raises(BackupError, match="another restore"):
            await restore_archive(database, archive, safety_backup=no_safety_backup)
        await restore_drill(database, archive)
        assert first.place.schemas.main in await scratch_schema_names(database.target), "its owner is alive"
    assert await scratch_schema_names(database.target) == [foreign]


async def restore_drill(pool: Pool, archive: Archive) -> None:
    """A drill may run beside a restore."""
    assert (await drill.rehearse(pool, archive)).ok


# --- the safety backup


@pytest.fixture
async def service(tmp_path: Path, database: Pool) -> BackupService:
    """A service with one backup of two guilds, and a live database that has changed since."""
    await seed.seed(database, guilds=2, members=120, seed=3)
    service = make_service(tmp_path)
    await make_backup(service, database)
    await add_guild(database)
    return service


async def test_backs_up_first_unless_empty(service: BackupService, database: Pool, empty_target: ConnectTarget) -> None:
    [first] = await service.catalog.entries()
    outcome = await service.restore(database, "latest")
    safety_copy = await service.catalog.find(outcome.data["safety_backup"])
    assert safety_copy.manifest is not None
    assert safety_copy.manifest.reason == "before restore"
    assert safety_copy.id in outcome.text
    async with open_pool(empty_target) as empty:
        outcome = await service.restore(empty, first.id, from_other=True)
        assert outcome.data["safety_backup"] is None
        assert "had no tables" in outcome.text
        assert await table_checksums(empty_target) == await table_checksums(database.target)
    assert {entry.id for entry in await service.catalog.entries()} == {first.id, safety_copy.id}


async def test_brings_back_missing_tables(service: BackupService, database: Pool) -> None:
    """With their rows, and with what belongs to them; foreign tables and the rest of ours stay where they are."""
    [entry] = await service.catalog.entries()
    await database.execute(
        "CREATE TABLE theirs (id int); DROP TABLE members CASCADE; DROP SCHEMA ops CASCADE; DROP TABLE user_changes"
    )
    outcome = await service.restore(database, entry.id)
    assert outcome.ok, outcome.text
    assert "damaged" in outcome.text
    assert {"ops.leases", "ops.suppressions", "public.user_changes", "public.members"} <= {
        *outcome.data["brought_back"]
    }
    assert "public.guilds" not in outcome.data["brought_back"]
    assert await database.fetchval("SELECT count(*) FROM guilds") == 2
    assert entry.manifest is not None
    assert await database.fetchval("SELECT count(*) FROM members") == entry.manifest.rows["public.members"]
    await database.execute(
        "INSERT INTO changes (guild_id, table_name, key, action) VALUES (1, 'members', '{}', 'update');"
        "SELECT count(*) FROM role_membership"
    )
    assert await scratch_schema_names(database.target) == []
    assert (await service.drill(database, entry.id)).ok
    assert await migrations.check_drift(database) == []
    await database.execute("UPDATE guildbook_version SET version_num = '0005'; DROP TABLE members CASCADE")
    with pytest.raises(BackupError, match=r"damaged .*members.*--whole-database"):
        await service.restore(database, entry.id)


async def test_a_failed_safety_backup_stops_the_restore(service: BackupService, database: Pool) -> None:
    lock = service.catalog.local.path / ".lock"
    lock.unlink()
    lock.mkdir()  # so that nothing can be written there
    before = await table_checksums(database.target)
    with pytest.raises(BackupError, match="cannot be written to"):
        await service.restore(database, "latest")
    assert await table_checksums(database.target) == before


# --- the command line


async def test_command_line_restores_after_confirmation(tmp_path: Path, service: BackupService, database: Pool) -> None:
    [entry] = await service.catalog.entries()
    unconfirmed = await run_backup_command(tmp_path, database.target, "restore", "latest")
    assert unconfirmed.code == 2
    assert f"{database.target.database}" in unconfirmed.err
    assert "--yes" in unconfirmed.err
    assert await database.fetchval("SELECT count(*) FROM guilds") == 3
    missing = await run_backup_command(tmp_path, database.target, "restore", "nothing", "--yes", "--json")
    assert (missing.code, json.loads(missing.out)["ok"]) == (2, False)
    old = await run_backup_command(tmp_path, database.target, "restore", entry.id, "--yes", "--drop-old")
    assert (old.code, "--drop-old needs --whole-database" in old.err) == (2, True)
    restored = await run_backup_command(tmp_path, database.target, "restore", entry.id, "--yes")
    assert (restored.code, restored.err) == (0, "")
    assert entry.id in restored.out
    assert await database.fetchval("SELECT count(*) FROM guilds") == 2
    drilled = await run_backup_command(tmp_path, database.target, "drill", "--json")
    assert json.loads(drilled.out)["where"] == drill.WHERE
    actions = await database.fetch("SELECT command, left(result, 6) AS result FROM ops.admin_actions ORDER BY id")
    assert [tuple(row) for row in actions] == [
        ("backup restore", "Failed"),
        ("backup restore", "Backup"),
        ("backup drill", "Backup"),
    ]


@pytest.mark.parametrize(("answer", "is_right"), [("{}\n", True), ("nope\n", False), ("\n", False)])
async def test_a_terminal_is_asked_for_the_database_name(
    service: BackupService, database: Pool, monkeypatch: pytest.MonkeyPatch, answer: str, is_right: bool
) -> None:
    url = database.target.libpq_url()
    settings = Settings(_env_file=None, database_url=url)  # type: ignore[call-arg,arg-type]
    name = database.target.database
    stdin = io.StringIO(answer.format(name))
    monkeypatch.setattr(stdin, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", stdin)
    with contextlib.nullcontext() if is_right else pytest.raises(ValidationError, match="nothing was done"):
        await asyncio.to_thread(cli._confirm, settings, None, service, "latest", "the rows", whole_database=False)


# --- where the tables are


async def test_tables_in_schemas_of_their_own(tmp_path: Path, empty_target: ConnectTarget, database: Pool) -> None:
    """A backup of them is drilled and restored there, and wherever else Guildbook's tables are."""
    placed = empty_target.with_placement(Placement.of("Bot-X"))
    await migrations.upgrade(placed)
    service = make_service(tmp_path)
    async with open_pool(placed) as pool:
        await fill(pool)
        await pool.execute("CREATE TABLE public.members (theirs int)")
        manifest = await make_backup(service, pool)
        assert manifest.rows["Bot-X.members"] == 3_000
        assert manifest.rows["Bot-X_ops.suppressions"] == 1
        drilled = await service.drill(pool)
        assert drilled.ok, drilled.text
        assert drilled.data["rows_compared"] > 200
        await pool.execute("UPDATE members SET nick = 'since'")
        outcome = await service.restore(pool, manifest.id)
        assert outcome.ok, outcome.text
        assert await pool.fetchval("SELECT count(*) FROM members WHERE nick = 'since'") == 0
        outcome = await service.restore(database, manifest.id, from_other=True)
        assert outcome.ok, outcome.text
        assert outcome.data["left_out"] == []
        expected, found = await table_checksums(placed), await table_checksums(database.target)
        for name in ("members", "users", "guilds", "documents"):
            assert found[f"public.{name}"] == expected[f'"Bot-X".{name}']
        await pool.execute("DELETE FROM members")
        async with dropping_scratch_databases(empty_target):
            outcome = await service.restore(pool, manifest.id, whole_database=True)
            assert outcome.ok, outcome.text
            assert await pool.fetchval("SELECT count(*) FROM members") == 3_000
            assert await scratch_schema_names(empty_target) == []


async def test_restores_an_older_backup_after_more_migrations_than_revisions(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    await fill(database)
    await admin.downgrade(database, KNOWN[-2], backup=None)  # `ops.migrations` has a row for each of these
    await make_backup(service, database)
    await admin.upgrade(database)
    assert (await service.drill(database)).ok
    assert (await service.restore(database, "latest")).ok
    assert await database.fetchval("SELECT count(*) FROM members") == 3_000
    assert await migrations.pending(database) == []

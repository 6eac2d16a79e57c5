"""The revisions on a real server: upgrade, downgrade, concurrency, and drift from the models."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import Column, Index, MetaData, Text

from models import Base
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseUnavailable, MigrationError
from utils.operations import migrations
from utils.operations.migrations import MigrationOptions, __main__, schema_catalog
from utils.operations.migrations.environment import LOCK_KEY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
REVISIONS = ["0001", "0002", "0003", "0004", "0005"]
HEAD = REVISIONS[-1]


async def test_downgrade_and_upgrade_restore_the_schema(empty_target: ConnectTarget) -> None:
    assert await migrations.current(empty_target) is None
    assert await migrations.pending(empty_target) == REVISIONS
    await migrations.upgrade(empty_target)
    first = await schema_catalog.read(empty_target)
    assert await migrations.current(empty_target) == HEAD
    assert await migrations.pending(empty_target) == []
    await migrations.downgrade(empty_target, "base")
    assert await schema_catalog.read(empty_target) == {}
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    assert await conn.fetchval("SELECT count(*) FROM pg_namespace WHERE nspname = 'ops'") == 0
    await conn.close()
    await migrations.upgrade(empty_target)
    assert await schema_catalog.read(empty_target) == first


async def test_migrations_match_the_models(target: ConnectTarget, empty_target: ConnectTarget) -> None:
    assert await migrations.check_drift(target) == []
    await schema_catalog.build_from_models(empty_target)
    assert schema_catalog.differences(await schema_catalog.read(target), await schema_catalog.read(empty_target)) == []


async def test_drift_includes_missing_columns_and_indexes(target: ConnectTarget) -> None:
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)
    for table in Base.metadata.tables.values():
        table.to_metadata(metadata)
    metadata.tables["roles"].append_column(Column("extra", Text))
    Index(None, metadata.tables["threads"].c.owner_id)
    lines = await migrations.check_drift(target, metadata=metadata)
    assert sorted(line.partition(":")[0] for line in lines) == ["add_column", "add_index"]
    assert "extra" in "".join(lines)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("ALTER TABLE users ALTER COLUMN stamp SET DEFAULT 7", "column public.users.stamp"),
        ("ALTER TABLE changes ALTER COLUMN id DROP DEFAULT", "column public.changes.id"),
        ("ALTER TABLE sync_runs DROP CONSTRAINT ck_sync_runs_state", "ck_sync_runs_state"),
        ("ALTER TABLE guilds DROP COLUMN is_active; ALTER TABLE guilds ADD is_active bool", "guilds.is_active"),
        ("ALTER SEQUENCE ops.change_ids CYCLE", "sequence ops.change_ids"),
        ("CREATE OR REPLACE VIEW role_membership AS SELECT guild_id, id AS role_id, id AS user_id FROM roles", "view"),
    ],
)
async def test_catalog_finds_what_alembic_does_not_compare(
    target: ConnectTarget, empty_target: ConnectTarget, statement: str, expected: str
) -> None:
    conn = await asyncpg.connect(**target.connect_kwargs())
    await conn.execute(statement)
    await conn.close()
    await schema_catalog.build_from_models(empty_target)
    lines = schema_catalog.differences(await schema_catalog.read(target), await schema_catalog.read(empty_target))
    assert expected in "\n".join(lines)


async def test_drift_includes_the_view(database: Pool) -> None:
    await database.execute("DROP VIEW role_membership")
    assert await migrations.check_drift(database) == ["modify_view: role_membership"]


async def test_drift_ignores_other_schemas(database: Pool) -> None:
    await database.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.things (id int)")
    assert await migrations.check_drift(database) == []


async def test_concurrent_upgrades_apply_revisions_once(
    empty_target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await asyncio.gather(*(migrations.upgrade(empty_target) for _ in range(3)))
    assert await migrations.current(empty_target) == HEAD
    assert caplog.text.count("schema migrated: upgrade to head") == 1


async def test_concurrent_processes_apply_revisions_once(empty_target: ConnectTarget) -> None:
    holder = await asyncpg.connect(**empty_target.connect_kwargs())
    await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    script = (
        "import asyncio, logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from utils.operations import migrations; from utils.database.target import parse_url\n"
        "asyncio.run(migrations.upgrade(parse_url(sys.argv[1]), timeout=60))"
    )
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, empty_target.libpq_url(), cwd=ROOT, stderr=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]
    await wait_for_pollers(holder, 3)
    await holder.close()
    outputs = [(await process.communicate())[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert "".join(outputs).count("Running upgrade") == len(REVISIONS)
    assert await migrations.check_drift(empty_target) == []


async def test_waiting_for_the_lock_is_bounded_and_logged(
    empty_target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    holder = await asyncpg.connect(**empty_target.connect_kwargs())
    await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    with pytest.raises(MigrationError, match="another process has been migrating"):
        await migrations.upgrade(empty_target, timeout=0.4)
    assert "waiting for another process" in caplog.text
    await holder.close()
    await migrations.upgrade(empty_target)
    assert await migrations.current(empty_target) == HEAD


async def test_upgrade_does_not_block_the_event_loop(empty_target: ConnectTarget) -> None:
    """The lock is released by the event loop: an upgrade that blocked the loop would never end."""
    holder = await asyncpg.connect(**empty_target.connect_kwargs())
    await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    upgrade = asyncio.create_task(migrations.upgrade(empty_target, timeout=30))
    await wait_for_pollers(holder, 1)
    await holder.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)
    await upgrade
    await holder.close()


async def test_releases_the_lock(database: Pool) -> None:
    await migrations.upgrade(database)
    assert await database.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_failure_names_the_statement_and_changes_nothing(empty_target: ConnectTarget) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("CREATE TABLE members (mine int)")
    with pytest.raises(MigrationError, match=r'upgrade to head.*relation "members" already exists') as caught:
        await migrations.upgrade(empty_target)
    assert "CREATE TABLE members" in str(caught.value)
    assert await conn.fetchval("SELECT to_regclass('guilds')") is None
    assert await conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    await conn.close()


async def test_lock_timeout_ends_a_migration(target: ConnectTarget) -> None:
    holder = await asyncpg.connect(**target.connect_kwargs())
    async with holder.transaction():
        await holder.execute("LOCK TABLE guilds IN ACCESS SHARE MODE")
        with pytest.raises(MigrationError, match="lock timeout"):
            await migrations.downgrade(target, "base", options=MigrationOptions(lock_timeout="100ms"))
    await holder.close()
    assert await migrations.current(target) == "0001"  # each revision has its own transaction


async def test_rejects_an_unknown_revision(database: Pool) -> None:
    await database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await migrations.pending(database)
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await migrations.upgrade(database)


async def test_unreachable_server_is_unavailable() -> None:
    target = ConnectTarget(("/nowhere",), (5432,), user="amy", password="s3cr3t", database="guilds")
    with pytest.raises(DatabaseUnavailable) as caught:
        await migrations.upgrade(target)
    assert "s3cr3t" not in str(caught.value)


async def test_alembic_command_line_uses_the_settings(empty_target: ConnectTarget, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "DB_", "DATABASE_"))}
    environment["DATABASE_URL"] = empty_target.libpq_url()

    async def alembic(*arguments: str) -> str:
        command = [sys.executable, "-m", "alembic", *arguments]
        done = await asyncio.to_thread(
            subprocess.run, command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    await alembic("upgrade", "head")
    assert "No new upgrade operations detected" in await alembic("check")
    assert f"{HEAD} (head)" in await alembic("current")


async def wait_for_pollers(conn: asyncpg.Connection[asyncpg.Record], processes: int) -> None:
    """Wait until so many sessions poll for the migration lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND query ~ 'pg_try_advisory_lock|COMMIT'"
    )
    while await conn.fetchval(query) < processes:
        await conn.execute("SELECT pg_sleep(0.02)")


def test_squawk_accepts_our_sql() -> None:
    assert __main__.main(["lint"]) == 0


def test_squawk_rejects_blocking_sql() -> None:
    assert __main__.lint("CREATE INDEX i ON members (nick);\n") == 1


async def test_check_reports_drift_from_the_models() -> None:
    assert await __main__.check(18) == []
    lines = await __main__.check(18, role_membership="CREATE VIEW role_membership AS SELECT 1 AS one")
    assert any("view public.role_membership" in line for line in lines)


async def test_time_ordered_ids_follow_the_clock(database: Pool) -> None:
    await database.execute(
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT 1, 'members', '{}', 'update'"
        " FROM generate_series(1, 1000)"
    )
    first, last, count = await database.fetchrow("SELECT min(id), max(id), count(DISTINCT id) FROM changes")  # type: ignore[misc]
    assert count == 1000
    for identifier in (first, last):
        assert abs((identifier >> 22) + 1_420_070_400_000 - time.time() * 1000) < 60_000

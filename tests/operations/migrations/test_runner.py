"""Upgrading and downgrading a real server: concurrency, failures, cancellation."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from pathlib import Path

import asyncpg
import pytest

from tests.forkserver import start_bot
from tests.operations.migrations.support import with_revision
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseUnavailable, MigrationError
from utils.operations import migrations
from utils.operations.migrations import MigrationOptions, admin, schema_catalog
from utils.operations.migrations.environment import LOCK_KEY
from utils.operations.migrations.preview import preview

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
REVISIONS = ["0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008"]
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


async def test_concurrent_upgrades_apply_revisions_once(
    empty_target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await asyncio.gather(*(migrations.upgrade(empty_target) for _ in range(3)))
    assert await migrations.current(empty_target) == HEAD
    assert caplog.text.count("schema migrated: upgrade to head") == 1


async def wait_for_pollers(conn: asyncpg.Connection[asyncpg.Record], processes: int) -> None:
    """Wait until so many sessions poll for the migration lock."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND query ~ 'pg_try_advisory_lock|COMMIT'"
    )
    while await conn.fetchval(query) < processes:
        await conn.execute("SELECT pg_sleep(0.02)")


async def test_concurrent_processes_apply_revisions_once(empty_target: ConnectTarget) -> None:
    holder = await asyncpg.connect(**empty_target.connect_kwargs())
    await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    script = (
        "import asyncio, logging, sys; logging.basicConfig(level=logging.INFO)\n"
        "from utils.operations import migrations; from utils.database.address import parse_url\n"
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
    pid = await holder.fetchval("SELECT pg_backend_pid() FROM pg_advisory_lock($1)", LOCK_KEY)
    with pytest.raises(MigrationError, match=f"another process has been migrating .* until process {pid} "):
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


async def test_cancels_while_waiting_for_a_table(empty_target: ConnectTarget) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'guildbook_version'::regclass"
    await migrations.upgrade(empty_target, "0001")
    other = await asyncpg.connect(**empty_target.connect_kwargs())
    async with asyncio.timeout(20), other.transaction():
        await other.execute("LOCK TABLE guildbook_version")
        migrating = asyncio.create_task(migrations.upgrade(empty_target))
        await until(lambda: other.fetchval(waiting))
        migrating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await migrating
        assert await other.fetchval(waiting) == 0
    await other.close()
    assert await migrations.current(empty_target) == "0001"
    await migrations.upgrade(empty_target)


async def test_cancels_while_waiting_for_another_process(
    empty_target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = await asyncpg.connect(**empty_target.connect_kwargs())
    await other.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    async with asyncio.timeout(20):
        migrating = asyncio.create_task(migrations.upgrade(empty_target))
        await until(lambda: "waiting for another process" in caplog.text)
        migrating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await migrating
    await other.close()
    assert await migrations.current(empty_target) is None


async def test_releases_the_lock(database: Pool) -> None:
    await migrations.upgrade(database)
    assert await database.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_failure_names_the_statement_and_changes_nothing(empty_target: ConnectTarget) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("CREATE TYPE members AS (mine int)")
    with pytest.raises(MigrationError, match=r'upgrade to head.*relation "members" already exists') as caught:
        await migrations.upgrade(empty_target)
    assert "CREATE TABLE members" in str(caught.value)
    assert await conn.fetchval("SELECT to_regclass('guilds')") is None
    assert await conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    await conn.close()


async def test_lock_timeout_ends_a_migration(target: ConnectTarget) -> None:
    holder = await asyncpg.connect(**target.connect_kwargs())
    async with holder.transaction():
        pid = await holder.fetchval("SELECT pg_backend_pid()")
        await holder.execute("LOCK TABLE guilds IN ACCESS SHARE MODE")
        with pytest.raises(MigrationError, match=rf"lock timeout.*; guilds is locked by process {pid} \("):
            await migrations.downgrade(target, "base", options=MigrationOptions(lock_timeout="100ms"))
    await holder.close()
    assert await migrations.current(target) == "0001"  # each revision has its own transaction


async def test_rejects_an_unknown_revision(database: Pool) -> None:
    await database.execute("UPDATE guildbook_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await migrations.pending(database)
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await migrations.upgrade(database)


async def test_unreachable_server_is_unavailable() -> None:
    target = ConnectTarget(("/nowhere",), (5432,), user="amy", password="s3cr3t", database="guilds")
    with pytest.raises(DatabaseUnavailable) as caught:
        await migrations.upgrade(target)
    assert "s3cr3t" not in str(caught.value)


async def alembic(target: ConnectTarget, *arguments: str) -> tuple[int, str]:
    """Run Alembic's own command line; return its exit code and output."""
    process = await start_bot(
        ROOT, *arguments, module="alembic.__main__", settings={"DATABASE_URL": target.libpq_url()}
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return await process.wait(), output.decode()


async def test_alembic_command_line_uses_the_settings(empty_target: ConnectTarget) -> None:
    assert (await alembic(empty_target, "upgrade", "head"))[0] == 0
    for command, expected in (("check", "No new upgrade operations detected"), ("current", f"{HEAD} (head)")):
        code, output = await alembic(empty_target, command)
        assert (code, expected in output) == (0, True), output


async def test_alembic_command_line_refuses_a_foreign_database(empty_target: ConnectTarget) -> None:
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    await connection.execute("CREATE TABLE users (id int)")
    await connection.close()
    code, output = await alembic(empty_target, "upgrade", "head")
    assert code != 0
    assert "another program has tables where Guildbook would create its own: public.users" in output
    assert "Traceback" not in output


async def test_time_ordered_ids_follow_the_clock(database: Pool) -> None:
    await database.execute(
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT 1, 'members', '{}', 'update'"
        " FROM generate_series(1, 1000)"
    )
    first, last, count = await database.fetchrow("SELECT min(id), max(id), count(DISTINCT id) FROM changes")  # type: ignore[misc]
    assert count == 1000
    for identifier in (first, last):
        assert abs((identifier >> 22) + 1_420_070_400_000 - time.time() * 1000) < 60_000


async def test_a_revision_that_raises_is_named_with_file_and_line(tmp_path: Path, target: ConnectTarget) -> None:
    options = with_revision(tmp_path, "def upgrade():\n    raise RuntimeError('out of luck')\n")
    message = rf"could not upgrade to head from revision {HEAD}: RuntimeError: out of luck \(.*9000_extra.py, line 9\)"
    with pytest.raises(MigrationError, match=message):
        await migrations.upgrade(target, options=options)
    assert await migrations.current(target) == HEAD
    with pytest.raises(MigrationError, match=r"the SQL cannot be written: RuntimeError: out of luck \(.*line 9\)"):
        migrations.offline_sql(options=options)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def upgrade(:\n", r"9000_extra.py does not parse: line 8: .*; correct or remove that file"),
        ("import nowhere\n", r"ModuleNotFoundError: No module named 'nowhere' \(.*9000_extra.py, line 8\)"),
        ("\x00", r"9000_extra.py (does not parse|cannot be read): source code string cannot contain null bytes"),
    ],
    ids=("does not parse", "import fails", "no text"),
)
async def test_a_revision_that_cannot_be_imported_is_named(
    tmp_path: Path, database: Pool, body: str, message: str
) -> None:
    options = with_revision(tmp_path, body)
    for action in (admin.status, admin.upgrade, preview):
        with pytest.raises(MigrationError, match=message):
            await action(database, options=options)

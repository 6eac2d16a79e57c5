"""What operators do with the schema: status, history, upgrade, downgrade, stamp, and the switch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from utils.bot.process import Process
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.child import ENTRY, environment
from utils.exceptions import DatabaseError, GuildbookError, MigrationError
from utils.operations import migrations
from utils.operations.action import Step, record_action
from utils.operations.migrations import admin, invalid, schema_catalog, switch
from utils.service.lease import hold_as_operator
from utils.settings import Settings

KNOWN = [revision for revision, _ in migrations.revisions()]
HEAD = KNOWN[-1]


async def backed_up() -> str:
    return "backup 1"


@pytest.fixture
async def empty(empty_target: ConnectTarget) -> AsyncIterator[Pool]:
    """A pool on a database without any table."""
    db = Pool(empty_target, pool_max=4, connect_timeout=10)
    await db.connect()
    yield db
    await db.close()


async def bot(directory: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Run `python bot.py …` and return its exit code and all that it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ENTRY), *arguments),
        cwd=directory,
        env=environment(**settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_status_of_an_empty_database_an_old_one_and_the_newest(empty: Pool) -> None:
    outcome = await admin.status(empty)
    assert (outcome.ok, outcome.data["revision"]) == (False, None)
    assert [row["revision"] for row in outcome.data["pending"]] == KNOWN
    await migrations.upgrade(empty, KNOWN[1])
    outcome = await admin.status(empty)
    assert f"- {KNOWN[2]} " in outcome.text
    assert outcome.data["revision"] == KNOWN[1]
    await migrations.upgrade(empty)
    assert (await admin.status(empty)).ok
    await empty.execute("ALTER TABLE roles ADD COLUMN surprise text")
    outcome = await admin.status(empty)
    assert not outcome.ok
    assert "surprise" in outcome.text


async def test_status_tells_a_database_of_a_newer_version(database: Pool) -> None:
    await database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await admin.status(database)


async def test_an_upgrade_tells_each_revision_as_a_step(empty: Pool) -> None:
    steps: list[Step] = []
    outcome = await admin.upgrade(empty, progress=steps.append)
    assert [step.done for step in steps] == list(range(len(KNOWN) + 1))
    assert {step.total for step in steps} == {len(KNOWN)}
    assert outcome.text == f"applied: {', '.join(KNOWN)}"
    assert (await admin.upgrade(empty)).text == "the schema is up to date"


async def test_history_knows_when_operators_applied_what(database: Pool) -> None:
    outcome = await admin.history(database)
    assert [(row["revision"], row["applied"], row["at"]) for row in outcome.data["revisions"]] == [
        (revision, True, None) for revision in KNOWN
    ]
    down = await admin.downgrade(database, KNOWN[0], backup=None)
    await record_action(database, "db downgrade", {}, down.text)
    up = await admin.upgrade(database, KNOWN[1])
    await record_action(database, "db upgrade", {}, up.text)
    rows = (await admin.history(database)).data["revisions"]
    assert [row["applied"] for row in rows] == [True, True] + [False] * (len(KNOWN) - 2)
    assert [row["at"] is not None for row in rows] == [False, True] + [False] * (len(KNOWN) - 2)


async def test_a_downgrade_makes_a_backup_first_and_switches_auto_migrate_off(database: Pool) -> None:
    tables_at_backup: list[bool] = []

    async def backup() -> str:
        tables_at_backup.append(await database.fetchval("SELECT to_regclass('documents') IS NOT NULL"))
        return "backup 7"

    outcome = await admin.downgrade(database, KNOWN[1], backup=backup)
    assert tables_at_backup == [True]
    assert "backup 7" in outcome.text
    assert outcome.data["taken_back"] == KNOWN[:1:-1]
    assert await migrations.current(database) == KNOWN[1]
    reason = await switch.is_off(database)
    assert reason is not None
    assert f"taken down to {KNOWN[1]} by an operator on " in reason


async def test_a_backup_that_fails_ends_the_downgrade_before_it_begins(database: Pool) -> None:
    async def backup() -> str:
        raise GuildbookError("no room")

    with pytest.raises(GuildbookError, match="no room"):
        await admin.downgrade(database, "base", backup=backup)
    assert await migrations.current(database) == HEAD
    assert await switch.is_off(database) is None
    await admin.downgrade(database, "base", backup=backed_up)  # the lease was given back


async def test_a_downgrade_is_refused_while_a_bot_acts(database: Pool) -> None:
    await database.execute(
        "INSERT INTO ops.leases (shard, holder, epoch, expires_at) VALUES (0, 'amy', 1, clock_timestamp() + '1 min')"
    )
    with pytest.raises(GuildbookError, match="amy acts on this database"):
        await admin.downgrade(database, "base", backup=backed_up)
    assert await migrations.current(database) == HEAD


async def test_nobody_gets_the_lease_while_an_operator_downgrades(database: Pool) -> None:
    async with hold_as_operator(database):
        with pytest.raises(GuildbookError, match="db downgrade acts"):
            async with hold_as_operator(database):
                pytest.fail("two at once")
    async with hold_as_operator(database):
        pass


async def test_the_switch_outlives_a_downgrade_to_base_and_the_next_start_heeds_it(database: Pool) -> None:
    await admin.downgrade(database, "base", backup=backed_up)
    assert await schema_catalog.read(database.target) == {}
    assert await switch.is_off(database.target) is not None
    process = Process(Settings(_env_file=None))  # type: ignore[call-arg]
    with pytest.raises(MigrationError, match=r"stays off, because the schema was taken down to base by an operator"):
        await process._bring_schema_up_to_date(database)
    assert await migrations.current(database) is None
    outcome = await admin.upgrade(database, KNOWN[0])
    assert "AUTO_MIGRATE stays off" in outcome.text  # or the next start would go on by itself
    assert "AUTO_MIGRATE is on again" in (await admin.upgrade(database)).text
    assert await switch.is_off(database) is None
    await process._bring_schema_up_to_date(database)


async def test_an_older_version_runs_on_the_schema_that_was_taken_down_for_it(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await admin.downgrade(database, KNOWN[-2], backup=None)
    older(monkeypatch, tmp_path)
    await Process(Settings(_env_file=None))._bring_schema_up_to_date(database)  # type: ignore[call-arg]
    assert "AUTO_MIGRATE stays off until python bot.py db upgrade" in caplog.text
    assert await switch.is_off(database) is not None


def older(monkeypatch: pytest.MonkeyPatch, directory: Path, extra: str | None = None) -> None:
    """Let Alembic read a copy of the revisions: without the newest, or with one more of this text."""
    import shutil

    scripts = directory / "migrations"
    shutil.copytree(migrations.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    if extra is None:
        next((scripts / "versions").glob(f"{HEAD}_*.py")).unlink()
    else:
        (scripts / "versions" / "9000_extra.py").write_text(
            f'"""Extra."""\nfrom alembic import op\n\nrevision = "9000"\ndown_revision = "{HEAD}"\n\n\n{extra}\n'
        )
    monkeypatch.setattr(migrations, "SCRIPTS", scripts)


async def test_a_plain_owner_without_special_rights_may_use_the_switch(
    server: EmbeddedServer, empty_target: ConnectTarget
) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute(
        "DO $$ BEGIN CREATE ROLE plain_owner LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        f"ALTER DATABASE {empty_target.database} OWNER TO plain_owner"
    )
    await conn.close()
    from dataclasses import replace

    theirs = replace(empty_target, user="plain_owner")
    await migrations.upgrade(theirs)
    await switch.turn_off(theirs, "0001")
    assert await switch.is_off(theirs) is not None
    await switch.turn_on(theirs)
    assert await switch.is_off(theirs) is None
    with pytest.raises(MigrationError, match="may not make a database"):
        await admin.stamp(await opened(theirs), KNOWN[0])


async def opened(target: ConnectTarget) -> Pool:
    db = Pool(target, pool_min=0, pool_max=2, connect_timeout=10)
    await db.connect()
    return db


async def test_a_foreign_comment_is_no_switch(database: Pool) -> None:
    await database.execute("COMMENT ON TABLE alembic_version IS 'mind the gap'")
    assert await switch.is_off(database) is None
    await switch.turn_on(database)
    assert await database.fetchval("SELECT obj_description('alembic_version'::regclass)") == "mind the gap"


async def test_the_switch_needs_a_schema_that_was_made_once(empty: Pool) -> None:
    assert await switch.is_off(empty) is None
    with pytest.raises(MigrationError, match="no schema was ever made"):
        await switch.turn_off(empty, "base")


async def test_a_failing_downgrade_that_did_nothing_leaves_the_switch_on(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.operations.migrations.environment.LOCK_TIMEOUT", "100ms")
    holder = await asyncpg.connect(**database.target.connect_kwargs())
    async with holder.transaction():
        await holder.execute("LOCK TABLE alembic_version IN ROW EXCLUSIVE MODE")
        await holder.execute("LOCK TABLE ops.table_sizes, documents IN ACCESS SHARE MODE")
        with pytest.raises(GuildbookError):
            await admin.downgrade(database, KNOWN[-2], backup=None)
    await holder.close()
    assert await migrations.current(database) == HEAD
    assert await switch.is_off(database) is None


async def test_a_broken_revision_leaves_everything_before_it_and_says_what_failed(
    database: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = await schema_catalog.read(database.target)
    older(
        monkeypatch,
        tmp_path,
        'def upgrade():\n    op.execute("CREATE TABLE half (id int)")\n    op.execute("SELECT no_such_thing()")',
    )
    with pytest.raises(MigrationError, match=r"upgrade to 9000.*no_such_thing.*statement: SELECT no_such_thing"):
        await admin.upgrade(database)
    assert await schema_catalog.read(database.target) == before
    assert await migrations.current(database) == HEAD


async def leave_invalid_index(database: Pool) -> None:
    """Fail a CREATE UNIQUE INDEX CONCURRENTLY on doubled values."""
    await database.execute(
        "INSERT INTO roles (guild_id, id, name) VALUES (1, 1, 'same'), (1, 2, 'same') ON CONFLICT DO NOTHING"
    )
    conn = await asyncpg.connect(**database.target.connect_kwargs())
    with contextlib.suppress(asyncpg.UniqueViolationError):
        await conn.execute('CREATE UNIQUE INDEX CONCURRENTLY "half Built" ON roles (name)')
        pytest.fail("it was built")
    await conn.close()


async def test_an_invalid_index_is_dropped_and_reported_by_the_next_upgrade(database: Pool) -> None:
    await leave_invalid_index(database)
    assert await invalid.find(database) == ['"half Built"']
    assert "half Built" in (await admin.status(database)).text
    outcome = await admin.upgrade(database)
    assert outcome.data["invalid_indexes_dropped"] == ['"half Built"']
    assert "half Built" in outcome.text
    assert await invalid.find(database) == []
    assert await migrations.check_drift(database) == []


async def test_an_index_that_somebody_builds_this_moment_is_left_alone(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.operations.migrations.invalid.LOCK_TIMEOUT", "50ms")
    await leave_invalid_index(database)
    builder = await asyncpg.connect(**database.target.connect_kwargs())
    async with builder.transaction():
        await builder.execute("LOCK TABLE roles IN SHARE UPDATE EXCLUSIVE MODE")  # as CREATE INDEX CONCURRENTLY does
        outcome = await admin.upgrade(database)
    await builder.close()
    assert not outcome.ok
    assert outcome.data["invalid_indexes_left"] == ['"half Built"']
    assert await invalid.find(database) == ['"half Built"']


async def test_invalid_indexes_in_other_peoples_schemas_stay(database: Pool) -> None:
    await database.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.t (x int); INSERT INTO theirs.t VALUES (1), (1)")
    conn = await asyncpg.connect(**database.target.connect_kwargs())
    with contextlib.suppress(asyncpg.UniqueViolationError):
        await conn.execute("CREATE UNIQUE INDEX CONCURRENTLY u ON theirs.t (x)")
    await conn.close()
    await admin.upgrade(database)
    assert await database.fetchval("SELECT to_regclass('theirs.u') IS NOT NULL")


async def test_stamp_believes_only_a_schema_that_is_what_the_revision_makes(database: Pool) -> None:
    await database.execute("DROP TABLE alembic_version; CREATE TABLE mine (id int PRIMARY KEY)")
    with pytest.raises(MigrationError, match="too much: column"):
        await admin.stamp(database, KNOWN[0])
    await database.execute("DROP TABLE mine")
    await database.execute("ALTER TABLE users ALTER COLUMN stamp SET DEFAULT 7")
    with pytest.raises(MigrationError, match=r"differs: column public\.users\.stamp"):
        await admin.stamp(database, "head")
    assert await database.fetchval("SELECT to_regclass('alembic_version')") is None
    await database.execute("ALTER TABLE users ALTER COLUMN stamp SET DEFAULT '0'; CREATE TABLE theirs (id int)")
    with pytest.raises(MigrationError, match="no revision 'nonsense'"):
        await admin.stamp(database, "nonsense")
    await database.execute("DROP TABLE theirs")
    assert (await admin.stamp(database, "head")).data == {"before": None, "after": HEAD}
    assert await migrations.current(database) == HEAD
    names = await database.fetch("SELECT 1 FROM pg_database WHERE datname LIKE 'guildbook\\_compare%'")
    assert names == []


async def test_stamp_at_an_older_revision_lets_other_peoples_tables_be(empty: Pool) -> None:
    await migrations.upgrade(empty, KNOWN[1])
    await empty.execute("UPDATE alembic_version SET version_num = '0001'; CREATE TABLE theirs (id int)")
    assert (await admin.stamp(empty, KNOWN[1])).data == {"before": "0001", "after": KNOWN[1]}


async def test_the_command_line_asks_for_the_name_and_writes_into_the_books(tmp_path: Path, database: Pool) -> None:
    url, name = database.target.libpq_url(), database.target.database
    code, output = await bot(tmp_path, "db", "downgrade", KNOWN[0], DATABASE_URL=url)
    assert code == 1
    assert "--yes-destroy" in output
    code, output = await bot(tmp_path, "db", "downgrade", KNOWN[0], "--yes-destroy", "other", DATABASE_URL=url)
    assert code == 1
    assert f"is called {name}, not other" in output
    assert await migrations.current(database) == HEAD
    arguments = ("db", "downgrade", KNOWN[0], "--yes-destroy", str(name), "--no-backup", "--json")
    code, output = await bot(tmp_path, *arguments, DATABASE_URL=url)
    assert code == 0, output
    assert json.loads(output)["taken_back"] == KNOWN[:0:-1]
    assert (await bot(tmp_path, "db", "upgrade", DATABASE_URL=url))[0] == 0
    code, output = await bot(tmp_path, "db", "history", "--json", DATABASE_URL=url)
    assert [row["at"] is not None for row in json.loads(output)["revisions"]] == [False] + [True] * (len(KNOWN) - 1)
    code, output = await bot(tmp_path, "db", "status", DATABASE_URL=url)
    assert (code, output.splitlines()[-1]) == (0, "differs from the models: nothing")
    commands = await database.fetch("SELECT command FROM ops.admin_actions ORDER BY id")
    assert [row["command"] for row in commands][-4:] == ["db downgrade", "db upgrade", "db history", "db status"]


async def test_a_downgrade_is_no_upgrade(database: Pool) -> None:
    await migrations.downgrade(database, KNOWN[0])
    with pytest.raises(MigrationError, match="that is an upgrade"):
        await admin.downgrade(database, KNOWN[1], backup=None)
    await migrations.upgrade(database)
    with pytest.raises(MigrationError, match="that is a downgrade"):
        await admin.upgrade(database, KNOWN[1])
    with pytest.raises(DatabaseError, match="no revision"):
        await admin.upgrade(database, "'; DROP TABLE users")

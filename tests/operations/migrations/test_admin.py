"""What operators do with the schema: status, history, upgrade, downgrade and stamp."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from tests.bot.running import run_cli
from tests.operations.migrations.support import EXTRA, HEAD, KNOWN, with_revision, without_newest
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseError, GuildbookError, MigrationError
from utils.operations import migrations
from utils.operations.action import Step
from utils.operations.migrations import Actor, MigrationOptions, admin, schema_catalog
from utils.service.lease import hold_as_operator

pytestmark = pytest.mark.slow


async def back_up() -> str:
    return "backup 1"


@pytest.fixture
async def empty(empty_target: ConnectTarget) -> AsyncIterator[Pool]:
    """A pool on a database without any table."""
    pool = Pool(empty_target, pool_max=4, connect_timeout=10)
    await pool.connect()
    yield pool
    await pool.close()


# --- status and history


async def test_status_reports_pending_revisions_and_drift(empty: Pool) -> None:
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


async def test_status_refuses_an_unknown_revision(database: Pool) -> None:
    await database.execute("UPDATE guildbook_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await admin.status(database)


async def test_history_says_when_and_by_whom(database: Pool) -> None:
    await admin.downgrade(database, KNOWN[0], backup=None)
    await admin.upgrade(database, KNOWN[1])
    rows = (await admin.history(database)).data["revisions"]
    assert [row["applied"] for row in rows] == [True, True] + [False] * (len(KNOWN) - 2)
    assert [row["at"] for row in rows] == [None] * len(KNOWN)  # the table did not exist
    await admin.upgrade(database, by=Actor("discord", 7))
    outcome = await admin.history(database)
    assert [row["by"] for row in outcome.data["revisions"]] == [None, None] + ["discord"] * (len(KNOWN) - 2)
    assert [row["user_id"] for row in outcome.data["revisions"]] == [None, None] + [7] * (len(KNOWN) - 2)
    assert " UTC, by user 7)" in outcome.text


# --- upgrade


async def test_upgrade_reports_each_revision_as_a_step(empty: Pool) -> None:
    steps: list[Step] = []
    outcome = await admin.upgrade(empty, progress=steps.append)
    assert [step.done for step in steps] == list(range(len(KNOWN) + 1))
    assert {step.total for step in steps} == {len(KNOWN)}
    assert outcome.text == f"applied: {', '.join(KNOWN)}"
    assert (await admin.upgrade(empty)).text == "the schema is up to date"


async def test_a_failed_upgrade_changes_nothing(database: Pool, tmp_path: Path) -> None:
    before = await schema_catalog.read(database.target)
    options = with_revision(
        tmp_path,
        'def upgrade():\n    op.execute("CREATE TABLE half (id int)")\n    op.execute("SELECT no_such_thing()")',
    )
    with pytest.raises(MigrationError, match=rf"upgrade to {EXTRA}.*no_such_thing.*statement: SELECT no_such_thing"):
        await admin.upgrade(database, options=options)
    assert await schema_catalog.read(database.target) == before
    assert await migrations.current(database) == HEAD


# --- downgrade


async def test_downgrade_backs_up_first_and_pauses(database: Pool) -> None:
    had_table: list[bool] = []

    async def backup() -> str:
        had_table.append(await database.fetchval("SELECT to_regclass('documents') IS NOT NULL"))
        return "backup 7"

    outcome = await admin.downgrade(database, KNOWN[1], backup=backup)
    assert had_table == [True]
    assert "backup 7" in outcome.text
    assert outcome.data["taken_back"] == KNOWN[:1:-1]
    assert await migrations.current(database) == KNOWN[1]
    assert f"downgraded to {KNOWN[1]} by an operator on " in str(await migrations.find_pause(database))


async def test_downgrade_stops_when_the_backup_fails(database: Pool) -> None:
    async def backup() -> str:
        raise GuildbookError("no room")

    with pytest.raises(GuildbookError, match="no room"):
        await admin.downgrade(database, "base", backup=backup)
    assert await migrations.current(database) == HEAD
    assert await migrations.find_pause(database) is None
    await admin.downgrade(database, "base", backup=back_up)  # the lease was released


async def test_downgrade_is_refused_while_a_bot_acts(database: Pool) -> None:
    await database.execute(
        "INSERT INTO ops.leases (shard, holder, epoch, expires_at) VALUES (0, 'amy', 1, clock_timestamp() + '1 min')"
    )
    with pytest.raises(GuildbookError, match="amy"):
        await admin.downgrade(database, "base", backup=back_up)
    assert await migrations.current(database) == HEAD


async def test_operators_hold_the_lease_one_at_a_time(database: Pool) -> None:
    async with hold_as_operator(database):
        with pytest.raises(GuildbookError, match=r"another operator.s command uses this database"):
            async with hold_as_operator(database):
                pytest.fail("two at once")
    async with hold_as_operator(database):
        pass


async def test_a_failed_downgrade_without_effect_does_not_pause(database: Pool) -> None:
    holder = await asyncpg.connect(**database.target.connect_kwargs())
    async with holder.transaction():
        await holder.execute(
            "LOCK TABLE users, ops.dead_letters, ops.application, ops.migrations, documents IN ACCESS SHARE MODE"
        )
        with pytest.raises(MigrationError, match="lock timeout"):
            await admin.downgrade(database, KNOWN[-2], backup=None, options=MigrationOptions(lock_timeout="100ms"))
    await holder.close()
    assert await migrations.current(database) == HEAD
    assert await migrations.find_pause(database) is None


async def test_a_start_respects_the_pause_of_a_downgrade(database: Pool) -> None:
    await admin.downgrade(database, "base", backup=back_up)
    assert await schema_catalog.read(database.target) == {}
    with pytest.raises(MigrationError, match=r"AUTO_MIGRATE is paused: the schema was downgraded to base"):
        await migrations.prepare_schema(database, auto_migrate=True)
    assert await migrations.current(database) is None
    outcome = await admin.upgrade(database, KNOWN[0])
    assert "AUTO_MIGRATE stays paused" in outcome.text  # or the next start would continue
    assert "AUTO_MIGRATE is resumed" in (await admin.upgrade(database)).text
    assert await migrations.find_pause(database) is None
    await migrations.prepare_schema(database, auto_migrate=True)


async def test_an_older_version_starts_on_a_downgraded_schema(
    database: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await admin.downgrade(database, KNOWN[-2], backup=None)
    await migrations.prepare_schema(database, auto_migrate=True, options=without_newest(tmp_path))
    assert "AUTO_MIGRATE is paused until python bot.py db upgrade" in caplog.text
    assert await migrations.find_pause(database) is not None


async def test_a_start_without_auto_migrate_needs_the_newest_schema(empty: Pool) -> None:
    with pytest.raises(MigrationError, match=f"lacks revision {KNOWN[0]}, .* AUTO_MIGRATE is off"):
        await migrations.prepare_schema(empty, auto_migrate=False)
    await migrations.upgrade(empty)
    await migrations.prepare_schema(empty, auto_migrate=False)


async def test_rejects_revisions_in_the_other_direction(database: Pool) -> None:
    await migrations.downgrade(database, KNOWN[0])
    with pytest.raises(MigrationError, match="that is an upgrade"):
        await admin.downgrade(database, KNOWN[1], backup=None)
    await migrations.upgrade(database)
    with pytest.raises(MigrationError, match="that is a downgrade"):
        await admin.upgrade(database, KNOWN[1])
    with pytest.raises(DatabaseError, match="no revision"):
        await admin.upgrade(database, "'; DROP TABLE users")


async def test_downgrade_to_where_it_is_does_nothing(database: Pool) -> None:
    async def never() -> str:
        raise AssertionError("nothing is saved, because nothing is done")

    for revision in (HEAD, "head"):
        outcome = await admin.downgrade(database, revision, backup=never)
        assert outcome.text == f"the schema is at {HEAD} already: nothing to do"
        assert outcome.data["taken_back"] == []
    assert await migrations.find_pause(database) is None


async def test_plans_refuse_what_would_be_refused(database: Pool, empty: Pool) -> None:
    assert await admin.plan_downgrade(database, HEAD) is None
    plan = await admin.plan_downgrade(database, KNOWN[1])
    assert plan is not None
    assert plan.text.startswith(f"downgrade from {HEAD} to {KNOWN[1]}: ")
    await database.execute("CREATE VIEW theirs AS SELECT * FROM documents")
    with pytest.raises(MigrationError, match=r"objects of another program depend on tables .*theirs"):
        await admin.plan_downgrade(database, KNOWN[1])
    await empty.execute("CREATE TABLE users (id int)")
    with pytest.raises(MigrationError, match="another program has tables where Guildbook would create its own: "):
        await admin.plan_upgrade(empty)


async def test_no_downgrade_starts_that_cannot_drop_the_schema_in_the_end(database: Pool) -> None:
    await database.execute("CREATE TABLE ops.theirs (id int); CREATE VIEW ops.seen AS SELECT 1 AS one")
    with pytest.raises(MigrationError, match=r"this would drop: table ops\.theirs, view ops\.seen\. Nothing was"):
        await admin.plan_downgrade(database, "base")
    assert await migrations.current_heads(database) == (HEAD,)
    await database.execute("DROP TABLE ops.theirs; DROP VIEW ops.seen")
    assert await admin.plan_downgrade(database, "base") is not None


async def test_plan_of_an_upgrade_names_what_it_would_do(database: Pool, empty: Pool) -> None:
    assert await admin.plan_upgrade(database) is None
    plan = await admin.plan_upgrade(empty)
    assert plan is not None
    assert plan.text.startswith(f"upgrade from base to {HEAD}: ")
    await admin.downgrade(database, KNOWN[-2], backup=None)
    await migrations.upgrade(database.target, respect_pause=True)
    plan = await admin.plan_upgrade(database)
    assert plan is not None
    assert "AUTO_MIGRATE is resumed" in plan.text


# --- stamp


async def test_stamp_rejects_a_schema_that_differs(database: Pool) -> None:
    await database.execute("DROP TABLE guildbook_version; CREATE TABLE mine (id int PRIMARY KEY)")
    with pytest.raises(MigrationError, match="unexpected: column"):
        await admin.stamp(database, KNOWN[0])
    await database.execute("DROP TABLE mine")
    await database.execute("ALTER TABLE users ALTER COLUMN stamp SET DEFAULT 7")
    with pytest.raises(MigrationError, match=r"differs: column users\.stamp"):
        await admin.stamp(database, "head")
    assert await database.fetchval("SELECT to_regclass('guildbook_version')") is None
    await database.execute("ALTER TABLE users ALTER COLUMN stamp SET DEFAULT '0'; CREATE TABLE theirs (id int)")
    with pytest.raises(MigrationError, match="no revision 'nonsense'"):
        await admin.stamp(database, "nonsense")
    await database.execute("DROP TABLE theirs")
    assert (await admin.stamp(database, "head")).data == {"before": None, "after": HEAD}
    assert await migrations.current(database) == HEAD
    names = await database.fetch("SELECT 1 FROM pg_database WHERE datname LIKE 'guildbook\\_compare%'")
    assert names == []


async def test_stamp_at_an_older_revision_ignores_other_tables(empty: Pool) -> None:
    await migrations.upgrade(empty, KNOWN[1])
    await empty.execute("UPDATE guildbook_version SET version_num = '0001'; CREATE TABLE theirs (id int)")
    assert (await admin.stamp(empty, KNOWN[1])).data == {"before": "0001", "after": KNOWN[1]}


async def test_stamp_needs_the_right_to_create_a_database(empty_target: ConnectTarget) -> None:
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    await connection.execute(
        "DO $$ BEGIN CREATE ROLE plain_owner LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        f"ALTER DATABASE {empty_target.database} OWNER TO plain_owner"
    )
    await connection.close()
    pool = Pool(replace(empty_target, user="plain_owner"), pool_min=0, pool_max=2, connect_timeout=10)
    await pool.connect()
    await migrations.upgrade(pool)
    with pytest.raises(MigrationError, match="may not create a database"):
        await admin.stamp(pool, KNOWN[0])
    assert "compared with the models, without defaults" in (await admin.stamp(pool, "head")).text
    await pool.close()


# --- the command line


async def test_command_line_asks_for_the_name_and_records_it(tmp_path: Path, database: Pool) -> None:
    url, name = database.target.libpq_url(), database.target.database
    code, output = await run_cli(tmp_path, "db", "downgrade", KNOWN[0], DATABASE_URL=url)
    assert code == 2
    assert "--yes-destroy" in output
    code, output = await run_cli(tmp_path, "db", "downgrade", KNOWN[0], "--yes-destroy", "other", DATABASE_URL=url)
    assert code == 2
    assert f"is named {name}, not other" in output
    assert await migrations.current(database) == HEAD
    arguments = ("db", "downgrade", KNOWN[0], "--yes-destroy", str(name), "--no-backup", "--json")
    code, output = await run_cli(tmp_path, *arguments, DATABASE_URL=url)
    assert code == 0, output
    assert json.loads(output)["taken_back"] == KNOWN[:0:-1]
    assert (await run_cli(tmp_path, "db", "upgrade", DATABASE_URL=url))[0] == 0
    code, output = await run_cli(tmp_path, "db", "history", "--json", DATABASE_URL=url)
    by = [row["by"] for row in json.loads(output)["revisions"]]
    assert by == [None] + ["command line"] * (len(KNOWN) - 1)
    code, output = await run_cli(tmp_path, "db", "status", DATABASE_URL=url)
    assert (code, output.splitlines()[-1]) == (0, "drift from the models: none")
    commands = await database.fetch("SELECT command FROM ops.admin_actions ORDER BY id")
    assert [row["command"] for row in commands][-4:] == ["db downgrade", "db upgrade", "db history", "db status"]


async def test_stamp_is_checked_before_it_is_recorded(database: Pool) -> None:
    checked = await admin.check_stamp(database, "head")
    assert (checked.goal, checked.before, checked.is_recorded) == (HEAD, HEAD, True)
    outcome = await admin.record_stamp(database, checked)
    assert outcome.text.startswith(f"{HEAD} is recorded already: nothing to do")
    assert await database.fetchval("SELECT count(*) FROM ops.migrations WHERE action = 'stamp'") == 0
    await database.execute("DELETE FROM guildbook_version")
    checked = await admin.check_stamp(database, "head")
    assert (checked.before, checked.is_recorded) == (None, False)
    await database.execute("INSERT INTO guildbook_version VALUES ('0001')")
    with pytest.raises(MigrationError, match="revision 0001 was recorded meanwhile"):
        await admin.record_stamp(database, checked)
    await database.execute("DELETE FROM guildbook_version")
    assert (await admin.record_stamp(database, checked)).data == {"before": None, "after": HEAD}

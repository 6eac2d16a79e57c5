"""Databases that belong to other programs, wholly or in part, and what older versions of ours recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.operations.migrations.support import HEAD, KNOWN
from utils.database import ConnectTarget, Pool
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations import admin
from utils.operations.migrations.history import COMMAND_LINE, COMMENT_PREFIX
from utils.operations.migrations.preview import preview

pytestmark = pytest.mark.slow

#: Turns a database of ours into what a version up to revision 0005 leaves.
AS_BEFORE = (
    "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);"
    "INSERT INTO alembic_version SELECT version_num FROM guildbook_version; DROP TABLE guildbook_version"
)
THEIR_VERSION = (
    "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY); INSERT INTO alembic_version VALUES ('{}')"
)


@pytest.fixture
async def connection(empty_target: ConnectTarget) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    yield conn
    await conn.close()


async def recorded(connection: Any, table: str) -> list[str]:
    return [row[0] for row in await connection.fetch(f"SELECT version_num FROM {table}")]  # noqa: S608


# --- the former version table


async def test_the_former_version_table_is_adopted_once(database: Pool) -> None:
    await database.execute(AS_BEFORE)
    assert await migrations.current(database) == HEAD
    assert (await admin.status(database)).ok
    assert await database.fetchval("SELECT to_regclass('guildbook_version')") is None  # reading changes nothing
    await migrations.upgrade(database)
    assert await recorded(database, "guildbook_version") == [HEAD]
    # What an older Guildbook reads: a revision that it does not know.
    assert await recorded(database, "alembic_version") == ["guildbook_version"]
    await migrations.downgrade(database, KNOWN[0])
    assert await recorded(database, "alembic_version") == ["guildbook_version"]
    assert await migrations.current(database) == KNOWN[0]


async def test_adoption_keeps_a_pause(database: Pool) -> None:
    await migrations.downgrade(database, KNOWN[1])
    await database.execute(AS_BEFORE)
    await database.execute(f"COMMENT ON TABLE alembic_version IS '{COMMENT_PREFIX}the schema was downgraded'")
    assert str(await migrations.find_pause(database)) == "the schema was downgraded"
    assert (await migrations.upgrade(database, respect_pause=True)).paused is not None
    await migrations.upgrade(database, KNOWN[2])
    assert str(await migrations.find_pause(database)) == "the schema was downgraded"
    await migrations.upgrade(database)
    assert await migrations.find_pause(database) is None


async def test_a_pause_before_the_first_migration_adopts(database: Pool) -> None:
    await migrations.downgrade(database, KNOWN[1])
    await database.execute(AS_BEFORE)
    await migrations.pause_auto_migrate(database, "base", by=COMMAND_LINE)
    assert await recorded(database, "guildbook_version") == [KNOWN[1]]
    assert "downgraded to base" in str(await migrations.find_pause(database))


async def test_a_newer_revision_in_the_former_table_is_refused(database: Pool) -> None:
    await database.execute(AS_BEFORE)
    await database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(MigrationError, match="9999, which this version does not know"):
        await migrations.upgrade(database)
    assert await recorded(database, "alembic_version") == ["9999"]
    await admin.stamp(database, "head")
    assert await recorded(database, "guildbook_version") == [HEAD]
    assert await recorded(database, "alembic_version") == ["guildbook_version"]


async def test_preview_of_the_former_table_adopts_it(database: Pool) -> None:
    await database.execute(AS_BEFORE)
    outcome = await preview(database, KNOWN[-2], down=True)
    assert outcome.file is not None
    await database.execute(outcome.file[1])
    assert await recorded(database, "guildbook_version") == [KNOWN[-2]]
    assert await recorded(database, "alembic_version") == ["guildbook_version"]


# --- other programs


@pytest.mark.parametrize("version", ["0003", "ab12cd34ef56"])
async def test_a_foreign_version_table_is_left_alone(
    connection: asyncpg.Connection[asyncpg.Record], empty_target: ConnectTarget, version: str
) -> None:
    await connection.execute(THEIR_VERSION.format(version) + "; CREATE TABLE shop (id int)")
    await connection.execute("COMMENT ON TABLE alembic_version IS 'theirs'")
    assert await migrations.current(empty_target) is None
    assert await migrations.pending(empty_target) == KNOWN
    await migrations.upgrade(empty_target)
    assert await migrations.check_drift(empty_target) == []
    await migrations.downgrade(empty_target, "base")
    assert await recorded(connection, "alembic_version") == [version]
    assert await connection.fetchval("SELECT obj_description('alembic_version'::regclass)") == "theirs"
    assert await connection.fetchval("SELECT to_regclass('shop')") is not None


async def test_a_foreign_users_table_is_refused_with_advice(
    connection: asyncpg.Connection[asyncpg.Record], empty_target: ConnectTarget
) -> None:
    await connection.execute(THEIR_VERSION.format("0005") + "; CREATE TABLE users (id int)")
    with pytest.raises(MigrationError, match=r"another program .* public\.users\. .*DB_SCHEMA"):
        await migrations.upgrade(empty_target)
    assert await connection.fetchval("SELECT to_regclass('guildbook_version')") is None
    pool = Pool(empty_target, pool_max=2, connect_timeout=10)
    await pool.connect()
    outcome = await admin.status(pool)
    assert not outcome.ok
    assert "problem: another program has tables" in outcome.text
    with pytest.raises(MigrationError, match="DB_SCHEMA"):
        await migrations.prepare_schema(pool, auto_migrate=False)
    await pool.close()


async def test_version_tables_without_a_version_are_another_programs(
    connection: asyncpg.Connection[asyncpg.Record], empty_target: ConnectTarget
) -> None:
    await connection.execute("CREATE TABLE alembic_version (theirs int); CREATE TABLE guildbook_version (theirs int)")
    assert await migrations.current(empty_target) is None
    with pytest.raises(MigrationError, match=r"another program .* public\.guildbook_version\. .*DB_SCHEMA"):
        await migrations.upgrade(empty_target)
    assert await connection.fetchval("SELECT to_regclass('guilds')") is None
    await connection.execute("DROP TABLE guildbook_version")
    await migrations.upgrade(empty_target)
    assert await migrations.current(empty_target) == HEAD


async def test_a_dump_of_one_schema_is_not_up_to_date(database: Pool) -> None:
    await database.execute("DROP SCHEMA ops CASCADE")
    for former in (False, True):
        if former:
            await database.execute(AS_BEFORE)
        with pytest.raises(MigrationError, match=r"only a part of Guildbook's tables .*ops\.leases"):
            await migrations.prepare_schema(database, auto_migrate=True)
        outcome = await admin.status(database)
        assert not outcome.ok
        assert "problem: the database has only a part" in outcome.text


async def test_tables_without_a_version_are_recorded_by_stamp(database: Pool) -> None:
    await database.execute("DELETE FROM guildbook_version")
    with pytest.raises(MigrationError, match="db stamp head"):
        await migrations.upgrade(database)
    await admin.stamp(database, "head")
    await database.execute("DROP TABLE guildbook_version")
    with pytest.raises(MigrationError, match="db stamp head"):
        await migrations.upgrade(database)
    await admin.stamp(database, "head")
    assert (await migrations.upgrade(database)).revisions == ()


async def test_status_and_drift_pass_beside_foreign_objects(database: Pool) -> None:
    await database.execute(
        "CREATE TABLE legacy_bans (id int PRIMARY KEY, user_id bigint); CREATE TABLE ops.theirs (id int);"
        "CREATE INDEX their_index ON members (joined_at); CREATE VIEW their_view AS SELECT user_id FROM members"
    )
    assert await migrations.check_drift(database) == []
    assert (await admin.status(database)).ok

"""`ops.migrations`: what was applied, and whether AUTO_MIGRATE is paused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from tests.operations.migrations.support import EXTRA, HEAD, KNOWN, with_revision
from utils.database import ConnectTarget, Pool
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations import Actor
from utils.operations.migrations.history import COMMENT_PREFIX, TABLE_REVISION

BEFORE_TABLE = KNOWN[KNOWN.index(TABLE_REVISION) - 1]
#: The revisions that come after it.
SINCE = KNOWN[KNOWN.index(TABLE_REVISION) :]
NOTHING = "def upgrade():\n    pass\n\ndef downgrade():\n    pass"
COMMENT = "SELECT obj_description('guildbook_version'::regclass)"


@pytest.fixture
async def connection(empty_target: ConnectTarget) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection to a database without any table."""
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    yield connection
    await connection.close()


async def recorded(connection: asyncpg.Connection[asyncpg.Record] | Pool) -> list[tuple[str, str]]:
    rows = await connection.fetch("SELECT revision, action FROM ops.migrations ORDER BY id")
    return [(row["revision"], row["action"]) for row in rows]


async def test_records_who_applied_each_revision(
    empty_target: ConnectTarget, connection: asyncpg.Connection[asyncpg.Record]
) -> None:
    started = await connection.fetchval("SELECT clock_timestamp()")
    await migrations.upgrade(empty_target, by=Actor("discord", 7))
    assert await recorded(connection) == [(revision, "upgrade") for revision in KNOWN]
    rows = await connection.fetch("SELECT * FROM ops.migrations")
    assert {(row["applied_by"], row["user_id"]) for row in rows} == {("discord", 7)}
    assert all(row["at"] > started and 0 < row["seconds"] < 60 for row in rows)
    assert len({row["at"] for row in rows}) == len(KNOWN)


async def test_records_downgrades_and_stamps(database: Pool, tmp_path: Path) -> None:
    options = with_revision(tmp_path, NOTHING)
    await migrations.upgrade(database, options=options)
    await migrations.downgrade(database, HEAD, options=options)
    await migrations.stamp(database, EXTRA, options=options)
    assert (await recorded(database))[-3:] == [(EXTRA, "upgrade"), (EXTRA, "downgrade"), (EXTRA, "stamp")]
    assert EXTRA not in await migrations.applied(database)
    assert HEAD in await migrations.applied(database)


async def test_an_older_database_has_no_history(empty_target: ConnectTarget) -> None:
    assert await migrations.applied(empty_target) == {}
    await migrations.upgrade(empty_target, BEFORE_TABLE)
    assert await migrations.applied(empty_target) == {}
    assert await migrations.find_pause(empty_target) is None


async def test_failed_revisions_are_not_recorded(database: Pool, tmp_path: Path) -> None:
    before = await recorded(database)
    options = with_revision(tmp_path, "def upgrade():\n    op.execute('SELECT no_such_thing()')")
    with pytest.raises(MigrationError):
        await migrations.upgrade(database, options=options)
    assert await recorded(database) == before


async def test_a_pause_is_a_row_until_resumed(database: Pool) -> None:
    paused = await migrations.pause_auto_migrate(database, HEAD, by=Actor("discord", 7))
    assert await migrations.find_pause(database) == paused
    assert str(paused).startswith(f"the schema was downgraded to {HEAD} by an operator on 20")
    assert await database.fetchval(COMMENT) is None
    await migrations.resume_auto_migrate(database)
    await migrations.resume_auto_migrate(database)
    assert await migrations.find_pause(database) is None
    assert (await recorded(database))[-2:] == [(HEAD, "pause"), (HEAD, "resume")]


@pytest.mark.parametrize("revision", [BEFORE_TABLE, "base"])
async def test_a_pause_outlives_the_table(database: Pool, revision: str) -> None:
    paused = await migrations.pause_auto_migrate(database, revision)
    assert await migrations.find_pause(database) == paused
    await migrations.downgrade(database, revision)
    found = await migrations.find_pause(database)
    assert found is not None
    assert str(found) == str(paused)
    await migrations.upgrade(database)
    assert await migrations.find_pause(database) is None
    assert await database.fetchval(COMMENT) is None


async def test_an_upgrade_to_an_older_revision_stays_paused(database: Pool, tmp_path: Path) -> None:
    options = with_revision(tmp_path, NOTHING)
    await migrations.pause_auto_migrate(database, BEFORE_TABLE)
    await migrations.downgrade(database, BEFORE_TABLE)
    await migrations.upgrade(database, HEAD, options=options)
    assert (await recorded(database)) == [(BEFORE_TABLE, "pause"), *((name, "upgrade") for name in SINCE)]
    assert await migrations.find_pause(database) is not None
    assert (await migrations.upgrade(database, respect_pause=True, options=options)).paused is not None
    assert await migrations.current(database) == HEAD
    await migrations.upgrade(database, options=options)
    assert await migrations.find_pause(database) is None


async def test_takes_over_what_older_versions_kept_as_text(
    empty_target: ConnectTarget, connection: asyncpg.Connection[asyncpg.Record], tmp_path: Path
) -> None:
    await migrations.upgrade(empty_target, BEFORE_TABLE)
    reason = "the schema was taken down to 0003 by an operator on 2026-01-02 at 03:04 UTC"
    await connection.execute(f"COMMENT ON TABLE guildbook_version IS '{COMMENT_PREFIX}{reason}'")
    await connection.executemany(
        "INSERT INTO ops.admin_actions (at, user_id, command, result)"
        " VALUES (now() - $1 * interval '1 day', $2, $3, $4)",
        [
            (9, None, "db upgrade", "applied: 0001, 0002\nthe next start goes on"),
            (8, 7, "db migrate downgrade", "taken back: 0002\nno backup was made before it"),
            (7, None, "db history", "applied: 0009"),
            (6, None, "db upgrade", "Failed: applied: nothing"),
        ],
    )
    assert str(await migrations.find_pause(empty_target)) == reason
    options = with_revision(tmp_path, NOTHING)
    await migrations.upgrade(empty_target, HEAD, options=options)
    rows = await connection.fetch(
        "SELECT revision, action, applied_by, user_id FROM ops.migrations ORDER BY id LIMIT 3"
    )
    assert [tuple(row) for row in rows] == [
        ("0001", "upgrade", "command line", None),
        ("0002", "upgrade", "command line", None),
        ("0002", "downgrade", "discord", 7),
    ]
    found = await migrations.find_pause(empty_target)
    assert found is not None
    assert found.reason == reason
    await migrations.upgrade(empty_target, options=options)
    assert await migrations.find_pause(empty_target) is None


async def test_other_comments_are_left_alone(database: Pool) -> None:
    await database.execute("COMMENT ON TABLE guildbook_version IS 'mind the gap'")
    await migrations.downgrade(database, BEFORE_TABLE)
    assert await migrations.find_pause(database) is None
    await migrations.resume_auto_migrate(database)
    await migrations.upgrade(database)
    assert await database.fetchval(COMMENT) == "mind the gap"


async def test_a_database_without_schema_cannot_be_paused(empty_target: ConnectTarget) -> None:
    assert await migrations.find_pause(empty_target) is None
    with pytest.raises(MigrationError, match="this database has no schema"):
        await migrations.pause_auto_migrate(empty_target, "base")


async def test_an_ordinary_owner_can_pause(empty_target: ConnectTarget) -> None:
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    await connection.execute(
        "DO $$ BEGIN CREATE ROLE plain_owner LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$;"
        f"ALTER DATABASE {empty_target.database} OWNER TO plain_owner"
    )
    await connection.close()
    as_owner = replace(empty_target, user="plain_owner")
    for revision in (BEFORE_TABLE, HEAD):
        await migrations.upgrade(as_owner, revision)
        await migrations.pause_auto_migrate(as_owner, revision)
        assert await migrations.find_pause(as_owner) is not None
        await migrations.resume_auto_migrate(as_owner)
        assert await migrations.find_pause(as_owner) is None

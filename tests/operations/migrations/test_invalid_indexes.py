"""Indexes that a failed CREATE INDEX CONCURRENTLY left behind."""

from __future__ import annotations

import contextlib

import asyncpg
import pytest

from utils.database import Pool
from utils.operations import migrations
from utils.operations.migrations import MigrationOptions, admin, invalid_indexes


async def leave_invalid_index(database: Pool) -> None:
    """Fail a CREATE UNIQUE INDEX CONCURRENTLY on duplicate values."""
    await database.execute(
        "INSERT INTO roles (guild_id, id, name) VALUES (1, 1, 'same'), (1, 2, 'same') ON CONFLICT DO NOTHING"
    )
    connection = await asyncpg.connect(**database.target.connect_kwargs())
    with contextlib.suppress(asyncpg.UniqueViolationError):
        await connection.execute('CREATE UNIQUE INDEX CONCURRENTLY "half Built" ON roles (name)')
        pytest.fail("it was built")
    await connection.close()


async def test_upgrade_drops_invalid_indexes(database: Pool) -> None:
    await leave_invalid_index(database)
    assert await invalid_indexes.find(database) == ['"half Built"']
    assert "half Built" in (await admin.status(database)).text
    outcome = await admin.upgrade(database)
    assert outcome.data["invalid_indexes_dropped"] == ['"half Built"']
    assert "half Built" in outcome.text
    assert await invalid_indexes.find(database) == []
    assert await migrations.check_drift(database) == []


async def test_upgrade_leaves_an_index_that_is_being_built(database: Pool) -> None:
    await leave_invalid_index(database)
    builder = await asyncpg.connect(**database.target.connect_kwargs())
    async with builder.transaction():
        pid = await builder.fetchval("SELECT pg_backend_pid()")
        await builder.execute("LOCK TABLE roles IN SHARE UPDATE EXCLUSIVE MODE")  # as CREATE INDEX CONCURRENTLY does
        outcome = await admin.upgrade(database, options=MigrationOptions(index_lock_timeout="50ms"))
    await builder.close()
    assert not outcome.ok
    assert f"roles is locked by process {pid} " in outcome.text
    assert outcome.data["invalid_indexes_left"] == ['"half Built"']
    assert await invalid_indexes.find(database) == ['"half Built"']


async def test_upgrade_leaves_invalid_indexes_in_other_schemas(database: Pool) -> None:
    await database.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.t (x int); INSERT INTO theirs.t VALUES (1), (1)")
    connection = await asyncpg.connect(**database.target.connect_kwargs())
    with contextlib.suppress(asyncpg.UniqueViolationError):
        await connection.execute("CREATE UNIQUE INDEX CONCURRENTLY u ON theirs.t (x)")
    await connection.close()
    await admin.upgrade(database)
    assert await database.fetchval("SELECT to_regclass('theirs.u') IS NOT NULL")

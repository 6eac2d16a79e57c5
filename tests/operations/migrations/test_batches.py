"""Updating rows in batches: wherever a migration is killed, each row is changed exactly once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from tests.conftest import examples
from tests.operations.migrations.support import EXTRA, HEAD, with_revision
from utils.database import ConnectTarget, Pool
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations.batches import TABLE, BatchProgress, walk
from utils.operations.migrations.preview import preview

ROWS = 40


async def committing(target: ConnectTarget, work: Any) -> Any:
    """Run `work` on a connection that commits every statement, as inside an autocommit_block."""
    engine = create_async_engine(
        target.sqlalchemy_url(),
        connect_args=target.sqlalchemy_connect_args(),
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
    )
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


#: Updating a row that is in `kills` ends the session in the middle of the statement.
KILLER = """
CREATE TABLE things (a int, "B b" timestamptz, value int NOT NULL, PRIMARY KEY (a, "B b"));
CREATE TABLE kills (a int PRIMARY KEY);
CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(5); RETURN NEW; END $$;
CREATE FUNCTION is_deadly(x int) RETURNS boolean LANGUAGE sql STABLE AS 'SELECT EXISTS (SELECT FROM kills WHERE a = x)';
CREATE TRIGGER killer BEFORE UPDATE ON things FOR EACH ROW WHEN (is_deadly(OLD.a)) EXECUTE FUNCTION die();
"""


@given(
    size=st.integers(1, ROWS + 2),
    kills=st.sets(st.integers(0, ROWS - 1), max_size=3),
    stops=st.lists(st.integers(0, ROWS), max_size=3),
)
@examples(15)
async def test_every_kill_point_gives_the_same_result(
    empty_target: ConnectTarget, size: int, kills: set[int], stops: list[int]
) -> None:
    """`kills`: rows at which the session dies. `stops`: numbers of batches after which the process does."""
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public;" + KILLER)
    await conn.execute(
        "INSERT INTO things SELECT i % 7 * 10 + i / 7, timestamptz '2026-01-01 00:00:00.123456Z' + i * interval '1 s',"
        " i FROM generate_series(0, $1::int - 1) AS i",
        ROWS,
    )
    await conn.executemany("INSERT INTO kills VALUES ($1)", [(kill % 7 * 10 + kill // 7,) for kill in kills])
    expected = [3 * i + 1 if i % 3 else i for i in range(ROWS)]
    stops_left = list(stops)

    def run(connection: Connection) -> BatchProgress:
        batches = 0

        def after(state: BatchProgress) -> None:
            nonlocal batches
            batches += 1
            if stops_left and batches > stops_left[0]:
                stops_left.pop(0)
                raise KeyboardInterrupt

        return walk(
            connection, "things", revision="9", size=size, after_batch=after,
            set_sql="value = value * 3 + length('1:2') - 2", where="t.value % 3 <> 0",
        )  # fmt: skip

    done: BatchProgress | None = None
    for _ in range(len(kills) + len(stops) + 1):
        try:
            done = await committing(empty_target, run)
            break
        except KeyboardInterrupt:
            pass
        except DBAPIError:
            await conn.execute("DELETE FROM kills WHERE a = (SELECT min(a) FROM kills WHERE is_deadly(a))")
    while done is None:  # the row that killed was not the smallest of `kills`
        try:
            done = await committing(empty_target, run)
        except DBAPIError:
            await conn.execute("DELETE FROM kills WHERE a = (SELECT min(a) FROM kills)")
        except KeyboardInterrupt:
            pass
    values = sorted(row["value"] for row in await conn.fetch("SELECT value FROM things"))
    await conn.close()
    assert values == sorted(expected)
    assert done == BatchProgress(visited=ROWS, changed=sum(bool(i % 3) for i in range(ROWS)), is_done=True)


FILL = """from utils.operations.migrations.batches import in_batches

def upgrade():
    in_batches(op, "users", revision=revision, set_sql="public_flags = public_flags * 10", size=7)
    {then}

def downgrade():
    pass
"""


async def test_does_not_repeat_batches_after_a_failure(database: Pool, tmp_path: Path) -> None:
    await database.execute(
        "INSERT INTO users (id, username, public_flags) SELECT i, 'amy', 1 FROM generate_series(1, 30) i"
    )
    options = with_revision(tmp_path, FILL.format(then='op.execute("SELECT no_such_thing()")'))
    for _ in range(2):
        with pytest.raises(MigrationError, match="no_such_thing"):
            await migrations.upgrade(database, options=options)
    assert await migrations.current(database) == HEAD
    with_revision(tmp_path, FILL.format(then='op.execute("SELECT 1")'))
    assert await migrations.check_drift(database) == []  # the progress table is not in the models
    await migrations.upgrade(database, options=options)
    assert await migrations.current(database) == EXTRA
    rows = await database.fetch("SELECT DISTINCT public_flags FROM users")
    assert [row[0] for row in rows] == [10]
    assert await database.fetchval("SELECT to_regclass($1)", TABLE) is None


async def test_preview_shows_the_equivalent_update(database: Pool, tmp_path: Path) -> None:
    outcome = await preview(database, options=with_revision(tmp_path, FILL.format(then="pass")))
    assert outcome.file is not None
    assert "UPDATE users AS t SET public_flags = public_flags * 10 WHERE true;" in outcome.file[1]
    assert "changes rows: 1" in outcome.text


async def test_rejects_a_table_without_primary_key(empty_target: ConnectTarget) -> None:
    conn = await asyncpg.connect(**empty_target.connect_kwargs())
    await conn.execute("CREATE TABLE plain (id int)")
    await conn.close()
    for table in ("plain", "nowhere"):
        with pytest.raises(MigrationError, match=f"cannot update {table} in batches"):
            await committing(empty_target, lambda c, table=table: walk(c, table, revision="9", set_sql="id = 1"))
    with pytest.raises(MigrationError, match="at least 1"):
        await committing(empty_target, lambda c: walk(c, "plain", revision="9", set_sql="id = 1", size=0))


async def test_waits_only_for_rows_that_it_changes(database: Pool) -> None:
    await database.execute("INSERT INTO users (id, username) SELECT i, 'amy' FROM generate_series(1, 20) i")
    other = await asyncpg.connect(**database.target.connect_kwargs())
    async with other.transaction():
        await other.execute("SELECT 1 FROM users WHERE id = 3 FOR UPDATE")
        done = await committing(
            database.target,
            lambda c: walk(c, "users", revision="9", set_sql="username = 'ben'", where="t.id <> 3", size=5),
        )
    await other.close()
    assert done.changed == 19

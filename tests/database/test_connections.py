"""Raw connections, in a block and held by hand, and cursors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from tests.database.access import COUNT, PUT, accessed
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.exceptions import DatabaseError, ValidationError

ITEMS = "SELECT item FROM shelf ORDER BY item"


@pytest.fixture
async def db(database: Pool) -> AsyncIterator[Database]:
    async with accessed(database) as access:
        yield access


async def test_a_connection_held_by_hand(db: Database) -> None:
    assert await db.fetchval(COUNT) == 0
    connection = await db.acquire()
    assert await connection.execute(PUT, "apple", 1) == "INSERT 0 1"
    assert await db.fetchval(COUNT) == 1, "the cache knows at once, not only when it is released"
    await connection.executemany(PUT, [("pear", 2)])
    assert await db.fetchval(COUNT) == 2
    await connection.copy_records_to_table("shelf", records=[("plum", 3)], columns=["item", "price"])
    assert await db.fetchval(COUNT) == 3
    assert [row["item"] for row in await connection.fetch(ITEMS)] == ["apple", "pear", "plum"]
    row = await connection.fetchrow("SELECT item, price FROM shelf WHERE item = $1", "pear")
    assert row is not None
    assert await connection.fetchval("SELECT item, price FROM shelf WHERE item = $1", "pear", column=1) == row["price"]
    assert connection.get_server_pid() != 0, "PgBouncer draws one, which may be negative"
    with pytest.raises(asyncpg.UndefinedTableError):
        await connection.execute("SELECT * FROM nowhere")
    assert db.pool.pool_stats()["active"] == 1
    await db.release(connection)
    await connection.release()
    assert db.pool.pool_stats()["active"] == 0


@pytest.mark.direct("a prepared statement belongs to a session")
async def test_writes_on_a_held_connection_are_seen_when_they_are_committed(db: Database) -> None:
    connection = await db.acquire()
    async with connection.transaction():
        await connection.execute(PUT, "apple", 1)
        assert await db.fetchval(COUNT) == 0
        assert await db.fetchval(COUNT) == 0
    assert await db.fetchval(COUNT) == 1
    transaction = connection.transaction(isolation="serializable")
    await transaction.start()
    await connection.execute(PUT, "pear", 2)
    assert await db.fetchval(COUNT) == 1
    await transaction.commit()
    assert await db.fetchval(COUNT) == 2
    await connection.execute("BEGIN")
    statement = await connection.prepare(PUT)
    await statement.fetch("plum", 3)
    assert await db.fetchval(COUNT) == 2
    await connection.execute("COMMIT")
    assert await db.fetchval(COUNT) == 3
    await statement.executemany([("fig", 4)])
    assert await db.fetchval(COUNT) == 4
    async with connection.transaction():
        deleting = await connection.cursor("DELETE FROM shelf WHERE item = 'fig' RETURNING item")
        assert [row["item"] for row in await deleting.fetch(9)] == ["fig"]
    assert await db.fetchval(COUNT) == 3

    async def fail() -> None:
        async with connection.transaction():
            await connection.execute("DELETE FROM shelf")
            await connection.execute("SELECT 1 / 0")

    with pytest.raises(asyncpg.DivisionByZeroError):
        await fail()
    await connection.execute("BEGIN; DELETE FROM shelf")
    await connection.release()
    assert await db.fetchval(COUNT) == 3, "a transaction left open is rolled back"


async def test_an_unanswered_write_on_a_held_connection_is_distrusted(db: Database) -> None:
    assert await db.fetchval(COUNT) == 0
    connection = await db.acquire()
    writing = asyncio.create_task(connection.execute("INSERT INTO shelf (item) SELECT 'apple' FROM pg_sleep(60)"))
    await asyncio.sleep(0.05)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    bypassed = db.get_cache_stats()["bypassed"]
    assert await db.fetchval(COUNT) == 0
    assert db.get_cache_stats()["bypassed"] == bypassed + 1
    await connection.release()


async def test_a_cursor_reads_all_rows_in_parts(db: Database) -> None:
    await db.executemany(PUT, [(f"item {number:02}", number) for number in range(25)])
    expected = [f"item {number:02}" for number in range(5, 25)]
    found = "SELECT item FROM shelf WHERE price >= $1 ORDER BY item"
    assert [row["item"] async for row in db.cursor(found, 5, prefetch=7)] == expected
    async with db.transaction() as transaction:
        await db.execute("DELETE FROM shelf WHERE price = 24")
        seen = []
        async for row in transaction.cursor(found, 5, prefetch=7):
            seen.append(row["item"])
            await db.execute("UPDATE shelf SET price = price WHERE item = $1", row["item"])
        assert seen == expected[:-1], "it sees what its transaction has written"
        cursor = await db.cursor(found, 5)
        first = await cursor.fetchrow()
        assert first is not None
        assert first["item"] == expected[0]
        assert await cursor.forward(2) == 2
        assert [row["item"] for row in await cursor.fetch(100)] == expected[3:-1]
        assert (await cursor.fetch(1), await cursor.fetchrow()) == ([], None)
        with pytest.raises(ValidationError, match="at least 1"):
            await cursor.fetch(0)
    assert await db.fetchval(COUNT) == 24
    with pytest.raises(DatabaseError, match="a cursor lives in a transaction"):
        await db.cursor(found, 5)
    with pytest.raises(DatabaseError, match="nowhere"):
        async for _ in db.cursor("SELECT * FROM nowhere"):
            pass


async def test_a_cursor_that_is_left_early_returns_its_connection(db: Database) -> None:
    await db.executemany(PUT, [(f"item {number:02}", number) for number in range(25)])
    async for row in db.cursor(ITEMS, prefetch=2):
        assert db.pool.pool_stats()["active"] == 1
        assert await db.fetchval("SELECT pg_current_xact_id_if_assigned() IS NULL", use_cache=False), row
        break
    async with asyncio.timeout(30):
        while db.pool.pool_stats()["active"]:  # noqa: ASYNC110 - the loop's hook for generators ends it
            await asyncio.sleep(0)
    assert await db.fetchval(COUNT) == 25


async def test_a_cursor_that_writes_drops_cached_results(db: Database) -> None:
    await db.execute(PUT, "apple", 1)
    assert await db.fetchval(COUNT) == 1
    assert [row["item"] async for row in db.cursor("DELETE FROM shelf RETURNING item")] == ["apple"]
    assert await db.fetchval(COUNT) == 0


async def test_cursors_need_no_named_statements_behind_a_pooler(target: ConnectTarget) -> None:
    pool = Pool(replace(target, pooled=True), pool_max=2)
    await pool.connect()
    async with accessed(pool) as db:
        await db.executemany(PUT, [("apple", 1), ("pear", 2)])
        assert [row["item"] async for row in db.cursor(ITEMS, prefetch=1)] == ["apple", "pear"]
        async with db.transaction():
            cursor = await db.cursor(ITEMS)
            assert await db.fetchval(COUNT) == 2, "another statement in between"
            assert [row["item"] for row in await cursor.fetch(5)] == ["apple", "pear"]
            assert await db.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
    await pool.close()

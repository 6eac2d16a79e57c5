"""Transactions of cogs: bound to their context, nested, shared with SQLAlchemy, named, and ended with the bot."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from models import Channel
from tests.database.access import COUNT, PRICE, PUT, accessed
from utils.database import Pool
from utils.database.access import Database
from utils.exceptions import DatabaseError, DatabaseUnavailable

STEAL = "SELECT pg_terminate_backend($1)"


@pytest.fixture
async def db(database: Pool) -> AsyncIterator[Database]:
    async with accessed(database) as access:
        yield access


async def test_a_block_is_atomic(db: Database) -> None:
    async with db.transaction():
        await db.execute(PUT, "apple", 1)
        assert await db.fetchval(PRICE, "apple") == 1
        assert await db.pool.fetchval(COUNT) == 0
    assert await db.fetchval(COUNT) == 1
    with pytest.raises(RuntimeError):
        async with await db.transaction():
            await db.execute(PUT, "pear", 1)
            raise RuntimeError
    assert await db.fetchval(COUNT) == 1


async def test_an_inner_block_rolls_back_alone(db: Database) -> None:
    async with db.transaction():
        await db.execute(PUT, "apple", 1)
        with pytest.raises(RuntimeError):
            async with db.transaction():
                await db.execute(PUT, "apple", 2)
                async with db.transaction():
                    await db.execute(PUT, "pear", 3)
                raise RuntimeError
        assert await db.fetchval(PRICE, "apple") == 1
        async with db.transaction():
            await db.execute(PUT, "plum", 4)
    assert [row["item"] for row in await db.fetch("SELECT item FROM shelf ORDER BY item")] == ["apple", "plum"]


async def test_a_failed_statement_aborts_unless_in_an_inner_block(db: Database) -> None:
    with pytest.raises(DatabaseError, match="nothing was committed"):
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            with pytest.raises(DatabaseError, match="does not exist"):
                await db.execute("SELECT * FROM nowhere")
            with pytest.raises(DatabaseError, match="savepoint"):
                await db.fetchval(COUNT)
    assert await db.fetchval(COUNT) == 0
    async with db.transaction():
        await db.execute(PUT, "apple", 1)
        with pytest.raises(DatabaseError, match="does not exist"):
            async with db.transaction():
                await db.execute("SELECT * FROM nowhere")
        assert await db.fetchval(COUNT) == 1
    assert await db.fetchval(COUNT) == 1


async def test_raw_statements_and_sessions_share_a_transaction(db: Database) -> None:
    with pytest.raises(RuntimeError):
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            async with db.session() as session:
                session.add(Channel(guild_id=1, id=2, type=0, name="a", permission_overwrites=[{"id": 5}]))
            assert await db.fetchval("SELECT name FROM channels") == "a"
            raise RuntimeError
    assert await db.fetchval(COUNT) == await db.fetchval("SELECT count(*) FROM channels") == 0
    async with db.transaction():
        await db.execute(PUT, "apple", 1)
        async with db.session() as session:
            assert await session.scalar(text(COUNT)) == 1
            session.add(Channel(guild_id=1, id=2, type=0, name="a", permission_overwrites=[{"id": 5}]))
    row = await db.fetchrow("SELECT name, permission_overwrites FROM channels")
    assert row is not None
    assert tuple(row) == ("a", [{"id": 5}])
    assert await db.fetchval(COUNT) == 1


async def test_a_failed_session_rolls_back_to_its_savepoint(db: Database) -> None:
    async with db.transaction():
        await db.execute(PUT, "apple", 1)
        with pytest.raises(DatabaseError) as raised:
            async with db.session() as session:
                await session.execute(text("INSERT INTO shelf (item) VALUES ('apple')"))
        assert isinstance(raised.value.__cause__, IntegrityError)
        await db.execute(PUT, "pear", 2)
    assert await db.fetchval(COUNT) == 2


async def test_json_is_the_same_raw_and_orm(db: Database) -> None:
    value = {"a": [1, {"b": None}], "c": "ä"}
    await db.execute("INSERT INTO shelf (item, extra) VALUES ('x', $1)", value)
    async with db.transaction():
        await db.execute("INSERT INTO shelf (item, extra) VALUES ('y', $1)", value)
        assert await db.fetchval("SELECT extra FROM shelf WHERE item = 'x'") == value
    async with db.session() as session:
        session.add(Channel(guild_id=1, id=2, type=0, permission_overwrites=value))
    async with db.session() as session:
        found = await session.get(Channel, (1, 2))
        assert found is not None
        overwrites: object = found.permission_overwrites
        assert overwrites == value
    assert await db.fetchval("SELECT extra FROM shelf WHERE item = 'y'") == value
    assert await db.fetchval("SELECT jsonb_typeof(permission_overwrites) FROM channels") == "object"


async def test_tasks_inherit_the_transaction(db: Database) -> None:
    with pytest.raises(RuntimeError):
        async with db.transaction():
            await asyncio.gather(*(db.execute(PUT, f"apple {n}", n) for n in range(10)))
            assert await asyncio.wait_for(db.fetchval(COUNT), 10) == 10
            raise RuntimeError
    assert await db.fetchval(COUNT) == 0


async def test_tasks_outside_the_transaction_use_the_pool(
    db: Database,
) -> None:
    is_over = asyncio.Event()

    async def later() -> int:
        await is_over.wait()
        await db.execute(PUT, "late", 1)
        return int(await db.fetchval(COUNT))

    async with db.transaction():
        task = asyncio.create_task(later())
        await db.execute(PUT, "apple", 1)
        outside = asyncio.get_running_loop().create_task(db.fetchval(COUNT), context=contextvars.Context())
        assert await outside == 0
    is_over.set()
    assert await task == 2


async def test_transactions_of_different_tasks_are_separate(db: Database) -> None:
    is_written, is_seen = asyncio.Event(), asyncio.Event()

    async def write() -> None:
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            is_written.set()
            await is_seen.wait()

    async def read() -> int:
        async with db.transaction():
            await is_written.wait()
            seen = int(await db.fetchval(COUNT))
        is_seen.set()
        return seen

    _, seen = await asyncio.gather(write(), read())
    assert seen == 0
    assert await db.fetchval(COUNT) == 1


async def test_a_cancelled_block_is_rolled_back(db: Database) -> None:
    began = asyncio.Event()

    async def work() -> None:
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            began.set()
            await db.execute("SELECT pg_sleep(60)")

    for _ in range(4):  # more often than there are connections
        task = asyncio.create_task(work())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        began.clear()
    async with db.transaction():
        assert await db.fetchval(COUNT) == 0


async def test_isolation_is_set_on_the_outermost_transaction(db: Database) -> None:
    async with db.transaction(isolation="serializable", readonly=True):
        assert await db.fetchval("SHOW transaction_isolation") == "serializable"
        with pytest.raises(DatabaseError, match="outermost"):
            await db.transaction(isolation="serializable").__aenter__()
        with pytest.raises(DatabaseError, match="read-only"):
            async with db.transaction():
                await db.execute(PUT, "apple", 1)
    async with db.transaction():
        assert await db.fetchval("SHOW transaction_isolation") == "read committed"
        await db.execute(PUT, "apple", 1)
    with pytest.raises(DatabaseError, match="unknown"):
        db.transaction(isolation="dirty")  # type: ignore[call-overload]


async def test_closing_rolls_back_open_transactions(db: Database) -> None:
    is_open, may_go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with db.transaction("buying"):
            await db.execute(PUT, "apple", 1)
            is_open.set()
            await may_go_on.wait()
            await db.execute(PUT, "pear", 1)

    task = asyncio.create_task(work())
    await is_open.wait()
    (listed,) = db.get_stats()["transactions"]
    assert (listed["name"], listed["statements"]) == ("buying", 1)
    assert listed["age"] >= 0
    await db.close(5.0)
    may_go_on.set()
    with pytest.raises(DatabaseError, match="buying was rolled back: the bot is stopping"):
        await task
    assert await db.pool.fetchval(COUNT) == 0
    assert db.get_stats()["transactions"] == []


async def test_the_default_name_is_the_calling_function(db: Database) -> None:
    async with db.transaction() as transaction:
        assert transaction.name == "test_the_default_name_is_the_calling_function"
        await transaction.execute(PUT, "apple", 1)
        assert await transaction.fetchval(COUNT) == transaction.statements - 1 == 1
        assert transaction.age > 0


async def test_a_lost_connection_fails_only_its_transaction(db: Database) -> None:
    with pytest.raises(DatabaseUnavailable):
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            pid = await db.fetchval("SELECT pg_backend_pid()")
            await db.pool.fetchval(STEAL, pid)
            await db.fetchval(COUNT)
    async with db.transaction():
        assert await db.fetchval(COUNT) == 0


async def test_execute_in_transaction(db: Database) -> None:
    words = await db.execute_in_transaction([(PUT, ("apple", 1)), (PUT, ("pear", 2)), ("DELETE FROM shelf", ())])
    assert words == ["INSERT 0 1", "INSERT 0 1", "DELETE 2"]
    with pytest.raises(DatabaseError, match="nowhere"):
        await db.execute_in_transaction([(PUT, ("apple", 1)), ("DELETE FROM nowhere", ())])
    assert await db.fetchval(COUNT) == 0


async def test_waiting_for_a_connection_times_out(database: Pool) -> None:
    database.acquire_timeout = 0.2
    async with accessed(database, orm_connections=1) as db, db.transaction("the holder"):
        other = asyncio.get_running_loop().create_task(_open(db), context=contextvars.Context())
        with pytest.raises(DatabaseUnavailable, match="no connection for a transaction"):
            await other


async def _open(db: Database) -> None:
    async with db.transaction():
        pass

"""Transactions as callbacks, by name and repeated after conflicts; the queue for their connections; held sessions."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import logging
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from models import User
from tests.database.access import COUNT, PRICE, PUT, accessed
from tests.database.test_pool_health import behind_a_network
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.database.connection_queue import ConnectionQueue
from utils.database.transactions import Transaction
from utils.exceptions import DatabaseError, DatabaseUnavailable, Declined, TransactionConflict

TAKE = "UPDATE shelf SET price = price - 1 WHERE item = $1"


@pytest.fixture
async def db(database: Pool) -> AsyncIterator[Database]:
    async with accessed(database, orm_connections=4) as access:
        yield access


async def test_a_callback_runs_in_a_transaction(db: Database) -> None:
    async def put(transaction: Transaction, item: str = "apple") -> int:
        await transaction.execute(PUT, item, 1)
        await db.executemany(PUT, [("pear", 2)])
        assert await db.pool.fetchval(COUNT) == 0
        return int(await transaction.fetchval("SELECT item, price FROM shelf ORDER BY item", column="price"))

    async def fail() -> None:
        await db.execute(PUT, "plum", 3)
        raise Declined("no")

    assert await db.transaction(put) == 1
    with pytest.raises(Declined):
        await db.transaction(fail, isolation="serializable")
    assert await db.fetchval(COUNT) == 2


async def test_crossing_transfers_all_succeed(db: Database) -> None:
    items = [f"item {number}" for number in range(4)]
    await db.executemany(PUT, [(item, 100) for item in items])
    attempts = 0

    async def move(giver: str, taker: str) -> None:
        nonlocal attempts
        attempts += 1
        await db.execute(TAKE, giver)
        await db.execute("SELECT pg_sleep(0.005)")
        await db.execute("UPDATE shelf SET price = price + 1 WHERE item = $1", taker)

    pairs = [(giver, taker) for giver in items for taker in items if giver != taker]
    await db.pool.execute(f"ALTER DATABASE {db.pool.target.database} SET deadlock_timeout = '10ms'")
    await db.renew()
    await asyncio.gather(
        *(db.run(functools.partial(move, *pair), attempts=1_000, seconds=60, timeout=60) for pair in pairs)
    )
    prices = [row["price"] for row in await db.fetch("SELECT price FROM shelf")]
    assert prices == [100] * 4
    assert attempts > len(pairs), "no deadlock happened: the test shows nothing"


async def test_refuses_what_is_no_coroutine_function(db: Database) -> None:
    with pytest.raises(DatabaseError, match=r"<lambda> is not a coroutine function: define it with async def"):
        await db.run(lambda: 1)  # type: ignore[arg-type]
    unused = db.execute(PUT, "never", 1)
    with pytest.raises(DatabaseError, match="a coroutine function, without parentheses"):
        await db.run(unused)  # type: ignore[arg-type]
    unused.close()


async def test_only_conflicts_are_repeated(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[BaseException] = []

    async def fail(error: BaseException) -> None:
        attempts.append(error)
        await db.execute(PUT, f"attempt {len(attempts)}", 1)
        raise error

    for error in (Declined("no"), DatabaseUnavailable("away"), RuntimeError("broken")):
        with pytest.raises(type(error)):
            await db.run(functools.partial(fail, error))
    assert len(attempts) == 3
    conflict = TransactionConflict("deadlock", sqlstate="40P01")
    with caplog.at_level(logging.WARNING), pytest.raises(TransactionConflict):
        await db.run(functools.partial(fail, conflict), attempts=3, name="the move")
    assert len(attempts) == 6
    assert "the move failed after 3 attempts: deadlock" in caplog.messages
    async with db.transaction():
        with pytest.raises(TransactionConflict):
            await db.run(functools.partial(fail, conflict))
        assert await db.fetchval(COUNT) == 0, "the inner block was rolled back"
    assert len(attempts) == 7, "only the outermost transaction can be repeated"


async def test_operations_are_retried_with_context(db: Database, caplog: pytest.LogCaptureFixture) -> None:
    attempts = 0

    async def operation() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise LookupError("not yet")
        return "done"

    policy: dict[str, Any] = {"first_seconds": 0.001, "factor": 1.0, "max_seconds": 0.002}
    with caplog.at_level(logging.INFO):
        assert await db.execute_with_retry(operation, context="load shops", errors=(LookupError,), **policy) == "done"
    assert caplog.messages.count("retrying load shops") == 2
    attempts = -10
    with pytest.raises(LookupError) as raised:
        await db.execute_with_retry(operation, "load shops", attempts=4, errors=(LookupError,), **policy)
    assert attempts == -6
    assert "load shops failed after 4 attempts: not yet" in caplog.messages
    assert raised.value.__notes__ == ["load shops failed after 4 attempts"]


async def test_named_transactions(db: Database) -> None:
    assert await db.begin_transaction("sale", isolation="repeatable_read") == "sale"
    assert await db.fetchval(COUNT) == 0
    assert await db.execute_in_transaction("sale", PUT, "apple", 1) == "INSERT 0 1"

    async def elsewhere() -> None:
        async with db.in_transaction("sale"):
            await db.execute(PUT, "pear", 2)
            async with db.session() as session:
                assert await session.scalar(text(COUNT)) == 2

    await asyncio.get_running_loop().create_task(elsewhere(), context=contextvars.Context())
    assert await db.fetchval(COUNT) == 0, "what is in no block is not in the transaction"
    with pytest.raises(DatabaseError, match="there is an open transaction 'sale'"):
        await db.begin_transaction("sale")
    summary = await db.commit_transaction("sale")
    assert summary["operations"] == 3 + 2, "the savepoint of the session counts"
    assert 0 < summary["duration"] < 60
    assert await db.fetchval(COUNT) == 2, "its commit has dropped the cached result"
    with pytest.raises(DatabaseError, match="no open transaction 'sale'"):
        await db.execute_in_transaction("sale", PUT, "plum", 3)

    await db.begin_transaction("sale")
    await db.execute_in_transaction("sale", "DELETE FROM shelf")
    assert (await db.rollback_transaction("sale"))["operations"] == 1
    assert await db.fetchval(COUNT) == 2
    assert db.orm.stats()["active"] == 0


async def test_a_forgotten_named_transaction_is_rolled_back(db: Database) -> None:
    await db.begin_transaction("sale", limit=0.05)
    await db.execute_in_transaction("sale", PUT, "apple", 1)
    await until(lambda: db.orm.stats()["active"] == 0)
    with pytest.raises(DatabaseError, match=r"sale was rolled back: it was open for more than 0\.05 s"):
        await db.commit_transaction("sale")
    assert await db.fetchval(COUNT) == 0
    await db.begin_transaction("sale")
    await db.close(5.0)
    assert db.orm.stats()["active"] == 0


# --- the queue


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
async def test_connections_go_to_the_first_in_the_queue(yields: list[int]) -> None:
    queue, served = ConnectionQueue(1, 60.0), []

    async def take(number: int, turns: int) -> None:
        await queue.wait(60.0)
        served.append(number)
        for _ in range(turns):
            await asyncio.sleep(0)
        queue.cancel()
        await queue.wait(60.0)  # comes back at once, and has to go to the end
        served.append(len(yields) + number)
        queue.cancel()

    await queue.wait(60.0)
    tasks = [asyncio.create_task(take(number, turns)) for number, turns in enumerate(yields)]
    await asyncio.sleep(0)
    assert queue.waiting == len(yields)
    queue.cancel()
    await asyncio.gather(*tasks)
    assert served == list(range(2 * len(yields)))


async def test_an_overtaking_transaction_waits_its_turn(database: Pool) -> None:
    order: list[str] = []
    async with accessed(database, orm_connections=1) as db:

        async def take(name: str) -> None:
            async with db.transaction(name, timeout=30):
                order.append(name)

        async with db.transaction("first"):
            waiting = asyncio.get_running_loop().create_task(take("second"), context=contextvars.Context())
            await until(lambda: db.orm.stats()["waiting"] == 1)
        await take("third")
        await waiting
    assert order == ["second", "third"]


async def test_a_full_queue_names_the_holders_once(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with accessed(database, orm_connections=2, transaction_timeout=0.05) as db:

        async def ask() -> None:
            async with db.transaction():
                pass

        async with db.transaction("counting sheep"):
            session = await asyncio.get_running_loop().create_task(_held(db), context=contextvars.Context())
            for _ in range(2):
                refused = asyncio.get_running_loop().create_task(ask(), context=contextvars.Context())
                with pytest.raises(DatabaseUnavailable, match=r"there are 2 .*counting sheep .*test_scopes.*_held"):
                    await refused
            await session.close()
        (line,) = [record for record in caplog.records if "no connection for a transaction" in record.message]
        assert "_held" in line.message
        await ask()


async def _held(db: Database) -> AsyncSession:
    session = await db.session()
    await session.execute(text("SELECT 1"))
    return session


async def test_a_transaction_may_wait_longer(database: Pool) -> None:
    async with accessed(database, orm_connections=1, transaction_timeout=0.01) as db:

        async def wait() -> int:
            async with db.transaction(timeout=60):
                return int(await db.fetchval(COUNT))

        async with db.transaction():
            waiting = asyncio.get_running_loop().create_task(wait(), context=contextvars.Context())
            await until(lambda: db.orm.stats()["waiting"] == 1)
            await asyncio.sleep(0.05)  # longer than transaction_timeout
        assert await waiting == 0


async def test_cancelled_waiters_leave_the_queue(database: Pool) -> None:
    async with accessed(database, orm_connections=1) as db:

        async def ask() -> None:
            async with db.transaction():
                pass

        async with db.transaction():
            loop = asyncio.get_running_loop()
            tasks = [loop.create_task(ask(), context=contextvars.Context()) for _ in range(3)]
            await until(lambda: db.orm.stats()["waiting"] == 3)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await ask()
        assert db.orm.stats() == {"size": 1, "active": 0, "max": 1, "waiting": 0}


# --- sessions held by hand


async def test_a_session_held_by_hand(db: Database) -> None:
    names = "SELECT username FROM users ORDER BY id"
    assert await db.fetch(names) == []
    session = await db.session()
    user = User(id=1, username="one")
    session.add(user)
    await session.commit()
    assert [row["username"] for row in await db.fetch(names)] == ["one"]
    await session.refresh(user)
    found = (await session.execute(select(User))).scalar_one()
    assert found is user
    await session.rollback()
    async with session.begin():
        found.username = "renamed"
    assert [row["username"] for row in await db.fetch(names)] == ["renamed"]
    found.username = "never committed"
    await session.flush()
    assert [row["username"] for row in await db.fetch(names)] == ["renamed"]
    await session.close()
    assert [row["username"] for row in await db.fetch(names, use_cache=False)] == ["renamed"]
    assert db.orm.stats()["active"] == 0
    assert db.orm.holders.longest() == []


async def test_a_held_session_used_by_other_tasks_is_tracked(db: Database) -> None:
    session = await db.session()

    async def add() -> None:
        session.add(User(id=1))
        await session.commit()

    assert await db.fetchval("SELECT count(*) FROM users") == 0
    await asyncio.get_running_loop().create_task(add(), context=contextvars.Context())
    assert await db.fetchval("SELECT count(*) FROM users") == 1
    await session.close()


async def test_a_held_session_joins_the_open_transaction(db: Database) -> None:
    async def work() -> None:
        session = await db.session()
        session.add(User(id=1))
        await session.commit()
        assert await db.fetchval("SELECT count(*) FROM users") == 1
        await session.close()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await db.transaction(work)
    assert await db.fetchval("SELECT count(*) FROM users") == 0


async def test_a_failed_commit_by_hand_raises_and_frees_the_connection(db: Database) -> None:
    session = await db.session()
    session.add_all([User(id=1), User(id=2)])
    await session.commit()
    session.expunge_all()
    session.add(User(id=1))
    with pytest.raises(IntegrityError):
        await session.commit()
    await session.rollback()
    session.add(User(id=3))
    await session.commit()
    await session.close()
    assert await db.fetchval("SELECT count(*) FROM users") == 3


async def test_a_commit_without_an_answer_is_distrusted(db: Database) -> None:
    count = "SELECT count(*) FROM users"
    assert await db.fetchval(count) == 0
    session = await db.session()
    session.add(User(id=1))
    await session.flush()
    pid = await session.scalar(text("SELECT pg_backend_pid()"))
    await db.pool.fetchval("SELECT pg_terminate_backend($1)", pid)
    alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"

    async def is_gone() -> bool:
        return bool(await db.pool.fetchval(alive, pid) == 0)

    await until(is_gone)
    with pytest.raises(Exception, match=r"clos|terminat"):
        await session.commit()
    await session.close()
    bypassed = db.get_cache_stats()["bypassed"]
    assert await db.fetchval(count) == 0
    assert db.get_cache_stats()["bypassed"] == bypassed + 1


@pytest.mark.direct("it cuts the connection to the server")
async def test_a_held_session_says_that_the_database_is_away(target: ConnectTarget) -> None:
    async with behind_a_network(target, 1) as (pool, network), accessed(pool) as db:
        network.cut()
        session = await db.session()
        with pytest.raises(DatabaseUnavailable):
            await session.execute(text("SELECT 1"))
        await session.close()
        network.heal()
        session = await db.session()
        assert await session.scalar(text("SELECT 1")) == 1
        await session.close()
        assert db.orm.stats()["active"] == 0


async def test_a_session_that_was_never_closed_frees_its_place(database: Pool) -> None:
    async with accessed(database, orm_connections=1) as db:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            await _held(db)
            gc.collect()
        async with db.transaction():
            assert await db.fetchval(COUNT) == 0


async def test_prices_stay_isolated(db: Database) -> None:
    await db.execute(PUT, "apple", 1)
    async with db.transaction():
        await db.execute(TAKE, "apple")
        outside = asyncio.get_running_loop().create_task(db.fetchval(PRICE, "apple"), context=contextvars.Context())
        assert (await db.fetchval(PRICE, "apple"), await outside) == (0, 1)
    assert await db.fetchval(PRICE, "apple") == 0

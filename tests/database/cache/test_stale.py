"""Old results during an outage, for those who ask for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from simulator.proxy import Proxy
from tests.database.access import COUNT, PRICE, PUT, accessed
from tests.database.test_pool_health import behind_a_network
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.exceptions import DatabaseError, DatabaseUnavailable, TransactionConflict

pytestmark = pytest.mark.direct("it cuts the connection to the server")

HOUR = 3600


@asynccontextmanager
async def behind(target: ConnectTarget) -> AsyncIterator[tuple[Database, Proxy]]:
    async with behind_a_network(target, 2) as (pool, network), accessed(pool) as db:
        db.stale.patience = 0.2
        try:
            yield db, network
        finally:
            network.heal()


async def test_serves_the_last_result_while_the_database_is_away(
    target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    async with behind(target) as (db, network):
        await db.execute(PUT, "apple", 1)
        assert await db.fetchval(PRICE, "apple", stale_if_error=HOUR) == 1
        row = await db.fetchrow("SELECT item, extra FROM shelf", stale_if_error=HOUR)
        await db.execute("UPDATE shelf SET extra = $1", {"tags": ["red"]})
        assert (await db.fetch("SELECT extra FROM shelf", stale_if_error=HOUR))[0]["extra"] == {"tags": ["red"]}
        network.cut()
        for _ in range(2):
            assert await db.fetchval(PRICE, "apple", stale_if_error=HOUR, use_cache=False) == 1
            (found,) = await db.fetch("SELECT extra FROM shelf", stale_if_error=HOUR, use_cache=False)
            assert found["extra"] == {"tags": ["red"]}
            found["extra"]["tags"].append("the reader's own")
        assert await db.fetchrow("SELECT item, extra FROM shelf", stale_if_error=HOUR, use_cache=False) == row
        assert db.get_cache_stats()["stale_served"] == 5
        assert [record.levelno for record in caplog.records if "served old" in record.message] == [logging.WARNING]
        for other in (db.fetchval(PRICE, "pear", stale_if_error=HOUR), db.fetchval(PRICE, "apple", use_cache=False)):
            with pytest.raises(DatabaseUnavailable):
                await other


async def test_a_frozen_database_is_not_waited_for(target: ConnectTarget) -> None:
    async with behind(target) as (db, network):
        await db.execute(PUT, "apple", 1)
        assert await db.fetchval(PRICE, "apple", stale_if_error=HOUR) == 1
        network.freeze()
        async with asyncio.timeout(10):
            for _ in range(5):  # more often than there are connections
                assert await db.fetchval(PRICE, "apple", stale_if_error=HOUR, use_cache=False) == 1
        assert db.pool_stats()["active"] == 1, "one read is under way, and the others wait for it"
        network.heal()
        await db.execute(PUT, "apple", 2)

        async def is_fresh() -> bool:
            return await db.fetchval(PRICE, "apple", as_=int, stale_if_error=HOUR, use_cache=False) == 2

        await until(is_fresh)


async def test_too_old_results_are_not_served(target: ConnectTarget) -> None:
    async with behind(target) as (db, network):
        now = 0.0
        db.stale.clock = lambda: now
        await db.execute(PUT, "apple", 1)
        assert await db.fetchval(PRICE, "apple", stale_if_error=60) == 1
        network.cut()
        now = 59.0
        assert await db.fetchval(PRICE, "apple", stale_if_error=60, use_cache=False) == 1
        now = 61.0
        with pytest.raises(DatabaseUnavailable):
            await db.fetchval(PRICE, "apple", stale_if_error=60, use_cache=False)
        assert await db.fetchval(PRICE, "apple", stale_if_error=90, use_cache=False) == 1


async def test_transactions_and_other_errors_get_no_old_results(database: Pool) -> None:
    async with accessed(database) as db:
        await db.execute(PUT, "apple", 1)
        assert await db.fetchval(PRICE, "apple", stale_if_error=HOUR) == 1

        async def read() -> None:
            await db.pool.fetchval("SELECT pg_terminate_backend($1)", await db.fetchval("SELECT pg_backend_pid()"))
            await db.fetchval(PRICE, "apple", stale_if_error=HOUR)

        with pytest.raises(DatabaseUnavailable):
            await db.transaction(read)
        await db.pool.execute("ALTER TABLE shelf RENAME COLUMN price TO cost")
        with pytest.raises(DatabaseError, match="price"):
            await db.fetchval(PRICE, "apple", stale_if_error=HOUR, use_cache=False)
        assert db.get_cache_stats()["stale_served"] == 0


async def test_a_forgotten_result_is_not_served(target: ConnectTarget) -> None:
    async with behind(target) as (db, network):
        assert await db.fetchval(COUNT, stale_if_error=HOUR) == 0
        db.forget(COUNT)
        network.cut()
        with pytest.raises(DatabaseUnavailable):
            await db.fetchval(COUNT, stale_if_error=HOUR, use_cache=False)


async def test_a_read_that_was_overtaken_by_a_write_is_not_remembered(database: Pool) -> None:
    async with accessed(database) as db:
        gate = asyncio.Event()

        async def old() -> int:
            await gate.wait()
            return 1

        async def fail() -> int:
            raise DatabaseUnavailable("away")

        async def conflict() -> int:
            raise TransactionConflict("deadlock")

        reading = asyncio.create_task(db.stale.read(("key",), HOUR, "sql", old))
        await asyncio.sleep(0)
        db.stale.forget(("key",))
        gate.set()
        assert await reading == 1
        with pytest.raises(DatabaseUnavailable):
            await db.stale.read(("key",), HOUR, "sql", fail)
        assert await db.stale.read(("key",), HOUR, "sql", old) == 1
        with pytest.raises(TransactionConflict):
            await db.stale.read(("key",), HOUR, "sql", conflict)
        assert await db.stale.read(("key",), HOUR, "sql", fail) == 1

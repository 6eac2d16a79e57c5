"""The verbs of cogs, what they leave behind (nothing), and what they tell about themselves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from models import User
from tests.database.access import COUNT, PRICE, PUT, accessed
from utils.database import Pool
from utils.database.access import Database
from utils.exceptions import DatabaseError


@pytest.fixture
async def db(database: Pool) -> AsyncIterator[Database]:
    async with accessed(database, orm_connections=1) as access:
        yield access


async def test_every_verb_does_what_it_says(db: Database) -> None:
    assert await db.execute(PUT, "apple", 1) == "INSERT 0 1"
    await db.execute_many(PUT, [("pear", 2), ("plum", 3)])
    assert await db.copy_records_to_table("shelf", records=[("fig", 4)], columns=["item", "price"]) == "COPY 1"
    assert [row["item"] for row in await db.fetch("SELECT item FROM shelf ORDER BY price")] == [
        "apple", "pear", "plum", "fig",
    ]  # fmt: skip
    row = await db.fetchrow("SELECT item, price FROM shelf WHERE price = $1", 4)
    assert row is not None
    assert tuple(row) == ("fig", 4)
    assert await db.fetchrow("SELECT 1 FROM shelf WHERE price = $1", 9) is None
    assert await db.fetchval(COUNT) == 4
    with pytest.raises(DatabaseError):
        await db.execute_many(PUT, [("kiwi", 5), ("lime", None), ("apple", "no number")])
    assert await db.fetchval(COUNT) == 4


@pytest.mark.parametrize("way", ["execute", "many", "copy", "transaction", "session", "borrowed", "borrowed copy"])
async def test_whatever_writes_is_seen_at_once_by_cached_reads(db: Database, way: str) -> None:
    assert await db.fetchval(COUNT) == 0
    assert await db.fetchval(COUNT) == 0
    assert db.get_cache_stats()["hits"] == 1
    if way == "execute":
        await db.execute(PUT, "apple", 1)
    elif way == "many":
        await db.execute_many(PUT, [("apple", 1)])
    elif way == "copy":
        await db.copy_records_to_table("shelf", records=[("apple", 1)], columns=["item", "price"])
    elif way == "transaction":
        async with db.transaction():
            await db.copy_records_to_table("shelf", records=[("apple", 1)], columns=["item", "price"])
    elif way == "session":
        from sqlalchemy import text

        async with db.sessions() as session:
            await session.execute(text("INSERT INTO shelf (item) VALUES ('apple')"))
    elif way == "borrowed":
        async with db.acquire() as connection, connection.transaction():
            await connection.execute(PUT, "apple", 1)
    else:
        async with db.acquire() as connection:
            await connection.copy_records_to_table("shelf", records=[("apple", 1)], columns=["item", "price"])
    assert await db.fetchval(COUNT) == 1


async def test_objects_of_sqlalchemy_make_cached_reads_go_too(db: Database) -> None:
    names = "SELECT username FROM users ORDER BY id"
    assert await db.fetch(names) == []
    async with db.sessions() as session:
        session.add_all([User(id=n, username=f"user {n}") for n in range(1, 50)])
    assert len(await db.fetch(names)) == 49
    async with db.sessions() as session:
        found = await session.get(User, 1)
        assert found is not None
        found.username = "renamed"
        await session.commit()
        assert (await db.fetch(names))[0]["username"] == "renamed"
        await session.delete(found)
    assert len(await db.fetch(names)) == 48


async def test_what_is_rolled_back_is_never_read(db: Database) -> None:
    with pytest.raises(RuntimeError):
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            assert await db.fetchval(COUNT) == 1
            raise RuntimeError
    assert await db.fetchval(COUNT) == 0


async def test_the_cache_can_be_passed_by_or_asked_anew(db: Database, database: Pool) -> None:
    await db.execute(PUT, "apple", 1)
    assert await db.fetchval(PRICE, "apple") == 1
    await database.execute(PUT, "apple", 2)  # from elsewhere, and nobody says so
    assert await db.fetchval(PRICE, "apple") == 1
    assert await db.fetchval(PRICE, "apple", use_cache=False) == 2
    assert await db.fetchval(PRICE, "apple") == 1
    assert await db.fetchval(PRICE, "apple", invalidate_cache=True) == 2
    assert await db.fetchval(PRICE, "apple") == 2


LEAKS = {
    "setting": ("SET work_mem = '7MB'", "SHOW work_mem", "7MB"),
    "lock": ("SELECT pg_advisory_lock(77)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", 1),
    "temporary table": ("CREATE TEMP TABLE leaked (a int)", "SELECT to_regclass('pg_temp.leaked') IS NOT NULL", True),
    "listener": ("LISTEN somewhere", "SELECT count(*) FROM pg_listening_channels()", 1),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("way", ["verb", "transaction", "borrowed"])
async def test_nothing_leaks_to_the_next_user_of_a_connection(target: Any, leak: str, way: str) -> None:
    do, ask, leaked = LEAKS[leak]
    database = Pool(target, pool_max=1)
    await database.connect()
    async with accessed(database, orm_connections=1) as db:
        if way == "verb":
            await db.execute(do)
            seen = await db.fetchval(ask, use_cache=False)
        elif way == "borrowed":
            async with db.acquire() as connection:
                await connection.execute(do)
                assert await connection.fetchval(ask) == leaked
            seen = await db.fetchval(ask, use_cache=False)
        else:
            async with db.transaction():
                await db.execute(do)
                pid = await db.fetchval("SELECT pg_backend_pid()")
            async with db.transaction():
                assert await db.fetchval("SELECT pg_backend_pid()") == pid
                seen = await db.fetchval(ask)
        assert seen != leaked
    await database.close()


async def test_a_transaction_that_a_borrower_leaves_open_is_rolled_back(target: Any) -> None:
    database = Pool(target, pool_max=1)
    await database.connect()
    async with accessed(database) as db:
        async with db.acquire() as connection:
            await connection.execute("BEGIN")
            await connection.execute(PUT, "apple", 1)
        assert await db.fetchval(COUNT) == 0
        assert await db.fetchval("SELECT pg_current_xact_id_if_assigned() IS NULL", use_cache=False)
    await database.close()


async def test_a_named_statement_outlives_its_connections(db: Database) -> None:
    statement = await db.prepare_statement("price of", PRICE)
    await db.execute(PUT, "apple", 1)
    assert await statement.fetchval("apple") == 1
    await db.pool.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                            "AND datname = current_database()")  # fmt: skip
    await db.pool.renew()
    assert await statement.fetchval("apple") == 1
    assert [tuple(row) for row in await statement.fetch("apple")] == [(1,)]
    assert (await statement.fetchrow("pear"), await statement.execute("apple")) == (None, "SELECT 1")
    assert db.prepare_statement("price of", PRICE) is statement
    assert db.get_stats()["prepared"] == {"price of": PRICE}
    with pytest.raises(DatabaseError, match="exists with different SQL"):
        db.prepare_statement("price of", COUNT)
    with pytest.raises(DatabaseError, match="nowhere"):
        await db.prepare_statement("broken", "SELECT * FROM nowhere")


async def test_a_slow_statement_is_logged_with_who_asked_and_without_its_arguments(
    database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    async with accessed(database, slow_ms=50) as db:
        with caplog.at_level(logging.WARNING, "utils.database.statements"):
            await db.fetchval("SELECT pg_sleep($1), 'x' || $2", 0.06, "secret")
            await db.fetchval("SELECT 1")
        (record,) = [record for record in caplog.records if record.name == "utils.database.statements"]
        (kept,) = db.get_stats()["slow"]
    assert "test_access_statements.py" in record.__dict__["caller"]
    assert "test_a_slow_statement" in kept["caller"]
    assert kept["ms"] >= 60
    assert "secret" not in str(record.__dict__)


async def test_in_development_every_statement_is_logged(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with accessed(database, log_queries=True) as db:
        with caplog.at_level(logging.INFO, "utils.database.statements"):
            await db.fetchval("SELECT   1")
    assert "SELECT 1" in [record.__dict__.get("sql") for record in caplog.records]


async def test_a_plan_can_be_had_and_analysing_changes_nothing(db: Database) -> None:
    assert "shelf" in await db.explain(PRICE, "apple")
    plan = await db.explain(PUT, "apple", 1, analyze=True)
    assert "actual" in plan
    assert await db.fetchval(COUNT) == 0


async def test_health_says_whether_the_database_answers(db: Database) -> None:
    health = await db.check_connection_health()
    assert health["healthy"]
    assert health["error"] is None
    assert health["latency_ms"] > 0
    assert (await db.validate_connections())["replaced"] == 0
    await db.pool.close()
    health = await db.check_connection_health()
    assert not health["healthy"]
    assert "not connected" in health["error"]


async def test_materialized_views_are_refreshed_in_their_order_and_one_that_fails_costs_itself_alone(
    db: Database,
) -> None:
    for statement in (
        "CREATE MATERIALIZED VIEW zebra AS SELECT item, price FROM shelf",
        "CREATE UNIQUE INDEX ON zebra (item)",
        "CREATE MATERIALIZED VIEW ant AS SELECT count(*) AS items FROM zebra",
        "CREATE MATERIALIZED VIEW broken AS SELECT 1 / count(*) AS x FROM shelf WITH NO DATA",
    ):
        await db.execute(statement)
    with pytest.raises(DatabaseError, match=r"1 of 3 .* public.broken: division by zero"):
        await db.refresh_materialized_views()
    await db.execute(PUT, "apple", 1)
    assert await db.fetchval("SELECT items FROM ant") == 0
    seconds = await db.refresh_materialized_views(["ant", "public.zebra"])
    assert list(seconds) == ["public.zebra", "public.ant"]
    assert await db.fetchval("SELECT items FROM ant") == 1
    with pytest.raises(DatabaseError, match=r"no materialized view public\.nowhere"):
        await db.refresh_materialized_views(["nowhere"])


async def test_statistics_tell_pools_cache_and_transactions(db: Database) -> None:
    async with db.transaction("counting"):
        stats = db.get_stats()
        assert [entry["name"] for entry in stats["transactions"]] == ["counting"]
        assert stats["orm"] == {"size": 1, "active": 1, "max": 1}
    assert {"hits", "misses", "hit_rate", "evictions", "invalidations", "total_requests", "size"} <= set(stats["cache"])
    assert {"created", "active", "idle", "waiting"} <= set(stats["pool"])


async def test_after_a_change_of_the_schema_everything_goes_on(db: Database) -> None:
    await db.execute(PUT, "apple", 1)
    every = "SELECT * FROM shelf"
    assert len(await db.fetch(every)) == 1
    async with db.sessions():
        pass
    await db.pool.execute("ALTER TABLE shelf ADD COLUMN weight int")
    await db.renew()
    assert "weight" in (await db.fetch(every))[0].keys()  # noqa: SIM118 - a record's `in` looks at values


async def test_cancelling_one_of_many_readers_does_not_cost_the_others_their_answer(db: Database) -> None:
    slow = "SELECT item, (SELECT count(*) FROM generate_series(1, 300000)) FROM shelf"
    await db.execute(PUT, "apple", 1)
    readers = [asyncio.create_task(db.fetch(slow)) for _ in range(5)]
    await asyncio.sleep(0)
    readers[0].cancel()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert [len(rows) for rows in results[1:] if not isinstance(rows, BaseException)] == [1] * 4

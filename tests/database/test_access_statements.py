"""The verbs of `Database`, resetting of connections, caching, logs and statistics."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import text

from models import User
from tests.database.access import COUNT, PRICE, PUT, accessed
from utils.database import ConnectTarget, Pool, ownership
from utils.database.access import Database
from utils.exceptions import DatabaseError, DatabaseUnavailable, ValidationError


@pytest.fixture
async def db(database: Pool) -> AsyncIterator[Database]:
    async with accessed(database, orm_connections=1) as access:
        yield access


async def test_verbs(db: Database) -> None:
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
async def test_cached_reads_see_every_kind_of_write(db: Database, way: str) -> None:
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

        async with db.session() as session:
            await session.execute(text("INSERT INTO shelf (item) VALUES ('apple')"))
    elif way == "borrowed":
        async with db.acquire() as connection, connection.transaction():
            await connection.execute(PUT, "apple", 1)
    else:
        async with db.acquire() as connection:
            await connection.copy_records_to_table("shelf", records=[("apple", 1)], columns=["item", "price"])
    assert await db.fetchval(COUNT) == 1


async def test_orm_writes_invalidate_cached_reads(db: Database) -> None:
    names = "SELECT username FROM users ORDER BY id"
    assert await db.fetch(names) == []
    async with db.session() as session:
        session.add_all([User(id=n, username=f"user {n}") for n in range(1, 50)])
    assert len(await db.fetch(names)) == 49
    async with db.session() as session:
        found = await session.get(User, 1)
        assert found is not None
        found.username = "renamed"
        await session.commit()
        assert (await db.fetch(names))[0]["username"] == "renamed"
        await session.delete(found)
    assert len(await db.fetch(names)) == 48


async def test_rolled_back_writes_are_never_read(db: Database) -> None:
    with pytest.raises(RuntimeError):
        async with db.transaction():
            await db.execute(PUT, "apple", 1)
            assert await db.fetchval(COUNT) == 1
            raise RuntimeError
    assert await db.fetchval(COUNT) == 0


async def test_reads_can_bypass_or_refresh_the_cache(db: Database, database: Pool) -> None:
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
async def test_connections_are_reset_for_the_next_user(target: Any, leak: str, way: str) -> None:
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


async def test_a_transaction_left_open_on_a_raw_connection_is_rolled_back(target: Any) -> None:
    database = Pool(target, pool_max=1)
    await database.connect()
    async with accessed(database) as db:
        async with db.acquire() as connection:
            await connection.execute("BEGIN")
            await connection.execute(PUT, "apple", 1)
        assert await db.fetchval(COUNT) == 0
        assert await db.fetchval("SELECT pg_current_xact_id_if_assigned() IS NULL", use_cache=False)
    await database.close()


async def test_prepared_statements_survive_their_connections(db: Database) -> None:
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


async def test_slow_statements_are_logged_without_arguments(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with accessed(database, slow_ms=50) as db:
        with caplog.at_level(logging.WARNING, "utils.database.statements"):
            await db.fetchval("SELECT pg_sleep($1), 'x' || $2", 0.06, "secret")
            await db.fetchval("SELECT 1")
        records = [record for record in caplog.records if record.name == "utils.database.statements"]
        (record,) = [record for record in records if "pg_sleep" in str(record.__dict__)]
        (kept,) = [entry for entry in db.get_stats()["slow"] if "pg_sleep" in entry["sql"]]
    assert "test_access_statements.py" in record.__dict__["caller"]
    assert "test_slow_statements" in kept["caller"]
    assert kept["ms"] >= 60
    assert "secret" not in str(record.__dict__)


async def test_the_slow_log_shows_the_wait_for_a_connection_apart(target: ConnectTarget) -> None:
    pool = Pool(target, pool_max=1, connect_timeout=10)
    await pool.connect()
    async with accessed(pool, slow_ms=90) as db:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(db.fetchval("SELECT pg_sleep(0.2)"))
            await asyncio.sleep(0.05)
            tasks.create_task(db.fetchval("SELECT 1"))  # waits for the only connection, and is fast
            tasks.create_task(db.fetchval("SELECT pg_sleep(0.1)"))
        slow = {entry["sql"]: entry for entry in db.get_stats()["slow"]}
    await pool.close()
    assert slow.keys() == {"SELECT pg_sleep(0.2)", "SELECT pg_sleep(0.1)"}
    first, second = slow.values()
    assert first["waited_ms"] < 100 <= second["waited_ms"]
    assert second["ms"] >= 100


async def test_the_slow_log_covers_sessions_repositories_and_raw_connections(database: Pool) -> None:
    async with accessed(database, slow_ms=50) as db:
        async with db.session() as session:
            await session.execute(text("SELECT pg_sleep(0.06), 'a session'"))
        async with db.transaction(), db.session() as session:
            await session.execute(text("SELECT pg_sleep(0.06), 'in a transaction'"))
        async with db.acquire() as connection:
            await connection.fetch("SELECT pg_sleep(0.06), 'raw'")
        async with db.session() as session:
            await session.execute(text("SELECT 1"))
        slow = db.get_stats()["slow"]
    assert [entry["sql"].split("'")[1] for entry in slow] == ["a session", "in a transaction", "raw"]
    assert all("test_access_statements.py" in entry["caller"] for entry in slow)
    assert all("test_the_slow_log_covers" in entry["caller"] for entry in slow)


async def test_exhausted_sessions_name_their_holders(target: ConnectTarget) -> None:
    pool = Pool(target, pool_max=2, connect_timeout=10, acquire_timeout=0.1)
    await pool.connect()
    async with accessed(pool, orm_connections=1) as db:

        async def hold() -> None:
            async with db.transaction("counting sheep"):
                pass

        async with db.session() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(DatabaseUnavailable, match=r"held by .*test_access_statements\.py:\d+ test_exhausted"):
                await hold()
        async with db.transaction("counting sheep"):
            refused = asyncio.create_task(hold(), context=contextvars.Context())
            with pytest.raises(DatabaseUnavailable, match=r"held by counting sheep \(.*\) for \d"):
                await refused
        assert not db.orm.holders
    await pool.close()


async def test_all_statements_are_logged_in_development(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with accessed(database, log_queries=True) as db:
        with caplog.at_level(logging.INFO, "utils.database.statements"):
            await db.fetchval("SELECT   1")
    assert "SELECT 1" in [record.__dict__.get("sql") for record in caplog.records]


async def test_explain_changes_nothing(db: Database) -> None:
    assert "shelf" in await db.explain(PRICE, "apple")
    plan = await db.explain(PUT, "apple", 1, analyze=True)
    assert "actual" in plan
    assert await db.fetchval(COUNT) == 0


async def test_health_check(db: Database) -> None:
    health = await db.check_connection_health()
    assert health
    assert health["healthy"]
    assert health["error"] is None
    assert health["latency_ms"] > 0
    assert (await db.validate_connections())["replaced"] == 0
    await db.pool.close()
    health = await db.check_connection_health()
    assert not health
    assert not health["healthy"]
    assert "not connected" in health["error"]


async def test_refreshes_views_in_order_despite_failures(
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
        await db.refresh_materialized_views(["zebra", "ant", "broken"])
    await db.execute(PUT, "apple", 1)
    assert await db.fetchval("SELECT items FROM ant") == 0
    seconds = await db.refresh_materialized_views(["ant", "public.zebra"])
    assert list(seconds) == ["public.zebra", "public.ant"]
    assert await db.fetchval("SELECT items FROM ant") == 1
    with pytest.raises(DatabaseError, match=r"no materialized view public\.nowhere"):
        await db.refresh_materialized_views(["nowhere"])


async def test_refreshes_views_of_other_programs_only_if_they_are_named(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for statement in (
        "CREATE MATERIALIZED VIEW ours AS SELECT count(*) AS n FROM shelf",
        "CREATE MATERIALIZED VIEW theirs AS SELECT count(*) AS n FROM shelf",
    ):
        await db.execute(statement)
    owned = replace(ownership.owned(), views=frozenset([(None, "ours")]))
    monkeypatch.setattr(ownership, "owned", lambda: owned)
    assert list(await db.refresh_materialized_views()) == ["public.ours"]
    assert list(await db.refresh_materialized_views(["theirs"])) == ["public.theirs"]


async def test_statistics(db: Database) -> None:
    async with db.transaction("counting"):
        stats = db.get_stats()
        assert [entry["name"] for entry in stats["transactions"]] == ["counting"]
        assert stats["orm"] == {"size": 1, "active": 1, "max": 1, "waiting": 0}
    assert {"hits", "misses", "hit_rate", "evictions", "invalidations", "total_requests", "size"} <= set(stats["cache"])
    assert {"created", "active", "idle", "waiting"} <= set(stats["pool"])


async def test_renew_after_a_schema_change(db: Database) -> None:
    await db.execute(PUT, "apple", 1)
    every = "SELECT * FROM shelf"
    assert len(await db.fetch(every)) == 1
    async with db.session():
        pass
    await db.pool.execute("ALTER TABLE shelf ADD COLUMN weight int")
    await db.renew()
    assert "weight" in (await db.fetch(every))[0].keys()  # noqa: SIM118 - a record's `in` looks at values


async def test_cancelling_one_reader_does_not_affect_the_others(db: Database) -> None:
    slow = "SELECT item, (SELECT count(*) FROM generate_series(1, 300000)) FROM shelf"
    await db.execute(PUT, "apple", 1)
    readers = [asyncio.create_task(db.fetch(slow)) for _ in range(5)]
    await asyncio.sleep(0)
    readers[0].cancel()
    results = await asyncio.gather(*readers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert [len(rows) for rows in results[1:] if not isinstance(rows, BaseException)] == [1] * 4


UNANALYSABLE = "SELECT count(*) FROM shelf WHERE random() >= 0"


async def test_reads_makes_any_query_cacheable(db: Database) -> None:
    assert await db.fetchval(UNANALYSABLE) == 0
    assert await db.fetchval(UNANALYSABLE) == 0
    assert db.get_cache_stats()["hits"] == 0
    assert await db.fetchval(UNANALYSABLE, reads=("shelf",)) == 0
    assert await db.fetchval(UNANALYSABLE, reads=("shelf",)) == 0
    assert db.get_cache_stats()["hits"] == 1
    await db.execute(PUT, "apple", 1)
    assert await db.fetchval(UNANALYSABLE, reads=("public.shelf",)) == 1
    assert await db.fetchval(UNANALYSABLE, reads=("shelf",)) == 1
    await db.execute(PUT, "pear", 1)
    assert len(await db.fetch("SELECT item FROM shelf", reads=("shelf",))) == 2


async def test_reads_of_a_view_follows_its_tables(db: Database) -> None:
    await db.pool.execute("CREATE VIEW cheap AS SELECT item FROM shelf WHERE price < 5")
    await db.renew()
    count = "SELECT count(*) FROM cheap"
    assert await db.fetchval(count, reads=("cheap",)) == 0
    await db.execute(PUT, "apple", 1)
    assert await db.fetchval(count, reads=("cheap",)) == 1


@pytest.mark.parametrize(
    ("sql", "reads", "message"),
    [
        (COUNT, ("shelve",), "no table or view 'shelve'"),
        (COUNT, "shelf", "sequence of names"),
        ("INSERT INTO shelf VALUES ('x') RETURNING 1", ("shelf",), "only for a single SELECT"),
        ("WITH gone AS (DELETE FROM shelf RETURNING 1) SELECT 1", ("shelf",), "only for a single SELECT"),
        ("SELECT 1; SELECT 2", ("shelf",), "only for a single SELECT"),
        ("SELECT * FROM shelf FOR UPDATE", ("shelf",), "only for a single SELECT"),
    ],
)
async def test_rejects_reads_that_cannot_be_right(db: Database, sql: str, reads: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        await db.fetch(sql, reads=reads)


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_writes_names_what_a_statement_writes(db: Database, in_transaction: bool) -> None:
    await db.pool.execute(
        "CREATE FUNCTION put(name text) RETURNS void LANGUAGE sql VOLATILE AS 'INSERT INTO shelf VALUES (name)'"
    )
    await db.renew()
    names = "SELECT username FROM users"
    assert (await db.fetchval(COUNT), await db.fetch(names)) == (0, [])
    if in_transaction:
        async with db.transaction():
            await db.execute("SELECT put('apple')", writes=("shelf",))
    else:
        await db.execute("SELECT put('apple')", writes=("shelf",))
    hits = db.get_cache_stats()["hits"]
    assert (await db.fetchval(COUNT), await db.fetch(names)) == (1, [])
    assert db.get_cache_stats()["hits"] == hits + 1, "the result of the other table was kept"
    with pytest.raises(ValidationError, match="no table or view 'shelve'"):
        await db.execute("SELECT put('pear')", writes=("shelve",))
    assert await db.fetchval(COUNT, use_cache=False) == 1


async def test_writes_may_be_empty(db: Database) -> None:
    assert await db.fetchval(COUNT) == 0
    await db.execute("DO $$ BEGIN END $$", writes=())
    assert await db.fetchval(COUNT) == 0
    assert db.get_cache_stats()["hits"] == 1


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize("way", ["execute", "execute_many", "executemany", "copy"])
async def test_writes_can_keep_cached_results(db: Database, way: str, in_transaction: bool) -> None:
    assert await db.fetchval(COUNT) == 0
    async with db.transaction() if in_transaction else contextlib.nullcontext():
        if way == "execute":
            await db.execute(PUT, "apple", 1, invalidate_cache=False)
        elif way == "copy":
            await db.copy_records_to_table(
                "shelf", records=[("apple", 1)], columns=["item", "price"], invalidate_cache=False
            )
        else:
            await getattr(db, way)(PUT, [("apple", 1)], invalidate_cache=False)
    assert await db.fetchval(COUNT) == 0
    assert await db.fetchval(COUNT, use_cache=False) == 1
    await db.execute(PUT, "pear", 1)
    assert await db.fetchval(COUNT) == 2


async def test_cache_statistics_are_in_percent_with_and_without_await(db: Database, database: Pool) -> None:
    for _ in range(3):
        await db.fetchval(COUNT)
    stats = await db.get_cache_stats()
    assert stats == db.get_cache_stats()
    assert f"{stats['hit_rate']}%" == "66.67%"
    async with accessed(database, cached=False) as uncached:
        assert set((await uncached.get_cache_stats()).values()) == {0}

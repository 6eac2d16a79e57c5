"""Unannounced poolers are recognised, and everything works through them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import asyncpg
import pytest
from sqlalchemy import text

from tests.database.access import PRICE, PUT, accessed
from tests.database.pooler import needs_pgbouncer, pgbouncer
from utils.database import ConnectTarget, Pool
from utils.database.cache import QueryCache
from utils.database.cache.channel import Channel
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.upkeep import maintain

pytestmark = [needs_pgbouncer, pytest.mark.direct("it starts a pooler of its own")]


async def test_an_unannounced_pooler_is_recognised(target: ConnectTarget, caplog: pytest.LogCaptureFixture) -> None:
    async with pgbouncer(target) as behind:
        pool = Pool(behind, connect_timeout=10)
        with caplog.at_level(logging.WARNING, "utils.database.pool"):
            await pool.connect()
        try:
            assert pool.target.pooled
            assert pool.direct.pooled
            assert pool.target.connect_kwargs()["statement_cache_size"] == 0
            (line,) = [record.getMessage() for record in caplog.records if record.name == "utils.database.pool"]
            assert "is a pooler: assuming transaction mode" in line
            assert "DATABASE_UNPOOLED_URL" in line
        finally:
            await pool.close()


async def test_a_server_is_not_taken_for_a_pooler(target: ConnectTarget) -> None:
    pool = Pool(replace(target, is_declared=False), connect_timeout=10)
    await pool.connect()
    try:
        assert not pool.target.pooled
    finally:
        await pool.close()


async def test_the_address_may_say_that_sessions_are_kept(target: ConnectTarget) -> None:
    async with pgbouncer(target, mode="session") as behind:
        pool = Pool(replace(behind, is_declared=True), connect_timeout=10)
        await pool.connect()
        try:
            assert not pool.target.pooled
        finally:
            await pool.close()


async def test_a_pooled_direct_address_is_recognised(target: ConnectTarget) -> None:
    async with pgbouncer(target) as behind:
        pool = Pool(target, direct=behind, connect_timeout=10)
        await pool.connect()
        try:
            assert (pool.target.pooled, pool.direct.pooled) == (False, True)
        finally:
            await pool.close()


async def test_a_second_start_meets_no_foreign_statements(target: ConnectTarget) -> None:
    async with pgbouncer(target, size=1) as behind:
        # What a careless client leaves behind: statements under the names that asyncpg chooses.
        careless = await asyncpg.connect(**(behind.connect_kwargs() | {"server_settings": {}}))
        for number in range(1, 40):
            await careless.execute(f"PREPARE __asyncpg_stmt_{number:x}__ AS SELECT 'wrong'")
        await careless.close()
        for _ in range(2):
            pool = Pool(behind, connect_timeout=10)
            await pool.connect()
            async with accessed(pool) as db:
                await db.execute(PUT, "apple", 1)
                assert await db.fetchval(PRICE, "apple", use_cache=False) == 1
                async with db.transaction():
                    await db.execute(PUT, "apple", 2)
                async with db.session() as session:
                    assert (await session.execute(text("SELECT price FROM shelf"))).scalar() == 2
                statement = await db.prepare_statement("price", PRICE)
                assert await statement.fetchval("apple") == 2
            await pool.close()


async def test_many_tasks_share_few_backends(target: ConnectTarget) -> None:
    async with pgbouncer(target, size=3) as behind:
        pool = Pool(behind, pool_max=8, connect_timeout=10)
        await pool.connect()
        async with accessed(pool, orm_connections=4) as db:

            async def work(number: int) -> None:
                await db.execute(PUT, f"item {number}", number)
                async with db.transaction():
                    assert await db.fetchval(PRICE, f"item {number}") == number
                    async with db.session() as session:
                        found = await session.execute(text(PRICE.replace("$1", ":item")), {"item": f"item {number}"})
                        assert found.scalar() == number
                async with db.session() as session:
                    found = await session.execute(text(PRICE.replace("$1", ":item")), {"item": f"item {number}"})
                    assert found.scalar() == number
                assert await db.fetchval(PRICE, f"item {number}", use_cache=False) == number

            async with asyncio.timeout(60):
                await asyncio.gather(*(work(number) for number in range(60)))
        await pool.close()


async def test_transactions_replace_the_limits_of_the_role(target: ConnectTarget) -> None:
    async with pgbouncer(target, size=1) as behind:
        pool = Pool(behind, connect_timeout=10)
        await pool.connect()
        await pool.execute("ALTER ROLE CURRENT_USER SET statement_timeout = '90s'")
        try:
            await pool.close()
            pool = Pool(behind, connect_timeout=10)
            await pool.connect()
            async with accessed(pool) as db:
                async with db.transaction():
                    assert await db.fetchval("SHOW statement_timeout") == "0"
                async with db.session() as session:
                    assert (await session.execute(text("SHOW statement_timeout"))).scalar() == "0"
        finally:
            await pool.execute("ALTER ROLE CURRENT_USER RESET statement_timeout")
            await pool.close()


async def test_migrations_pass_through_a_pooler(empty_target: ConnectTarget) -> None:
    async with pgbouncer(empty_target, size=2) as behind:
        for _ in range(2):
            pool = Pool(behind, connect_timeout=10)
            await pool.connect()
            await asyncio.wait_for(migrations.upgrade(pool), 60)
            assert not await migrations.pending(pool)
            await pool.close()
        await _assert_no_trace(empty_target)


async def test_concurrent_migrations_through_a_pooler_take_turns(empty_target: ConnectTarget) -> None:
    async with pgbouncer(empty_target, size=6) as behind:
        pool = Pool(behind, connect_timeout=10)
        await pool.connect()
        async with asyncio.timeout(100):
            await asyncio.gather(migrations.upgrade(pool), migrations.upgrade(pool))
        applied = await pool.fetch("SELECT revision, count(*) AS times FROM ops.migrations GROUP BY revision")
        assert {row["times"] for row in applied} == {1}
        await pool.close()
        await _assert_no_trace(empty_target)


async def test_maintenance_through_a_pooler_is_exclusive(target: ConnectTarget) -> None:
    async with pgbouncer(target, size=4) as behind:
        pool = Pool(behind, connect_timeout=10)
        await pool.connect()
        assert (await maintain.maintain(pool)).ok
        await pool.execute("INSERT INTO guilds (id, name) VALUES (1, 'one')")  # to be analyzed
        watch = await asyncpg.connect(**target.connect_kwargs())
        await watch.fetchval("SELECT pg_advisory_lock($1)", maintain.LOCK_KEY)
        with pytest.raises(MigrationError, match="another process maintains"):
            await maintain.maintain(pool)
        await watch.close()
        await pool.close()
        await _assert_no_trace(target)


async def _assert_no_trace(target: ConnectTarget) -> None:
    """Assert that nothing is locked and that no backend of the pooler kept a setting."""
    watch = await asyncpg.connect(**target.connect_kwargs())
    assert await watch.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    names = await watch.fetch("SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
    assert not [row["application_name"] for row in names if "migration" in row["application_name"]]
    await watch.close()


async def test_nothing_listens_through_a_pooler(target: ConnectTarget) -> None:
    async with pgbouncer(target) as behind:
        pool = Pool(behind, connect_timeout=10)
        await pool.connect()
        cache = QueryCache()
        await cache.load(pool)
        channel = Channel(cache, pool.direct, pool)
        await asyncio.wait_for(channel.start(), 3)
        assert not channel.is_listening
        await channel.stop()
        await cache.close()
        await pool.close()

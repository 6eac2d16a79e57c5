"""The pool's own health: what it counts, and how it gets over connections that have died."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from simulator.proxy import Proxy
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.database.embedded import PORT, EmbeddedServer
from utils.exceptions import DatabaseUnavailable

#: Nothing here may take longer, in seconds.
PATIENCE = 20.0


@contextlib.asynccontextmanager
async def warm(target: ConnectTarget, connections: int) -> AsyncIterator[Pool]:
    """Lend a pool with so many idle connections."""
    db = Pool(target, pool_max=connections, connect_timeout=10, command_timeout=10, acquire_timeout=10)
    await db.connect()
    try:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(connections):
                await stack.enter_async_context(db.acquire())
        yield db
    finally:
        async with asyncio.timeout(PATIENCE):
            await db.close(timeout=5)


@contextlib.asynccontextmanager
async def behind_a_network(target: ConnectTarget, connections: int) -> AsyncIterator[tuple[Pool, Proxy]]:
    async with Proxy(f"{target.hosts[0]}/.s.PGSQL.{PORT}") as network:
        reached = replace(target, hosts=("127.0.0.1",), ports=(network.port,), sslmode="disable")
        async with warm(reached, connections) as db:
            yield db, network


async def test_pool_stats(target: ConnectTarget) -> None:
    async with warm(target, 2) as db:
        assert db.pool_stats() == {
            "created": 2,
            "destroyed": 0,
            "active": 0,
            "idle": 2,
            "waiting": 0,
            "size": 2,
            "max": 2,
        }
        async with db.acquire(), db.acquire() as conn:
            third = asyncio.create_task(db.fetchval("SELECT 3"))
            await until(lambda: db.pool_stats()["waiting"])
            assert db.pool_stats() == {
                "created": 2,
                "destroyed": 0,
                "active": 2,
                "idle": 0,
                "waiting": 1,
                "size": 2,
                "max": 2,
            }
            conn.terminate()
        assert await third == 3
        assert db.pool_stats()["created"] >= 2
        assert db.pool_stats()["waiting"] == 0


async def test_keeps_connections_that_answer(target: ConnectTarget) -> None:
    async with warm(target, 3) as db:
        assert await db.validate_connections() == {"checked": 3, "replaced": 0}
        assert db.pool_stats() == {
            "created": 3,
            "destroyed": 0,
            "active": 0,
            "idle": 3,
            "waiting": 0,
            "size": 3,
            "max": 3,
        }


async def test_ignores_connections_in_use(target: ConnectTarget) -> None:
    async with warm(target, 3) as db, db.acquire() as conn, conn.transaction():
        assert await db.validate_connections() == {"checked": 2, "replaced": 0}
        assert await conn.fetchval("SELECT 1") == 1


@pytest.mark.direct("it ends the backends of sessions")
async def test_replaces_terminated_connections(target: ConnectTarget) -> None:
    async with warm(target, 3) as db:
        other = await asyncpg.connect(**target.connect_kwargs())
        ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1 AND pid <> $2"
        assert await other.fetchval(ended, target.database, other.get_server_pid()) >= 3
        async with asyncio.timeout(PATIENCE):
            while await other.fetchval(ended, target.database, other.get_server_pid()):  # until they are gone
                pass
        await db.validate_connections()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):  # every one that it lends from now on works
                conn = await stack.enter_async_context(db.acquire())
                assert await conn.fetchval("SELECT 1") == 1
        assert await db.validate_connections() == {"checked": 3, "replaced": 0}
        await other.close()


@pytest.mark.direct("it cuts the connection to the server")
async def test_replaces_silent_connections(
    target: ConnectTarget,
) -> None:
    async with behind_a_network(target, 3) as (db, network):
        network.freeze()
        async with asyncio.timeout(PATIENCE):
            assert await db.validate_connections(timeout=0.3) == {"checked": 3, "replaced": 3}
        assert not await db.check(timeout=0.3)
        network.heal()
        await until(db.check)
        assert await db.fetchval("SELECT 1") == 1
        assert db.pool_stats()["created"] > 3


@pytest.mark.direct("it cuts the connection to the server")
async def test_survives_an_unreachable_database(target: ConnectTarget) -> None:
    async with behind_a_network(target, 2) as (db, network):
        network.cut()
        async with asyncio.timeout(PATIENCE):
            checked = await db.validate_connections(timeout=1.0)
        assert set(checked) == {"checked", "replaced"}
        assert not await db.check(timeout=1.0)
        with pytest.raises(DatabaseUnavailable):
            await db.fetchval("SELECT 1")
        network.heal()
        assert await db.check()
        assert await db.fetchval("SELECT 1") == 1


@pytest.mark.direct("it cuts the connection to the server")
async def test_a_cancelled_check_returns_its_connections(target: ConnectTarget) -> None:
    async with behind_a_network(target, 3) as (db, network):
        network.freeze()
        checking = asyncio.create_task(db.validate_connections(timeout=60))
        async with asyncio.timeout(PATIENCE):
            while db.pool_stats()["active"] < 3:  # noqa: ASYNC110 - it is counted, not announced
                await asyncio.sleep(0)
            checking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await checking
        network.heal()
        async with contextlib.AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
            for _ in range(3):
                await stack.enter_async_context(db.acquire())


async def test_checks_nothing_before_connect(target: ConnectTarget) -> None:
    assert await Pool(target).validate_connections() == {"checked": 0, "replaced": 0}


@pytest.mark.direct("the pooler keeps a connection to the database")
async def test_a_database_being_renamed_is_transient(target: ConnectTarget, server: EmbeddedServer) -> None:
    database = Pool(target, pool_min=0, pool_max=2)  # which makes no connection by itself
    await database.connect()
    access = Database(database)
    home = await asyncpg.connect(**server.target("postgres").connect_kwargs())
    name = target.database
    try:
        assert await database.fetchval("SELECT 1") == 1
        await home.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", name)
        await home.execute(f'ALTER DATABASE "{name}" RENAME TO "{name}_away"')
        try:
            with pytest.raises(DatabaseUnavailable, match="a restore may be replacing it"):
                await until_asked_anew(database)
            with pytest.raises(DatabaseUnavailable, match="a restore may be replacing it"):
                await access.orm.connect()
        finally:
            await home.execute(f'ALTER DATABASE "{name}_away" RENAME TO "{name}"')
        assert await database.fetchval("SELECT 1") == 1
    finally:
        await home.close()
        await access.close()
        await database.close()


@pytest.mark.direct("the pooler keeps a connection to the database")
async def test_a_database_that_accepts_no_connections_is_unavailable(
    target: ConnectTarget, server: EmbeddedServer
) -> None:
    database = Pool(target, pool_min=0, pool_max=2)
    await database.connect()
    access = Database(database)
    home = await asyncpg.connect(**server.target("postgres").connect_kwargs())
    name = target.database
    try:
        await home.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS false')
        await home.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", name)
        with pytest.raises(DatabaseUnavailable, match="accepts no connections at the moment"):
            await until_asked_anew(database)
        with pytest.raises(DatabaseUnavailable, match="accepts no connections at the moment"):
            await access.orm.connect()
        await home.execute(f'ALTER DATABASE "{name}" WITH ALLOW_CONNECTIONS true')
        assert await database.fetchval("SELECT 1") == 1
    finally:
        await home.close()
        await access.close()
        await database.close()


async def until_asked_anew(database: Pool) -> None:
    """Ask until the answer comes, or does not, on a new connection: those that were ended are noticed one by one."""
    for _ in range(20):
        try:
            await database.fetchval("SELECT 1")
        except DatabaseUnavailable as error:
            if error.sqlstate in ("3D000", "55000"):
                raise

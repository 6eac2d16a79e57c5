"""Two processes on one database, each with a pool, a cache and a channel of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import asyncpg
import pytest

from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.database.cache import Channel, QueryCache

#: Timeout of every step, in seconds.
PATIENCE = 20.0
UPDATE = "UPDATE counter SET value = value + 1 WHERE id = $1 RETURNING value"


#: Seconds by which answers of the database are delayed in this context.
lateness: ContextVar[float] = ContextVar("lateness", default=0.0)


class LateAccess(Database):
    """A `Database` whose answers may be delayed."""

    async def _run(self, *given: Any) -> Any:
        result = await super()._run(*given)
        await asyncio.sleep(lateness.get())
        return result


class Undo(Exception):
    """Ends a transaction without a commit."""


class Process:
    """The pool, cache and channel of one process."""

    def __init__(self, target: ConnectTarget) -> None:
        self.database = Pool(target, pool_max=4, connect_timeout=10, acquire_timeout=10)
        #: Terminates backends even when the pool is exhausted.
        self.operator = Pool(target, pool_max=2, connect_timeout=10, acquire_timeout=10)
        self.cache = QueryCache()
        self.access = LateAccess(self.database, cache=self.cache)
        self.channel = Channel(self.cache, target, self.database)

    async def start(self) -> None:
        await self.database.connect()
        await self.operator.connect()
        await self.cache.load(self.database)
        await self.channel.start()

    async def stop(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.access.close()
            await self.channel.stop()
            await self.cache.close()
            await self.database.close()
            await self.operator.close()

    async def read(self, sql: str, *args: Any, late: float = 0) -> Any:
        """Read through the cache. An answer of the database is delayed by `late` seconds."""
        token = lateness.set(late)
        try:
            return await self.access.fetchval(sql, *args)
        finally:
            lateness.reset(token)

    async def write(self, sql: str, *args: Any, commit: bool = True, killed: bool = False) -> Any:
        """Write in a transaction that is committed, rolled back, or loses its connection before the end."""
        value = None
        with contextlib.suppress(Undo):
            async with self.access.transaction():
                value = await self.access.fetchval(sql, *args)
                if killed:
                    pid = await self.access.fetchval("SELECT pg_backend_pid()")
                    await self.operator.execute("SELECT pg_terminate_backend($1)", pid)
                if not commit:
                    raise Undo
        return value

    async def kill_channel(self) -> None:
        """Terminate the backend of the listening connection, if it is still there."""
        connection = self.channel._connection
        if connection is not None:
            with contextlib.suppress(asyncpg.InterfaceError):
                await self.operator.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())


@contextlib.asynccontextmanager
async def started(target: ConnectTarget) -> AsyncIterator[Process]:
    process = Process(target)
    try:
        await process.start()
        yield process
    finally:
        await process.stop()


@pytest.fixture
async def processes(target: ConnectTarget) -> AsyncIterator[tuple[Process, Process]]:
    async with started(target) as one, started(target) as other:
        await one.database.execute("CREATE TABLE counter (id int PRIMARY KEY, value bigint NOT NULL)")
        await one.database.execute("INSERT INTO counter SELECT n, 0 FROM generate_series(1, 3) n")
        await one.database.execute("CREATE VIEW counted AS SELECT id, value FROM counter")
        await asyncio.gather(one.cache.load(one.database), other.cache.load(other.database))
        await until(lambda: len(one.channel._peers) == len(other.channel._peers) == 1)
        yield one, other

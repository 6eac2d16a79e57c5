"""What the framework costs beside the bare libraries: reads, cache hits, ORM look-ups."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.report import Row
from models import User
from utils.database import Pool
from utils.database.access import Database
from utils.database.cache import QueryCache

USERS = 1_000
#: Rounds, each with every way once: their order within a round changes, the machine's mood falls on all.
ROUNDS = 9
#: Reads of a round, and of a round of cache hits.
READS = 2_000
HITS = 20_000
READERS = 5
QUERY = "SELECT id, username, bot FROM users WHERE id = $1"

Read = Callable[[int], Awaitable[Any]]


async def measure(database: Pool) -> list[Row]:
    """Read users one by one in every way."""
    await database.execute(
        "INSERT INTO users (id, username, bot) SELECT n, 'user ' || n, false FROM generate_series(1, $1::bigint) n",
        USERS,
    )
    await database.execute("ANALYZE users")
    async with _ways(database) as ways:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(ROUNDS + 1):  # the first one warms up
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                read, readers, reads = ways[name]
                taken = await _timed(read, readers, reads)
                if turn:
                    seconds[name].append(taken)
        await database.execute("TRUNCATE users")
    typical = {name: statistics.median(times) for name, times in seconds.items()}
    micro = {name: typical[name] * 1e6 for name in typical}
    return [
        Row("db.fetchrow uncached, one reader, × a bare asyncpg pool",
            typical["bare, one"] / typical["ours, one"], "≥", 0.8),
        Row(f"db.fetchrow uncached, {READERS} readers, × a bare asyncpg pool",
            typical["bare, five"] / typical["ours, five"], "≥", 0.8),
        Row("cache hit, × an uncached read", typical["ours, one"] / typical["hit"], "≥", 30.0, "x"),
        Row("ORM look-up by key, × bare SQLAlchemy", typical["bare ORM"] / typical["our ORM"], "≥", 0.9),
        Row("db.fetchrow uncached, one reader", micro["ours, one"], unit=" µs"),
        Row("cache hit", micro["hit"], unit=" µs"),
        Row("ORM look-up by key", micro["our ORM"], unit=" µs"),
    ]  # fmt: skip


@contextlib.asynccontextmanager
async def _ways(database: Pool) -> AsyncIterator[dict[str, tuple[Read, int, int]]]:
    """Lend every way to read a user, with how many do it at once and how often."""
    cache = QueryCache()
    await cache.load(database)
    access = Database(database, cache=cache)
    await access.connect()
    engine = create_async_engine(
        database.target.sqlalchemy_url(), connect_args=database.target.sqlalchemy_connect_args()
    )
    bare_session = async_sessionmaker(engine, expire_on_commit=False)
    pool = await asyncpg.create_pool(**database.target.connect_kwargs(), min_size=1, max_size=10)

    async def bare(id: int) -> Any:
        return await pool.fetchrow(QUERY, id)

    async def ours(id: int) -> Any:
        return await access.fetchrow(QUERY, id, use_cache=False)

    async def hit(id: int) -> Any:
        return await access.fetchrow(QUERY, 1)

    async def bare_orm(id: int) -> Any:
        async with bare_session() as session:
            return await session.get(User, id)

    async def our_orm(id: int) -> Any:
        session: AsyncSession
        async with access.sessions() as session:
            return await session.get(User, id)

    try:
        yield {
            "bare, one": (bare, 1, READS),
            "ours, one": (ours, 1, READS),
            "bare, five": (bare, READERS, READS),
            "ours, five": (ours, READERS, READS),
            "hit": (hit, 1, HITS),
            "bare ORM": (bare_orm, 1, READS // 2),
            "our ORM": (our_orm, 1, READS // 2),
        }
    finally:
        await pool.close()
        await engine.dispose()
        await access.close(5.0)


async def _timed(read: Read, readers: int, reads: int) -> float:
    """Return the seconds that one read takes, with so many readers at once."""

    async def reader(first: int) -> None:
        for turn in range(reads // readers):
            await read((first + turn) % USERS + 1)

    started = time.perf_counter()
    await asyncio.gather(*(reader(n * 100) for n in range(readers)))
    return (time.perf_counter() - started) / reads

"""What the framework costs beside the bare libraries: reads, cache hits, ORM look-ups; members as objects; batches."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import discord
from discord.ext import commands
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.data import seize
from benchmarks.figures import Figure, ratio
from benchmarks.rounds import ServerClock, Way, interleave
from models import User
from utils.bot.watchdog import Watchdog
from utils.database import Pool
from utils.database.access import Database
from utils.database.cache import QueryCache
from utils.mirror.batches import Batches
from utils.mirror.discord.people import build_member
from utils.mirror.spool.journal import Journal
from utils.mirror.spool.queue import EventQueue, SpoolMode
from utils.mirror.write.writer import FlushPolicy
from utils.repositories import MemberRepository
from utils.service.lease import holder

USERS = 1_000
#: Reads in one round, and cache hits in one round.
READS = 2_000
HITS = 20_000
#: Events in one round.
EVENTS = 100_000
READERS = 5
#: Members built from a row in one round, and members read and built.
BUILT = 20_000
READ_MEMBERS = 500
#: Rows added to a batch in one round, and how many members they are about.
ADDS = 20_000
ADDED_MEMBERS = 1_000
QUERY = "SELECT id, username, bot FROM users WHERE id = $1"

Read = Callable[[int], Awaitable[Any]]


async def measure(pool: Pool, *, rounds: int = 9) -> list[Figure]:
    """Read users one by one in every way, once a round."""
    await pool.execute(
        "INSERT INTO users (id, username, bot) SELECT n, 'user ' || n, false FROM generate_series(1, $1::bigint) n",
        USERS,
    )
    await pool.execute("ANALYZE users")
    async with _ways(pool) as ways:
        timed = {name: Way(partial(_read, read, readers, reads)) for name, (read, readers, reads) in ways.items()}
        samples = await interleave(timed, await ServerClock.of(pool), rounds=rounds)
        reads = {name: reads for name, (_, _, reads) in ways.items()}
    await pool.execute("TRUNCATE users")
    seconds = {name: [value / reads[name] for value in found.seconds] for name, found in samples.items()}
    cpu = {name: [value / reads[name] for value in found.cpu] for name, found in samples.items()}

    def micro(values: list[float]) -> list[float]:
        return [value * 1e6 for value in values]

    return [
        ratio("db.fetchrow uncached, one reader, × a bare asyncpg pool",
              seconds["bare, one"], seconds["ours, one"], "≥", 0.8),
        ratio(f"db.fetchrow uncached, {READERS} readers, × a bare asyncpg pool",
              seconds["bare, five"], seconds["ours, five"], "≥", 0.8),
        ratio("cache hit, × an uncached read", seconds["ours, one"], seconds["hit"], "≥", 30.0, "x"),
        ratio("ORM look-up by key, × bare SQLAlchemy", seconds["bare ORM"], seconds["our ORM"], "≥", 0.9),
        ratio("db.fetchrow uncached, one reader, processor time × a bare asyncpg pool",
              cpu["ours, one"], cpu["bare, one"]),
        ratio("ORM look-up by key, processor time × bare SQLAlchemy", cpu["our ORM"], cpu["bare ORM"]),
        Figure("db.fetchrow uncached, one reader", micro(seconds["ours, one"]), unit=" µs"),
        Figure("cache hit", micro(seconds["hit"]), unit=" µs"),
        Figure("ORM look-up by key", micro(seconds["our ORM"]), unit=" µs"),
        *await _measure_members(pool, rounds),
        *await _measure_batch(pool, "outage", rounds),
        *await _measure_batch(pool, "always", rounds),
        *await _measure_watchdog(rounds),
    ]  # fmt: skip


@contextlib.asynccontextmanager
async def _ways(pool: Pool) -> AsyncIterator[dict[str, tuple[Read, int, int]]]:
    """Lend every way to read a user, with how many do it at once and how often."""
    cache = QueryCache()
    await cache.load(pool)
    database = Database(pool, cache=cache)
    await database.connect()
    engine = create_async_engine(pool.target.sqlalchemy_url(), connect_args=pool.target.sqlalchemy_connect_args())
    bare_session = async_sessionmaker(engine, expire_on_commit=False)
    bare_pool = await asyncpg.create_pool(**pool.target.connect_kwargs(), min_size=1, max_size=10)

    async def bare(id: int) -> Any:
        return await bare_pool.fetchrow(QUERY, id)

    async def ours(id: int) -> Any:
        return await database.fetchrow(QUERY, id, use_cache=False)

    async def hit(id: int) -> Any:
        return await database.fetchrow(QUERY, 1)

    async def bare_orm(id: int) -> Any:
        async with bare_session() as session:
            return await session.get(User, id)

    async def our_orm(id: int) -> Any:
        session: AsyncSession
        async with database.session() as session:
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
        await bare_pool.close()
        await engine.dispose()
        await database.close(5.0)


async def _measure_members(pool: Pool, rounds: int) -> list[Figure]:
    """Build a `discord.Member` from a row, without and with the query for the row."""
    await pool.execute("INSERT INTO users (id, username, global_name, bot) VALUES (7, 'ada', 'Ada', false)")
    await pool.execute(
        "INSERT INTO members (guild_id, user_id, nick, roles, joined_at, pending, flags)"
        " VALUES (1, 7, 'Countess', ARRAY[2, 3, 4], now(), false, 0)"
    )
    client = discord.Client(intents=discord.Intents(guilds=True))
    payload: Any = {"id": "1", "name": "a guild", "roles": []}
    guild = client._connection._add_guild_from_data(payload)
    database = Database(pool)
    await database.connect()
    members = MemberRepository(database.session)
    built, read = [], []
    try:
        row = await members.get((1, 7), load="user")
        assert row.user is not None
        values, user = vars(row), vars(row.user)
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(BUILT):
                build_member(guild, values, user)
            built.append((time.perf_counter() - started) / BUILT * 1e6)
            started = time.perf_counter()
            for _ in range(READ_MEMBERS):
                await members.as_discord(guild, 7)
            read.append((time.perf_counter() - started) / READ_MEMBERS * 1e6)
    finally:
        await database.close(5.0)
        await pool.execute("TRUNCATE users, members")
    return [
        Figure("members.as_discord, without its query", built, "≤", 30.0, " µs"),
        Figure("members.as_discord", read, unit=" µs"),
    ]


async def _measure_batch(pool: Pool, spool: SpoolMode, rounds: int) -> list[Figure]:
    """Add rows to a batch of `member_stats`, and then write them."""
    adds: list[float] = []
    commits: list[float] = []
    rows = [{"guild_id": 1, "user_id": number % ADDED_MEMBERS + 1, "xp": 3} for number in range(ADDS)]
    with tempfile.TemporaryDirectory() as name:
        fence = await seize(pool, holder())
        journal = await Journal.open(Path(name), fence.holder, max_bytes=2**30)
        batches = Batches(
            pool,
            fence,
            EventQueue(journal, spool=spool, max_rows=2 * ADDS),
            FlushPolicy(),
            directory=Path(name),
            on_lost=lambda: None,
            on_written=lambda _: None,
        )
        batch = batches.open("member_stats", "benchmark", __name__, size=100, seconds=5.0, increments=("xp",))
        await batch.verify()
        for _ in range(rounds):
            started = time.perf_counter()
            for row in rows:
                batch.add(row)
            adds.append(ADDS / (time.perf_counter() - started))
            await batch.flush(60.0)
            commits.append(ADDS / (time.perf_counter() - started))
        await batches.stop(10.0)
        await journal.close(10.0)
    await pool.execute("TRUNCATE member_stats")
    return [
        Figure(f"batch.add, SPOOL={spool}", adds, "≥", 50_000.0, " rows/s"),
        Figure(f"batch.add and its commit, SPOOL={spool}", commits, unit=" rows/s"),
    ]


async def _measure_watchdog(rounds: int) -> list[Figure]:
    """Dispatch events to a listener that does nothing, without and with the watchdog."""
    client = commands.Bot(command_prefix=(), intents=discord.Intents.none())
    await client._async_setup_hook()  # as `login` does: events are dispatched in its loop

    async def on_benchmark(number: int) -> None:
        pass

    client.add_listener(on_benchmark)

    async def dispatch() -> None:
        for number in range(EVENTS):
            client.dispatch("benchmark", number)
            if number % 50 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    watchdog = Watchdog(lambda: ["cogs.a", "cogs.b"])

    async def start() -> None:  # a thread, which a bot starts once
        watchdog.start()

    async def stop() -> None:
        watchdog.stop()

    ways = {"bare": Way(dispatch), "watched": Way(dispatch, prepare=start, check=stop)}
    samples = await interleave(ways, None, rounds=2 * rounds)
    await client.close()
    return [
        ratio(
            "events dispatched with the watchdog, × without",
            samples["bare"].seconds,
            samples["watched"].seconds,
            "≥",
            0.98,
        )
    ]


async def _read(read: Read, readers: int, reads: int) -> None:
    """Read that often in all, with so many readers at once."""

    async def reader(first: int) -> None:
        for turn in range(reads // readers):
            await read((first + turn) % USERS + 1)

    await asyncio.gather(*(reader(n * 100) for n in range(readers)))

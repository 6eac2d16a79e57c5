"""One process's cache: hits, single flight, coherence with its own writes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.waiting import until
from utils.database import Pool
from utils.database.cache import QueryCache
from utils.database.cache.store import DISTRUST_SECONDS
from utils.exceptions import DatabaseError

#: Timeout of every step, in seconds.
PATIENCE = 20.0
READ = "SELECT v FROM a WHERE id = $1"
BOTH = "SELECT a.v FROM a JOIN b USING (id)"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """A query that the test answers. It counts how often it is run."""

    def __init__(self) -> None:
        self.times = 0
        self.cancelled = 0
        self.answers: list[asyncio.Future[Any]] = []

    async def __call__(self) -> Any:
        self.times += 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.answers.append(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def answering(value: Any) -> Callable[[], Awaitable[Any]]:
    async def run() -> Any:
        return value

    return run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def cache(database: Pool, clock: Clock) -> QueryCache:
    await database.execute("CREATE TABLE a (id int PRIMARY KEY, v int); CREATE TABLE b (id int PRIMARY KEY)")
    made = QueryCache(max_results=3, clock=clock)
    await made.load(database)
    return made


async def test_the_second_read_hits(cache: QueryCache) -> None:
    assert await cache.fetch("fetchval", READ, (1,), answering(5)) == 5
    assert await cache.fetch("fetchval", READ, (1,), answering(6)) == 5
    assert await cache.fetch("fetchval", READ, (2,), answering(7)) == 7
    assert await cache.fetch("fetchval", READ, (True,), answering(8)) == 8
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["total_requests"], stats["size"]) == (1, 3, 4, 3)
    assert stats["hit_rate"] == 25.0


async def test_caches_none_and_empty_results(cache: QueryCache) -> None:
    assert await cache.fetch("fetchrow", READ, (1,), answering(None)) is None
    assert await cache.fetch("fetchrow", READ, (1,), answering(1)) is None
    assert await cache.fetch("fetch", READ, (1,), answering([])) == []
    assert await cache.fetch("fetch", READ, (1,), answering([1])) == []


async def test_results_expire(cache: QueryCache, clock: Clock) -> None:
    await cache.fetch("fetchval", READ, (1,), answering(5))
    clock.now += cache.ttl - 1
    assert await cache.fetch("fetchval", READ, (1,), answering(6)) == 5
    clock.now += 1
    assert await cache.fetch("fetchval", READ, (1,), answering(6)) == 6


async def test_evicts_the_least_recently_used(cache: QueryCache) -> None:
    for n in (1, 2, 3, 1, 4):
        await cache.fetch("fetchval", READ, (n,), answering(n))
    assert cache.stats()["evictions"] == 1
    assert await cache.fetch("fetchval", READ, (1,), answering(None)) == 1
    assert await cache.fetch("fetchval", READ, (2,), answering(None)) is None


async def test_a_write_drops_only_results_of_its_table(cache: QueryCache) -> None:
    await cache.fetch("fetchval", READ, (1,), answering(5))
    await cache.fetch("fetchval", BOTH, (), answering(5))
    cache.invalidate(["b"])
    assert await cache.fetch("fetchval", READ, (1,), answering(6)) == 5
    assert await cache.fetch("fetchval", BOTH, (), answering(6)) == 6
    cache.invalidate(["public.a"])
    assert cache.stats()["size"] == 0
    assert cache.stats()["invalidations"] == 3
    assert cache.stats()["evictions"] == 0


async def test_a_write_during_a_query_prevents_caching(cache: QueryCache) -> None:
    asked = Asked()
    early = asyncio.create_task(cache.fetch("fetchval", READ, (1,), asked))
    await until(lambda: asked.times == 1)
    cache.invalidate(["a"])
    late = asyncio.create_task(cache.fetch("fetchval", READ, (1,), asked))
    await until(lambda: asked.times == 2)
    asked.answers[1].set_result("new")
    assert await late == "new"
    asked.answers[0].set_result("old")
    assert await early == "old"
    assert await cache.fetch("fetchval", READ, (1,), asked) == "new"


async def test_ten_thousand_callers_share_one_query(cache: QueryCache, database: Pool) -> None:
    asked = 0

    async def run() -> Any:
        nonlocal asked
        asked += 1
        return await database.fetch("SELECT 1 AS one")

    results = await asyncio.gather(*(cache.fetch("fetch", "SELECT v AS one FROM a", (), run) for _ in range(10_000)))
    assert asked == 1
    assert len({id(result) for result in results}) == 10_000
    assert all(result[0]["one"] == 1 for result in results)


async def test_errors_reach_all_callers_and_are_not_cached(cache: QueryCache) -> None:
    asked = Asked()
    waiting = [asyncio.create_task(cache.fetch("fetchval", READ, (1,), asked)) for _ in range(50)]
    await until(lambda: asked.times == 1)
    asked.answers[0].set_exception(DatabaseError("refused"))
    errors = await asyncio.gather(*waiting, return_exceptions=True)
    assert {str(error) for error in errors} == {"refused"}
    traceback = errors[0].__traceback__ if isinstance(errors[0], DatabaseError) else None
    frames = 0
    while traceback is not None:
        frames, traceback = frames + 1, traceback.tb_next
    assert frames < 20
    assert await cache.fetch("fetchval", READ, (1,), answering(1)) == 1


async def test_cancelling_the_first_caller_keeps_the_query(cache: QueryCache) -> None:
    asked = Asked()
    first, second = (asyncio.create_task(cache.fetch("fetchval", READ, (1,), asked)) for _ in range(2))
    await until(lambda: asked.times == 1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    asked.answers[0].set_result(5)
    assert await second == 5
    assert asked.cancelled == 0


async def test_cancelling_the_last_caller_cancels_the_query(cache: QueryCache) -> None:
    asked = Asked()
    waiting = [asyncio.create_task(cache.fetch("fetchval", READ, (1,), asked)) for _ in range(3)]
    await until(lambda: asked.times == 1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert asked.cancelled == 1
    assert await cache.fetch("fetchval", READ, (1,), answering(1)) == 1


async def test_uncacheable_queries_always_run(cache: QueryCache) -> None:
    for sql, args in (("SELECT now()", ()), ("UPDATE a SET v = 1", ()), (READ, (object(),))):
        assert await cache.fetch("fetchval", sql, args, answering(1)) == 1
        assert await cache.fetch("fetchval", sql, args, answering(2)) == 2
    assert cache.stats()["bypassed"] == 6


async def test_an_uncopyable_result_goes_to_one_caller(
    cache: QueryCache,
) -> None:
    answers = [object() for _ in range(3)]
    given = iter(answers)

    async def run() -> object:
        await asyncio.sleep(0)
        return next(given)

    results = await asyncio.gather(*(cache.fetch("fetchval", READ, (1,), run) for _ in range(3)))
    assert set(results) == set(answers)
    assert cache.stats()["uncacheable"] == 1


async def test_forget_drops_one_query_in_every_form(cache: QueryCache) -> None:
    asked = Asked()
    await cache.fetch("fetchval", READ, (1,), answering(1))
    await cache.fetch("fetchval", READ, (2,), answering(2))
    early = asyncio.create_task(cache.fetch("fetchrow", READ, (1,), asked))
    await until(lambda: asked.times == 1)
    cache.forget(READ, (1,))
    asked.answers[0].set_result("old")
    await early
    assert await cache.fetch("fetchval", READ, (1,), answering("new")) == "new"
    assert await cache.fetch("fetchrow", READ, (1,), answering("new")) == "new"
    assert await cache.fetch("fetchval", READ, (2,), answering("new")) == 2


async def test_writes_in_doubt_bypass_the_cache(cache: QueryCache, clock: Clock) -> None:
    await cache.fetch("fetchval", BOTH, (), answering(1))
    cache.distrust(["b"])
    assert await cache.fetch("fetchval", BOTH, (), answering(2)) == 2
    assert await cache.fetch("fetchval", BOTH, (), answering(3)) == 3
    await cache.fetch("fetchval", READ, (1,), answering(1))
    assert await cache.fetch("fetchval", READ, (1,), answering(2)) == 1
    clock.now += DISTRUST_SECONDS
    assert await cache.fetch("fetchval", BOTH, (), answering(4)) == 4
    assert await cache.fetch("fetchval", BOTH, (), answering(5)) == 4


async def test_unknown_writes_flush_and_reload(cache: QueryCache, database: Pool) -> None:
    await cache.fetch("fetchval", "SELECT * FROM seen", (), answering(1))
    await database.execute("CREATE VIEW seen AS SELECT * FROM a")
    await cache.fetch("fetchval", READ, (1,), answering(1))
    cache.invalidate(None)
    assert await cache.fetch("fetchval", READ, (1,), answering(2)) == 2
    assert await cache.fetch("fetchval", READ, (1,), answering(3)) == 3
    await until(lambda: cache.is_trusted)
    assert cache.statement("SELECT * FROM seen").reads == frozenset({"public.a"})
    await cache.fetch("fetchval", READ, (1,), answering(4))
    assert await cache.fetch("fetchval", READ, (1,), answering(5)) == 4


async def test_load_flushes_and_close_disables(cache: QueryCache, database: Pool) -> None:
    await cache.fetch("fetchval", READ, (1,), answering(1))
    await cache.load(database)
    assert await cache.fetch("fetchval", READ, (1,), answering(2)) == 2
    await cache.close()
    assert await cache.fetch("fetchval", READ, (1,), answering(3)) == 3


async def test_trust_ends_at_its_moment(cache: QueryCache, clock: Clock) -> None:
    await cache.fetch("fetchval", READ, (1,), answering(1))
    cache.trust_until(clock.now + 1)
    assert await cache.fetch("fetchval", READ, (1,), answering(2)) == 1
    clock.now += 1
    assert await cache.fetch("fetchval", READ, (1,), answering(2)) == 2
    cache.trust_until(math.inf)
    assert await cache.fetch("fetchval", READ, (1,), answering(3)) == 1

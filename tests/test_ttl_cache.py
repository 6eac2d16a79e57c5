"""The TTL cache of cogs: its bounds, single-flight loads, and statistics."""

from __future__ import annotations

import asyncio

import pytest

from utils.cache import TTLCache


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_values_expire() -> None:
    clock = Clock()
    cache = TTLCache[str, int](ttl=10, clock=clock)
    cache.set("a", 1)
    clock.now += 9.9
    assert cache.get("a") == 1
    clock.now += 0.2
    assert cache.get("a") is None
    assert cache.get("a", 7) == 7
    assert cache.stats() == {
        "hits": 1, "misses": 2, "hit_rate": 33.33, "evictions": 0, "invalidations": 0, "total_requests": 3, "size": 0,
    }  # fmt: skip


async def test_each_value_has_its_own_time_to_live() -> None:
    clock = Clock()
    cache = TTLCache[str, int](max_size=3, ttl=300, clock=clock)

    async def load() -> int:
        return 4

    cache.set("long", 1, ttl=3600)
    cache.set("short", 2, ttl=1)
    cache.set("default", 3)
    clock.now += 2
    assert [cache.get(key) for key in ("long", "short", "default")] == [1, None, 3]
    assert await cache.get_or_load("loaded", load, ttl=5) == 4
    clock.now += 6
    assert (cache.get("loaded"), len(cache)) == (None, 2)
    clock.now += 300
    assert (cache.get("default"), cache.get("long")) == (None, 1)
    for key in "abc":
        cache.set(key, 0, ttl=9000)
    assert (cache.get("long"), len(cache), cache.stats()["evictions"]) == (None, 3, 1)
    clock.now += 3600
    assert cache.get("a") == 0
    for ttl in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="more than 0"):
            cache.set("a", 1, ttl=ttl)
    assert (await cache.stats())["size"] == 3


async def test_evicts_the_least_recently_used() -> None:
    cache = TTLCache[int, int](max_size=2)
    cache.set(1, 1)
    cache.set(2, 2)
    assert cache.get(1) == 1
    cache.set(3, 3)
    assert [cache.get(key) for key in (1, 2, 3)] == [1, None, 3]
    assert (cache.stats()["evictions"], len(cache)) == (1, 2)


async def test_expiry_is_not_eviction() -> None:
    clock = Clock()
    cache = TTLCache[int, int](max_size=1, ttl=1, clock=clock)
    cache.set(1, 1)
    clock.now += 2
    cache.set(2, 2)
    assert cache.stats()["evictions"] == 0
    assert not cache.delete(1)


async def test_counts_invalidations() -> None:
    cache = TTLCache[str, int | None]()
    for key in "abc":
        cache.set(key, None)
    assert cache.get("a", 5) is None
    assert cache.delete("a")
    assert not cache.delete("a")
    cache.clear()
    assert (cache.stats()["invalidations"], len(cache)) == (3, 0)


async def test_concurrent_callers_share_one_load() -> None:
    cache, loads = TTLCache[str, int](), 0

    async def load() -> int:
        nonlocal loads
        loads += 1
        await asyncio.sleep(0)
        return loads

    assert set(await asyncio.gather(*(cache.get_or_load("a", load) for _ in range(1000)))) == {1}
    assert await cache.get_or_load("a", load) == 1
    assert (cache.stats()["hits"], cache.stats()["misses"]) == (1, 1000)


async def test_errors_reach_all_callers_and_are_not_cached() -> None:
    cache, gate = TTLCache[str, int](), asyncio.Event()

    async def fail() -> int:
        await gate.wait()
        raise LookupError("no such thing")

    async def load() -> int:
        return 2

    asking = [asyncio.create_task(cache.get_or_load("a", fail)) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    for error in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(error, LookupError)
    assert await cache.get_or_load("a", load) == 2


@pytest.mark.parametrize("how", ["set", "delete", "clear"])
async def test_a_change_during_a_load_prevents_caching(how: str) -> None:
    cache, gate = TTLCache[str, str](), asyncio.Event()

    async def old() -> str:
        await gate.wait()
        return "old"

    async def new() -> str:
        return "new"

    early = asyncio.create_task(cache.get_or_load("a", old))
    await asyncio.sleep(0)
    if how == "set":
        cache.set("a", "new")
    elif how == "delete":
        cache.delete("a")
    else:
        cache.clear()
    assert await cache.get_or_load("a", new) == "new"
    gate.set()
    assert await early == "old"
    assert cache.get("a") == "new"


async def test_cancelling_the_last_caller_cancels_the_load() -> None:
    cache, gate, ended = TTLCache[str, int](), asyncio.Event(), asyncio.Event()

    async def load() -> int:
        try:
            await gate.wait()
        finally:
            ended.set()
        return 1

    first, second = (asyncio.create_task(cache.get_or_load("a", load)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert not ended.is_set()
    second.cancel()
    await asyncio.wait([second])
    assert ended.is_set()
    gate.set()
    assert await cache.get_or_load("a", load) == 1

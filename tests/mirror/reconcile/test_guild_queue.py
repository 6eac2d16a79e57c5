"""Whose turn it is: small guilds first, two lanes, and Discord's cool-down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.mirror.discord.source import MEMBERS_PAGE, DiscordSource, RateLimiter
from utils.mirror.reconcile.guild_queue import GuildQueue, GuildState

SMALL, LARGE = MEMBERS_PAGE - 1, MEMBERS_PAGE


def queue(*, cooldown: float = 30.0, rest_workers: int = 2) -> GuildQueue:
    return GuildQueue(cooldown=cooldown, rest_workers=rest_workers)


def guild(id: int, size: int | None = SMALL, **values: object) -> GuildState:
    state = GuildState(id, 0, size=size, available=True)
    for name, value in values.items():
        setattr(state, name, value)
    return state


async def is_pending(waiting: Awaitable[GuildState]) -> bool:
    """Return whether nothing is handed out although all that is ready to run has run."""
    task = asyncio.ensure_future(waiting)
    for _ in range(5):
        await asyncio.sleep(0)
    pending = not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return pending


def never() -> bool:
    return False


def always() -> bool:
    return True


@given(sizes=st.lists(st.integers(0, SMALL), min_size=1, max_size=8))
async def test_rest_takes_the_smallest_guild_first(sizes: list[int]) -> None:
    line = queue()
    for id, size in enumerate(sizes):
        await line.add(guild(id, size), "ready")
    taken = [(await line.take_for_rest()).size for _ in sizes]
    assert taken == sorted(sizes)
    assert len(line) == 0


async def test_each_lane_takes_what_it_is_good_at() -> None:
    line = queue()
    for id, size in enumerate((5_000, 10, 2_000, 20)):
        await line.add(guild(id, size), "ready")
    assert [(await line.take_for_gateway(never)).size for _ in range(2)] == [2_000, 5_000]
    assert await is_pending(line.take_for_gateway(never))
    assert [(await line.take_for_rest()).size for _ in range(2)] == [10, 20]
    assert await is_pending(line.take_for_rest())


async def test_the_gateway_helps_with_the_largest_small_guilds_when_many_wait() -> None:
    line = queue(rest_workers=2)
    for id in range(3):
        await line.add(guild(id, 10 + id), "ready")
    assert (await line.take_for_gateway(always)).size == 12
    assert await is_pending(line.take_for_gateway(always)), "REST is quicker with the last few"


async def test_a_guild_whose_pages_failed_is_left_to_rest_whatever_its_size() -> None:
    line = queue()
    await line.add(guild(1, LARGE, needs_rest=True), "retry")
    assert await is_pending(line.take_for_gateway(always))
    assert (await line.take_for_rest()).id == 1


async def test_a_guild_is_not_asked_over_the_gateway_again_before_its_cool_down_is_over() -> None:
    line = queue(cooldown=30.0)
    await line.add(guild(1, LARGE, requested_at=time.monotonic() - 1), "request")
    await line.add(guild(2, LARGE + 5, requested_at=time.monotonic() - 31), "request")
    assert (await line.take_for_gateway(never)).id == 2
    assert await is_pending(line.take_for_gateway(never))


async def test_a_guild_that_waits_keeps_its_place_and_its_reason() -> None:
    line, state = queue(), guild(1)
    await line.add(state, "ready")
    await line.add(state, "request")
    assert len(line) == 1
    assert state.reason == "ready"
    line.remove(state)
    assert len(line) == 0
    assert [state.reason] == [None]


async def test_no_guild_is_handed_out_twice_at_a_time() -> None:
    line, state = queue(cooldown=0.0), guild(1)
    await line.add(state, "ready")
    assert await line.take_for_rest() is state
    state.reason = None
    await line.add(state, "request")
    assert await is_pending(line.take_for_rest())
    assert await is_pending(line.take_for_gateway(always))
    await line.release(state)
    assert await line.take_for_rest() is state


async def test_no_large_guild_is_handed_out_twice_at_a_time_either() -> None:
    line, state = queue(cooldown=0.0), guild(1, LARGE)
    await line.add(state, "ready")
    assert await line.take_for_gateway(never) is state
    state.reason = None
    await line.add(state, "request")
    assert await is_pending(line.take_for_gateway(always))
    await line.release(state)
    assert await line.take_for_gateway(never) is state


async def test_who_waits_for_a_guild_gets_the_next_one_that_comes() -> None:
    line = queue()
    waiting = asyncio.create_task(line.take_for_rest())
    await asyncio.sleep(0)
    await line.add(guild(1), "ready")
    assert (await asyncio.wait_for(waiting, 5)).id == 1


async def test_a_guild_of_unknown_size_is_read_too() -> None:
    line = queue()
    await line.add(guild(1, None), "ready")
    lanes = [asyncio.create_task(line.take_for_rest()), asyncio.create_task(line.take_for_gateway(always))]
    for _ in range(5):
        await asyncio.sleep(0)
    taken = [task for task in lanes if task.done()]
    for task in lanes:
        task.cancel()
    await asyncio.gather(*lanes, return_exceptions=True)
    assert taken, "neither lane takes a guild whose member_count never came: it is never reconciled"


@pytest.mark.parametrize(("passed", "left"), [((), 3), ((0.0,), 2), ((61.0, 61.0, 0.0), 2), ((1.0, 1.0, 1.0), 0)])
def test_a_pace_counts_what_went_through_in_its_window(passed: tuple[float, ...], left: int) -> None:
    pace = RateLimiter(3, 60.0)
    pace._times.extend(time.monotonic() - seconds for seconds in passed)
    assert pace.remaining == left


async def test_a_pace_lets_so_many_through_and_makes_the_next_one_wait_for_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = 100.0, list[float]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr("utils.mirror.discord.source.time.monotonic", lambda: now)
    monkeypatch.setattr("utils.mirror.discord.source.asyncio.sleep", sleep)
    pace, passed = RateLimiter(3, 60.0), list[float]()
    for step in (0.0, 10.0, 0.0, 0.0, 0.0, 0.0, 200.0):
        now += step
        await pace.acquire()
        passed.append(now)
    assert passed == [100.0, 110.0, 110.0, 160.0, 170.0, 170.0, 370.0]
    assert slept == [50.0, 10.0]


async def test_shards_have_paces_of_their_own_and_the_busiest_one_counts() -> None:
    source = DiscordSource(None)  # type: ignore[arg-type]
    full = source.commands_remaining
    for shard in (0, 0, 1):
        await source.acquire_command(shard)
    assert source.commands_remaining == full - 2

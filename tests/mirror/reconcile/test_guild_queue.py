"""The guild queue: small guilds first, a REST and a gateway lane, and Discord's cool-down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable

from hypothesis import given
from hypothesis import strategies as st

from utils.mirror.discord.source import MEMBERS_PAGE
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
    """Return whether no guild is handed out after everything that can run has run."""
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
    guilds = queue()
    for id, size in enumerate(sizes):
        await guilds.add(guild(id, size), "ready")
    taken = [(await guilds.take_for_rest()).size for _ in sizes]
    assert taken == sorted(sizes)
    assert len(guilds) == 0


async def test_each_lane_takes_what_suits_it() -> None:
    guilds = queue()
    for id, size in enumerate((5_000, 10, 2_000, 20)):
        await guilds.add(guild(id, size), "ready")
    assert [(await guilds.take_for_gateway(never)).size for _ in range(2)] == [2_000, 5_000]
    assert await is_pending(guilds.take_for_gateway(never))
    assert [(await guilds.take_for_rest()).size for _ in range(2)] == [10, 20]
    assert await is_pending(guilds.take_for_rest())


async def test_gateway_takes_the_largest_small_guild_if_many_wait() -> None:
    guilds = queue(rest_workers=2)
    for id in range(3):
        await guilds.add(guild(id, 10 + id), "ready")
    assert (await guilds.take_for_gateway(always)).size == 12
    assert await is_pending(guilds.take_for_gateway(always)), "the last few are left to REST"


async def test_guild_that_failed_over_the_gateway_is_left_to_rest() -> None:
    guilds = queue()
    await guilds.add(guild(1, LARGE, needs_rest=True), "retry")
    assert await is_pending(guilds.take_for_gateway(always))
    assert (await guilds.take_for_rest()).id == 1


async def test_gateway_respects_the_cooldown() -> None:
    guilds = queue(cooldown=30.0)
    await guilds.add(guild(1, LARGE, requested_at=time.monotonic() - 1), "request")
    await guilds.add(guild(2, LARGE + 5, requested_at=time.monotonic() - 31), "request")
    assert (await guilds.take_for_gateway(never)).id == 2
    assert await is_pending(guilds.take_for_gateway(never))


async def test_waiting_guild_keeps_its_place_and_reason() -> None:
    guilds, state = queue(), guild(1)
    await guilds.add(state, "ready")
    await guilds.add(state, "request")
    assert len(guilds) == 1
    assert state.reason == "ready"
    guilds.remove(state)
    assert len(guilds) == 0
    assert [state.reason] == [None]


async def test_running_small_guild_is_not_handed_out() -> None:
    guilds, state = queue(cooldown=0.0), guild(1)
    await guilds.add(state, "ready")
    assert await guilds.take_for_rest() is state
    state.reason = None
    await guilds.add(state, "request")
    assert await is_pending(guilds.take_for_rest())
    assert await is_pending(guilds.take_for_gateway(always))
    await guilds.release(state)
    assert await guilds.take_for_rest() is state


async def test_running_large_guild_is_not_handed_out() -> None:
    guilds, state = queue(cooldown=0.0), guild(1, LARGE)
    await guilds.add(state, "ready")
    assert await guilds.take_for_gateway(never) is state
    state.reason = None
    await guilds.add(state, "request")
    assert await is_pending(guilds.take_for_gateway(always))
    await guilds.release(state)
    assert await guilds.take_for_gateway(never) is state


async def test_waiting_lane_gets_the_next_guild() -> None:
    guilds = queue()
    waiting = asyncio.create_task(guilds.take_for_rest())
    await asyncio.sleep(0)
    await guilds.add(guild(1), "ready")
    assert (await asyncio.wait_for(waiting, 5)).id == 1


async def test_guild_of_unknown_size_is_handed_out() -> None:
    guilds = queue()
    await guilds.add(guild(1, None), "ready")
    lanes = [asyncio.create_task(guilds.take_for_rest()), asyncio.create_task(guilds.take_for_gateway(always))]
    for _ in range(5):
        await asyncio.sleep(0)
    taken = [task for task in lanes if task.done()]
    for task in lanes:
        task.cancel()
    await asyncio.gather(*lanes, return_exceptions=True)
    assert taken, "no lane takes a guild without member_count: it would never be reconciled"

"""The rate limiter, and the gateway commands that a source has left."""

from __future__ import annotations

import time

import pytest

from utils.mirror.discord.source import DiscordSource, RateLimiter


@pytest.mark.parametrize(("passed", "left"), [((), 3), ((0.0,), 2), ((61.0, 61.0, 0.0), 2), ((1.0, 1.0, 1.0), 0)])
def test_counts_calls_within_its_window(passed: tuple[float, ...], left: int) -> None:
    limiter = RateLimiter(3, 60.0)
    limiter._times.extend(time.monotonic() - seconds for seconds in passed)
    assert limiter.remaining == left


async def test_next_call_waits_for_the_oldest_to_expire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = 100.0, list[float]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    monkeypatch.setattr("utils.mirror.discord.source.time.monotonic", lambda: now)
    monkeypatch.setattr("utils.mirror.discord.source.asyncio.sleep", sleep)
    limiter, passed = RateLimiter(3, 60.0), list[float]()
    for step in (0.0, 10.0, 0.0, 0.0, 0.0, 0.0, 200.0):
        now += step
        await limiter.acquire()
        passed.append(now)
    assert passed == [100.0, 110.0, 110.0, 160.0, 170.0, 170.0, 370.0]
    assert slept == [50.0, 10.0]


async def test_remaining_commands_are_those_of_the_busiest_shard() -> None:
    source = DiscordSource(None)  # type: ignore[arg-type]
    full = source.commands_remaining
    for shard in (0, 0, 1):
        await source.acquire_command(shard)
    assert source.commands_remaining == full - 2

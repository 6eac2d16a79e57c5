from __future__ import annotations

import asyncio

import pytest

from tests.waiting import until


async def test_returns_the_first_true_value() -> None:
    values = iter([0, None, "", "found", "later"])
    assert await until(lambda: next(values)) == "found"


async def test_awaits_a_coroutine_function() -> None:
    values = iter([False, True])

    async def condition() -> bool:
        return next(values)

    assert await until(condition) is True


async def test_names_the_condition_and_its_last_value() -> None:
    rows: list[int] = []
    with pytest.raises(AssertionError, match=r"not true after 0\.01 s: .*len\(rows\) == 3.*last value: False"):
        await until(lambda: len(rows) == 3, 0.01)


async def test_bounds_a_condition_that_hangs() -> None:
    with pytest.raises(AssertionError, match=r"asyncio\.Event\(\)\.wait"):
        await until(lambda: asyncio.Event().wait(), 0.01)


async def test_passes_on_a_timeout_of_the_condition_itself() -> None:
    async def condition() -> bool:
        raise TimeoutError("of the database")

    with pytest.raises(TimeoutError, match="of the database"):
        await until(condition)

"""Retries after errors of a real server."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from tests.database.access import PRICE, PUT, accessed
from utils.database import Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable
from utils.retrying import retrying


@pytest.mark.slow
async def test_deadlocked_transactions_both_finish(database: Pool) -> None:
    async with accessed(database) as db:
        await db.execute(PUT, "apple", 0)
        has_read = asyncio.Barrier(2)
        tries = 0

        @retrying(attempts=10, first_seconds=0.01)
        async def raise_price() -> None:
            nonlocal tries
            tries += 1
            async with db.transaction(isolation="serializable"):
                price = await db.fetchval(PRICE, "apple")
                if tries <= 2:
                    await has_read.wait()
                await db.execute(PUT, "apple", price + 1)

        await asyncio.gather(raise_price(), raise_price())
        assert await db.fetchval(PRICE, "apple") == 2
        assert tries > 2


async def test_permanent_errors_are_raised_at_once(database: Pool) -> None:
    tries = 0

    @retrying(first_seconds=0.01)
    async def ask() -> None:
        nonlocal tries
        tries += 1
        await database.execute("SELECT * FROM nowhere")

    with pytest.raises(DatabaseError, match="nowhere"):
        await ask()
    assert tries == 1


async def test_raises_the_last_error_after_all_attempts() -> None:
    tries = 0

    @retrying(attempts=3, first_seconds=0.01)
    async def ask() -> None:
        nonlocal tries
        tries += 1
        raise DatabaseUnavailable(f"attempt {tries}")

    with pytest.raises(DatabaseUnavailable, match="attempt 3"):
        await ask()
    assert tries == 3


async def test_inside_a_transaction_there_is_one_attempt(database: Pool) -> None:
    tries = 0

    @retrying(first_seconds=0.01)
    async def ask() -> None:
        nonlocal tries
        tries += 1
        raise DatabaseUnavailable("away")

    async with accessed(database) as db:
        with pytest.raises(DatabaseUnavailable):
            async with db.transaction():
                await ask()
    assert tries == 1


async def test_delays_grow_by_the_factor_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    @retrying(attempts=6, seconds=1_000, first_seconds=1, max_seconds=20, factor=3, errors=(LookupError,))
    async def ask() -> None:
        raise LookupError

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "sleep", sleep)
        with pytest.raises(LookupError):
            await ask()
    assert len(delays) == 5
    for delay, least in zip(delays, (1, 3, 9, 20, 20), strict=True):
        assert least <= delay <= min(least + 1, 20)


async def test_what_failed_is_named_with_its_attempts(caplog: pytest.LogCaptureFixture) -> None:
    @retrying(attempts=2, first_seconds=0.001, context="the sync of shops")
    async def ask() -> None:
        raise DatabaseUnavailable("away")

    with caplog.at_level(logging.INFO), pytest.raises(DatabaseUnavailable):
        await ask()
    assert caplog.messages == ["retrying the sync of shops", "the sync of shops failed after 2 attempts: away"]


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"factor": 0.5}])
def test_rejects_policies_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        retrying(**wrong)

"""Retries after errors of a real server."""

from __future__ import annotations

import asyncio

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

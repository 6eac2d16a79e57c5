"""Models of the tests, and a pool with the interface of `bot.db`."""

from __future__ import annotations

from typing import Any

import asyncpg
from pydantic import BaseModel

from utils.database import Pool


class PoolQueries:
    """The interface of `bot.db` on a pool, without a cache; counts statements."""

    def __init__(self, pool: Pool) -> None:
        self.pool: Pool = pool
        self.statements: int = 0

    async def fetch(self, sql: str, /, *args: Any) -> list[asyncpg.Record]:
        """Return all rows."""
        self.statements += 1
        return await self.pool.fetch(sql, *args)

    async def fetchrow(
        self, sql: str, /, *args: Any, use_cache: bool = True, stale_if_error: float | None = None
    ) -> asyncpg.Record | None:
        """Return the first row."""
        self.statements += 1
        return await self.pool.fetchrow(sql, *args)

    async def fetchval(self, sql: str, /, *args: Any, use_cache: bool = True) -> Any:
        """Return the first column of the first row."""
        self.statements += 1
        return await self.pool.fetchval(sql, *args)

    def forget(self, sql: str, /, *args: Any) -> None:
        """Do nothing: nothing is kept."""


class Item(BaseModel):
    """Something in a shop."""

    name: str
    price: int = 1


class Shop(BaseModel):
    """A shop's settings."""

    title: str = "Shop"
    tax: float = 0.0
    items: list[Item] = []
    sold: dict[str, int] = {}


class Counter(BaseModel):
    """A number."""

    count: int = 0

"""Helpers for tests of `Database`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from utils.database import Pool
from utils.database.access import Database
from utils.database.cache import QueryCache


@contextlib.asynccontextmanager
async def accessed(database: Pool, *, cached: bool = True, **given: Any) -> AsyncIterator[Database]:
    """Yield a `Database` with a table `shelf(item, price, extra)`."""
    await database.execute("CREATE TABLE IF NOT EXISTS shelf (item text PRIMARY KEY, price bigint, extra jsonb)")
    cache = QueryCache() if cached else None
    if cache is not None:
        await cache.load(database)
    access = Database(database, cache=cache, **given)
    try:
        yield access
    finally:
        await access.close(1.0)
        if cache is not None:
            await cache.close()


PUT = "INSERT INTO shelf (item, price) VALUES ($1, $2) ON CONFLICT (item) DO UPDATE SET price = excluded.price"
PRICE = "SELECT price FROM shelf WHERE item = $1"
COUNT = "SELECT count(*) FROM shelf"

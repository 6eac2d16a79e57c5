"""Helpers of the change feed tests: rows written by hand, concurrent connections, and a listener."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from tests.mirror.tables import GUILD
from utils.database import ConnectTarget, Pool
from utils.mirror.change_feed import ChangeFeed, MirrorChange

INSERT = (
    "INSERT INTO changes (guild_id, table_name, key, action, user_id, before, after) "
    "VALUES ($1, 'roles', $2::text::jsonb, 'update', NULL, '{}', '{}') RETURNING id"
)
INSERT_USER = (
    "INSERT INTO user_changes (user_id, table_name, key, action, before, after) "
    "VALUES ($1, 'users', $2::text::jsonb, 'update', '{}', '{}') RETURNING id"
)
INSERT_EVENT = "INSERT INTO member_events (guild_id, user_id, kind, at) VALUES ($1, $2, 'leave', now()) RETURNING id"


@dataclass(slots=True)
class Received:
    """Collects what a feed dispatches."""

    changes: list[MirrorChange] = field(default_factory=list)
    has_listeners: bool = True

    @property
    def ids(self) -> list[int]:
        return [change.id for change in self.changes]

    def feed(self, database: Pool, **options: Any) -> ChangeFeed:
        return ChangeFeed(database, self.changes.append, has_listeners=lambda: self.has_listeners, **options)


@contextlib.asynccontextmanager
async def connected(target: ConnectTarget, number: int) -> AsyncIterator[list[asyncpg.Connection[asyncpg.Record]]]:
    connections = [await asyncpg.connect(**target.connect_kwargs(), timeout=10) for _ in range(number)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.terminate()


@contextlib.asynccontextmanager
async def running(feed: ChangeFeed) -> AsyncIterator[None]:
    task = asyncio.create_task(feed.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def drained(feed: ChangeFeed) -> None:
    """Read until no change is left and none has to wait."""
    await asyncio.sleep(0.003)  # the newest id may be of this very millisecond
    async with asyncio.timeout(30):
        while await feed.step() != (0, True):  # noqa: ASYNC110 - the database has no event to wait for
            await asyncio.sleep(0.001)


async def write(database: Pool, row: int = 1, *, guild_id: int = GUILD) -> int:
    written: int = await database.fetchval(INSERT, guild_id, f'{{"id": {row}}}')
    return written

"""A mirror on a real gateway connection to a simulator, and the comparison of its tables with the simulator's world."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import discord
import pytest
import yarl
from discord import gateway, http

from simulator import Simulator
from utils.database import Database
from utils.mirror import Mirror, archived
from utils.mirror.rows import key_columns, tombstone_column
from utils.mirror.source import DiscordSource
from utils.mirror.tap import install
from utils.service import lease

TABLES = ("guilds", "users", "members", "roles", "channels", "threads")


async def until(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Wait until a condition holds; it fails by TimeoutError, never by luck."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 - the conditions are other people's state, without an event
            await asyncio.sleep(0.01)


class Mirrored:
    """A running mirror with its client and simulator."""

    def __init__(self, mirror: Mirror, client: discord.AutoShardedClient, simulator: Simulator) -> None:
        self.mirror = mirror
        self.client = client
        self.simulator = simulator

    def has_heard_all(self) -> bool:
        """Return whether the connected session has received all that the simulator had for it."""
        session = next((s for s in self.simulator.gateway.sessions.values() if s.socket is not None), None)
        if session is None or not session.has_sent_all:
            return False
        ws = self.client._get_websocket(shard_id=0)
        return ws.session_id == session.id and ws.sequence == session.sequence

    async def ready(self, timeout: float = 20.0) -> None:
        """Wait until every available guild has been reconciled."""
        await until(lambda: self.mirror.is_ready()[0], timeout)

    async def settled(self, timeout: float = 20.0) -> None:
        """Wait until all that was sent has been received, reconciled where that was due, and written."""
        async with asyncio.timeout(timeout):
            while True:
                await until(lambda: self.has_heard_all() and self.mirror.is_ready()[0], timeout)
                await self.mirror.reconciler.quiet()
                await until(lambda: not self.mirror.archived.waiting, timeout)
                await self.mirror.writer.flush()
                if self.has_heard_all() and self.mirror.is_ready()[0] and not len(self.mirror.writer.buffer):
                    return


@asynccontextmanager
async def mirrored(
    database: Database,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    page_timeout: float = 2.0,
    cooldown: float = 0.0,
    flush_seconds: float = 0.05,
) -> AsyncIterator[Mirrored]:
    """Mirror a simulator's world into a database for the length of the block."""
    monkeypatch.setattr(archived, "REQUESTS_A_SECOND", 1_000)  # the simulator has its own limits
    monkeypatch.setattr(http.Route, "BASE", simulator.api_base)
    monkeypatch.setattr(gateway.DiscordWebSocket, "DEFAULT_GATEWAY", yarl.URL(simulator.gateway_url))
    client = discord.AutoShardedClient(
        intents=discord.Intents(guilds=True, members=True, moderation=True),
        chunk_guilds_at_startup=False,
        member_cache_flags=discord.MemberCacheFlags.none(),
        max_messages=None,
        shard_count=1,
        guild_ready_timeout=0.1,
    )
    mirror = Mirror(
        database,
        DiscordSource(client, timeout=10.0),
        epoch=await lease.take(database, lease.holder()),
        shards=1,
        flush_rows=500,
        flush_seconds=flush_seconds,
        page_timeout=page_timeout,
        cooldown=cooldown,
    )
    install(client, mirror)
    mirror.start()
    running = asyncio.create_task(client.start(simulator.token))
    try:
        yield Mirrored(mirror, client, simulator)
        if running.done():
            running.result()
    finally:
        await client.close()
        running.cancel()
        await asyncio.wait([running], timeout=5)
        await mirror.stop(5)


async def differences(database: Database, simulator: Simulator, tables: tuple[str, ...] = TABLES) -> list[str]:
    """Return what is wrong in the tables, as lines; an empty list means that they equal the simulator's world."""
    wrong: list[str] = []
    unknowable = {
        thread_id
        for guild_id in simulator.world.guild_ids()
        for thread_id in simulator.world.unknowable_thread_ids(guild_id)
    }
    for table in tables:
        keys = key_columns(table)
        tombstone = tombstone_column(table)
        expected = {tuple(row[key] for key in keys): row for row in simulator.world.expected_rows(table)}
        records = await database.fetch(f"SELECT * FROM {table}" + (f" WHERE {tombstone} IS NULL" if tombstone else ""))  # noqa: S608
        found: dict[tuple[Any, ...], dict[str, Any]] = {
            tuple(record[key] for key in keys): dict(record) for record in records
        }
        if table == "users":  # who left every guild stays known
            found = {key: row for key, row in found.items() if key in expected}
        if table == "threads":
            found = {key: row for key, row in found.items() if key[-1] not in unknowable}
        wrong += [f"{table} {key} is missing" for key in expected.keys() - found.keys()]
        wrong += [f"{table} {key} should not be there" for key in found.keys() - expected.keys()]
        for key in expected.keys() & found.keys():
            for column, value in expected[key].items():
                if found[key][column] != value:
                    wrong.append(f"{table} {key}: {column} is {found[key][column]!r}, should be {value!r}")
    return wrong

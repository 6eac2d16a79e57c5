"""Announcing writes between two processes, and what happens when that fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import asyncpg
import orjson
import pytest

from tests.database.cache.conftest import PATIENCE, UPDATE, Process, started
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.cache import Channel, QueryCache
from utils.database.cache.channel import CHANNEL
from utils.exceptions import DatabaseError

pytestmark = pytest.mark.direct("nothing listens through a pooler")

READ = "SELECT value FROM counter WHERE id = $1"
THROUGH_VIEW = "SELECT sum(value)::bigint FROM counted"
Pair = tuple[Process, Process]


@pytest.fixture
async def heard(target: ConnectTarget) -> AsyncIterator[list[list[Any]]]:
    """All messages on the channel, as a third listener receives them."""
    messages: list[list[Any]] = []
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10)
    await connection.add_listener(CHANNEL, lambda *message: messages.append(orjson.loads(message[3])))
    yield messages
    await connection.close(timeout=5)


async def cached(process: Process, sql: str, *args: Any) -> Any:
    """Run a query until its result is cached, and return it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            hits = process.cache.stats()["hits"]
            value = await process.read(sql, *args)
            if process.cache.stats()["hits"] > hits:
                return value
            await asyncio.sleep(0.01)


async def becomes(process: Process, expected: Any, sql: str, *args: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while await process.read(sql, *args) != expected:  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.01)


async def test_writes_reach_both_processes(processes: Pair) -> None:
    one, other = processes
    for process in processes:
        assert await cached(process, READ, 1) == 0
        assert await cached(process, THROUGH_VIEW) == 0
    assert await one.write(UPDATE, 1) == 1
    assert await one.read(READ, 1) == 1
    assert await one.read(THROUGH_VIEW) == 1
    await becomes(other, 1, READ, 1)
    await becomes(other, 1, THROUGH_VIEW)


async def test_rolled_back_writes_are_not_announced(processes: Pair, heard: list[list[Any]]) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    assert await one.write(UPDATE, 1, commit=False) == 1
    assert await one.read(READ, 1) == 0
    await until(lambda: [message[0] for message in heard].count(one.channel.sender) > 3)
    assert not [message for message in heard if message[3] or message[4]]


async def test_writes_are_coalesced(processes: Pair, heard: list[list[Any]]) -> None:
    one, _ = processes
    for _ in range(200):
        one.cache.invalidate(["counter"])
        one.cache.invalidate(["guilds"])
    await until(lambda: any(message[3] for message in heard))
    told = [message for message in heard if message[3]]
    assert told[0][3] == ["public.counter", "public.guilds"]
    assert len(told) == 1


async def test_ignores_its_own_messages(processes: Pair, heard: list[list[Any]]) -> None:
    one, _ = processes
    await one.write(UPDATE, 1)
    assert await cached(one, READ, 1) == 1
    await until(lambda: any(message[3] for message in heard))
    number = heard[-1][1]
    await until(lambda: number not in one.channel._sent)
    hits = one.cache.stats()["hits"]
    assert await one.read(READ, 1) == 1
    assert one.cache.stats()["hits"] == hits + 1


async def test_too_many_tables_are_announced_as_all(processes: Pair, heard: list[list[Any]]) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    one.channel._collect(frozenset(f"public.table_{n}" for n in range(1_000)), False)
    await until(lambda: any(message[3] is None for message in heard))
    await until(lambda: other.cache.stats()["size"] == 0)
    assert await cached(other, READ, 1) == 0


async def test_a_write_in_doubt_bypasses_both_caches(processes: Pair) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    with pytest.raises(DatabaseError):
        await one.write(UPDATE, 1, killed=True)
    await until(lambda: other.cache.stats()["size"] == 0)
    for process in processes:
        bypassed = process.cache.stats()["bypassed"]
        assert await process.read(READ, 1) == 0
        assert process.cache.stats()["bypassed"] == bypassed + 1


async def test_reconnects_and_flushes(processes: Pair, caplog: pytest.LogCaptureFixture) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    floods = other.cache._flushes
    with caplog.at_level(logging.INFO):
        await other.kill_channel()
        await until(lambda: other.cache._flushes > floods and other.cache.is_trusted)
    assert [record.levelname for record in caplog.records if "received" in record.message] == ["WARNING", "INFO"]
    assert await cached(other, READ, 1) == 0
    await one.write(UPDATE, 1)
    await becomes(other, 1, READ, 1)


async def test_announces_through_the_pool_while_disconnected(processes: Pair) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    one.channel.direct = replace(one.channel.direct, hosts=("/nowhere",))
    await one.kill_channel()
    await until(lambda: not one.channel.is_listening)
    await one.write(UPDATE, 1)
    await becomes(other, 1, READ, 1)
    assert await cached(other, READ, 1) == 1
    assert not one.cache.is_trusted
    assert await one.read(READ, 1) == 1


async def test_bypasses_the_cache_when_deaf(processes: Pair) -> None:
    _, other = processes
    assert await cached(other, READ, 1) == 0
    connection = other.channel._connection
    assert connection is not None
    await connection.remove_listener(CHANNEL, other.channel._on_message)
    await until(lambda: not other.cache.is_trusted)
    bypassed = other.cache.stats()["bypassed"]
    await other.read(READ, 1)
    assert other.cache.stats()["bypassed"] == bypassed + 1
    await until(lambda: other.channel._connection is not connection and other.cache.is_trusted)


async def test_a_lost_peer_flushes_the_cache(processes: Pair) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    for task in one.channel._tasks:
        task.cancel()
    await one.write(UPDATE, 1)  # its commit is done, its message never goes out
    await until(lambda: not other.channel._peers)
    assert await other.read(READ, 1) == 1


async def test_a_clean_stop_announces_the_last_writes(processes: Pair, target: ConnectTarget) -> None:
    one, other = processes
    async with started(target) as third:
        await until(lambda: third.channel.sender in other.channel._peers)
        assert await cached(other, READ, 1) == 0
        await third.write(UPDATE, 1)
    await until(lambda: third.channel.sender not in other.channel._peers)
    assert await other.read(READ, 1) == 1
    assert await cached(other, READ, 1) == 1
    assert one.cache.is_trusted


async def test_behind_a_pooler_only_the_ttl_remains(
    target: ConnectTarget, database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = QueryCache()
    await cache.load(database)
    channel = Channel(cache, replace(target, pooled=True), database)
    with caplog.at_level(logging.WARNING):
        await channel.start()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert cache.is_trusted
    async with started(target) as other:
        await until(lambda: channel.sender in other.channel._peers)
    await channel.stop()
    assert not cache.is_trusted


async def test_an_unknown_message_flushes_the_cache(processes: Pair) -> None:
    one, other = processes
    assert await cached(other, READ, 1) == 0
    await one.database.execute("SELECT pg_notify($1, 'hello')", CHANNEL)
    await until(lambda: other.cache.stats()["size"] == 0)


async def test_a_new_view_is_known_to_both_processes(processes: Pair) -> None:
    one, other = processes
    sql = "SELECT v FROM doubled"
    create = "CREATE VIEW doubled AS SELECT 2 * sum(value)::bigint AS v FROM counter"
    assert one.cache.statement(create).writes is None
    await one.database.execute(create)
    one.cache.invalidate(None)
    for process in processes:
        assert await cached(process, sql) == 0
    await other.write(UPDATE, 2)
    assert await other.read(sql) == 2
    await becomes(one, 2, sql)

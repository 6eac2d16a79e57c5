"""The change feed beside concurrent writers: every committed change exactly once, in the order of the ids."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import DISCORD_EPOCH_MS
from tests.conftest import examples
from tests.mirror.feeding import INSERT, INSERT_EVENT, INSERT_USER, Received, connected, drained, running, write
from tests.mirror.tables import GUILD
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.mirror.change_feed import ChangeFeed


@pytest.fixture
def received() -> Received:
    return Received()


@pytest.fixture
async def feed(database: Pool, received: Received) -> ChangeFeed:
    """A feed that has started: what is written from now on is new."""
    feed = received.feed(database)
    await feed.step()
    return feed


async def test_waits_for_a_smaller_id_that_commits_later(
    database: Pool, target: ConnectTarget, feed: ChangeFeed, received: Received
) -> None:
    async with connected(target, 1) as (slow,):
        transaction = slow.transaction()
        await transaction.start()
        first = await slow.fetchval(INSERT, GUILD, '{"id": 1}')
        second = await write(database)
        await asyncio.sleep(0.003)
        assert await feed.step() == (0, False)
        await transaction.commit()
    await drained(feed)
    assert received.ids == [first, second]


async def test_waits_for_an_id_taken_before_the_transaction_id(
    target: ConnectTarget, feed: ChangeFeed, received: Received
) -> None:
    taken = f"((extract(epoch FROM clock_timestamp()) * 1000)::bigint - {DISCORD_EPOCH_MS}) << 22"
    async with connected(target, 1) as (slow,):
        inserting = asyncio.create_task(
            slow.fetchval(
                "INSERT INTO changes (guild_id, id, table_name, key, action) "  # noqa: S608
                f"SELECT $1, t.id, 'roles', '{{}}', 'update' FROM (SELECT {taken} AS id OFFSET 0) t, "
                "LATERAL (SELECT pg_sleep(0.3 + t.id * 0.0)) s RETURNING id",
                GUILD,
            )
        )
        while not inserting.done():
            await feed.step()
            await asyncio.sleep(0.01)
        await drained(feed)
        assert received.ids == [await inserting]


async def test_open_readers_do_not_delay_the_feed(
    database: Pool, target: ConnectTarget, feed: ChangeFeed, received: Received
) -> None:
    async with connected(target, 1) as (reader,):
        transaction = reader.transaction(isolation="repeatable_read")
        await transaction.start()
        await reader.fetch("SELECT * FROM changes")
        written = await write(database)
        await drained(feed)
        assert received.ids == [written]
        await transaction.rollback()


async def test_skips_what_was_rolled_back(target: ConnectTarget, feed: ChangeFeed, received: Received) -> None:
    async with connected(target, 1) as (writer,):
        transaction = writer.transaction()
        await transaction.start()
        await writer.fetchval(INSERT, GUILD, "{}")
        await transaction.rollback()
    await drained(feed)
    assert received.ids == []


Steps = list[tuple[int, str]]
steps = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(("write", "write", "write user", "write event", "commit", "rollback")))
    | st.just((-1, "read"))
    | st.just((-1, "restart")),
    max_size=40,
)


@examples(40)
@given(steps=steps, batch=st.sampled_from((1, 2, 500)))
async def test_dispatches_every_committed_change_once_in_order(
    steps: Steps, batch: int, interleaving: Interleaving
) -> None:
    await interleaving.run(steps, batch)


async def test_loses_nothing_beside_parallel_writers(
    database: Pool, target: ConnectTarget, feed: ChangeFeed, received: Received
) -> None:
    committed: set[int] = set()

    async def write_for_a_while(connection: asyncpg.Connection[asyncpg.Record], seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            transaction = connection.transaction()
            await transaction.start()
            ids = []
            for _ in range(rng.randrange(1, 4)):
                ids.append(await connection.fetchval(INSERT, GUILD, f'{{"id": {rng.randrange(3)}}}'))
                await asyncio.sleep(rng.random() * 0.01)
            if rng.random() < 0.8:
                await transaction.commit()
                committed.update(ids)
            else:
                await transaction.rollback()
            feed.notice()

    async with running(feed), connected(target, 5) as connections:
        await asyncio.gather(*(write_for_a_while(connection, n) for n, connection in enumerate(connections)))
        await until(lambda: len(received.ids) >= len(committed))
    assert received.ids == sorted(committed)


class Interleaving:
    """Runs the steps of several overlapping transactions, and a feed beside them."""

    def __init__(self, database: Pool, connections: list[asyncpg.Connection[asyncpg.Record]]) -> None:
        self.database = database
        self.connections = connections

    async def run(self, steps: Steps, batch: int) -> None:
        open_: dict[int, tuple[Any, list[int]]] = {}
        committed: list[int] = []
        received = Received()
        await self.database.execute("TRUNCATE changes, user_changes, member_events, ops.positions")
        await asyncio.sleep(0.003)
        feed = received.feed(self.database, batch=batch)
        await feed.step()
        for number, what in [*steps, *((number, "commit") for number in range(len(self.connections)))]:
            if what == "read":
                await feed.step()
            elif what == "restart":
                feed = received.feed(self.database, batch=batch)
            elif what.startswith("write"):
                connection = self.connections[number]
                if number not in open_:
                    transaction = connection.transaction()
                    await transaction.start()
                    open_[number] = transaction, []
                insert, second = {"write": (INSERT, '{"id": 1}'), "write user": (INSERT_USER, '{"id": 1}'),
                                  "write event": (INSERT_EVENT, 5)}[what]  # fmt: skip
                open_[number][1].append(await connection.fetchval(insert, GUILD, second))
            elif number in open_:
                transaction, ids = open_.pop(number)
                await (transaction.commit() if what == "commit" else transaction.rollback())
                committed += ids if what == "commit" else []
        await drained(feed)
        assert received.ids == sorted(committed)


@pytest.fixture
async def interleaving(database: Pool, target: ConnectTarget) -> AsyncIterator[Interleaving]:
    async with connected(target, 4) as connections:
        yield Interleaving(database, connections)

"""The feed of changes beside writers that overlap: each committed change exactly once, in the order of the ids."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import DISCORD_EPOCH_MS
from tests.mirror.feeding import INSERT, INSERT_EVENT, INSERT_USER, Heard, connected, drained, running, write
from tests.mirror.tables import GUILD
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.mirror import change_feed
from utils.mirror.change_feed import ChangeFeed


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def feed(database: Pool, heard: Heard) -> ChangeFeed:
    """A feed that has begun: what is written from now on is news."""
    made = heard.feed(database)
    await made.step()
    return made


async def test_a_later_commit_with_a_smaller_id_is_not_passed(
    database: Pool, target: ConnectTarget, feed: ChangeFeed, heard: Heard
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
    assert heard.ids == [first, second]


async def test_an_id_that_was_taken_before_its_transaction_had_one_is_not_passed(
    target: ConnectTarget, feed: ChangeFeed, heard: Heard
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
        assert heard.ids == [await inserting]


async def test_who_only_reads_holds_nothing_up(
    database: Pool, target: ConnectTarget, feed: ChangeFeed, heard: Heard
) -> None:
    async with connected(target, 1) as (reader,):
        transaction = reader.transaction(isolation="repeatable_read")
        await transaction.start()
        await reader.fetch("SELECT * FROM changes")
        written = await write(database)
        await drained(feed)
        assert heard.ids == [written]
        await transaction.rollback()


async def test_what_is_rolled_back_was_never_there(target: ConnectTarget, feed: ChangeFeed, heard: Heard) -> None:
    async with connected(target, 1) as (writer,):
        transaction = writer.transaction()
        await transaction.start()
        await writer.fetchval(INSERT, GUILD, "{}")
        await transaction.rollback()
    await drained(feed)
    assert heard.ids == []


Steps = list[tuple[int, str]]
steps = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from(("write", "write", "write user", "write event", "commit", "rollback")))
    | st.just((-1, "read"))
    | st.just((-1, "restart")),
    max_size=40,
)


@settings(max_examples=60)
@given(steps=steps, batch=st.sampled_from((1, 2, 500)))
async def test_every_committed_change_comes_exactly_once_in_order(
    steps: Steps, batch: int, overlapping: Overlapping
) -> None:
    await overlapping.play(steps, batch)


async def test_writers_that_really_overlap_lose_nothing(
    database: Pool, target: ConnectTarget, feed: ChangeFeed, heard: Heard
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
        await until(lambda: len(heard.ids) >= len(committed))
    assert heard.ids == sorted(committed)


class Overlapping:
    """Plays steps of several connections that overlap, one after the other, and a feed beside them."""

    def __init__(self, database: Pool, connections: list[asyncpg.Connection[asyncpg.Record]]) -> None:
        self.database = database
        self.connections = connections

    async def play(self, steps: Steps, batch: int) -> None:
        open_: dict[int, tuple[Any, list[int]]] = {}
        committed: list[int] = []
        heard = Heard()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(change_feed, "BATCH", batch)
            await self.database.execute("TRUNCATE changes, user_changes, member_events, ops.positions")
            await asyncio.sleep(0.003)
            feed = heard.feed(self.database)
            await feed.step()
            for number, what in [*steps, *((number, "commit") for number in range(len(self.connections)))]:
                if what == "read":
                    await feed.step()
                elif what == "restart":
                    feed = heard.feed(self.database)
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
        assert heard.ids == sorted(committed)


@pytest.fixture
async def overlapping(database: Pool, target: ConnectTarget) -> AsyncIterator[Overlapping]:
    async with connected(target, 4) as connections:
        yield Overlapping(database, connections)

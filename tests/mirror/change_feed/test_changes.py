"""The feed of changes: what it hands out, from where on, and what it does in trouble."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.mirror.feeding import INSERT_EVENT, INSERT_USER, Heard, drained, running, write
from tests.mirror.tables import GUILD, OTHER_GUILD
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.mirror import change_feed
from utils.mirror.change_feed import ChangeFeed, MirrorChange


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def feed(database: Pool, heard: Heard) -> ChangeFeed:
    """A feed that has begun: what is written from now on is news."""
    made = heard.feed(database)
    await made.step()
    return made


async def test_the_first_start_begins_at_the_present(database: Pool, heard: Heard) -> None:
    await write(database)
    await asyncio.sleep(0.003)
    feed = heard.feed(database)
    await drained(feed)
    assert heard.ids == []
    later = await write(database)
    await drained(feed)
    assert heard.ids == [later]


async def test_the_three_kinds_come_in_one_order_and_say_what_they_are(
    database: Pool, feed: ChangeFeed, heard: Heard
) -> None:
    ids = [
        await database.fetchval(INSERT_EVENT, GUILD, 5),
        await database.fetchval(
            "INSERT INTO changes (guild_id, table_name, key, action, user_id, before, after, inferred) VALUES "
            """($1, 'members', '{"user_id": 5}', 'remove', 5, '{"nick": "a"}', '{"nick": null}', true) RETURNING id""",
            GUILD,
        ),
        await database.fetchval(INSERT_USER, 5, '{"id": 5}'),
    ]
    await drained(feed)
    assert heard.ids == ids
    event, removed, user = heard.changes
    assert (event.table, event.action, event.guild_id, event.user_id) == ("member_events", "leave", GUILD, 5)
    assert (event.key, event.before, event.after) == ({"guild_id": GUILD, "user_id": 5}, None, None)
    assert (removed.table, removed.key, removed.action, removed.user_id) == ("members", {"user_id": 5}, "remove", 5)
    assert (removed.before, removed.after, removed.inferred) == ({"nick": "a"}, {"nick": None}, True)
    assert (user.table, user.guild_id, user.user_id, user.inferred) == ("users", None, 5, False)
    assert user.at.tzinfo is not None


async def test_more_than_one_batch_comes_whole(
    database: Pool, feed: ChangeFeed, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_feed, "BATCH", 3)
    ids = [await write(database, row) for row in range(10)]
    ids.append(await database.fetchval(INSERT_EVENT, OTHER_GUILD, 5))
    await drained(feed)
    assert heard.ids == ids


async def test_what_was_written_while_nobody_ran_comes_at_the_next_start_and_nothing_twice(
    database: Pool, feed: ChangeFeed, heard: Heard
) -> None:
    seen = await write(database)
    await drained(feed)
    missed = [await write(database), await write(database)]
    await drained(heard.feed(database))
    assert heard.ids == [seen, *missed]


async def test_a_process_that_ended_before_it_could_save_repeats_its_last_batch_alone(
    database: Pool, feed: ChangeFeed, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_feed, "BATCH", 2)
    ids = [await write(database, row) for row in range(3)]
    await asyncio.sleep(0.003)
    await feed.step()

    async def lost(*args: Any) -> str:
        raise DatabaseUnavailable("the connection was lost")

    with monkeypatch.context() as context:
        context.setattr(database, "execute", lost)
        with pytest.raises(DatabaseUnavailable):
            await feed.step()
    await drained(heard.feed(database))
    assert heard.ids == [*ids, ids[-1]]


async def test_a_save_that_failed_hands_nothing_out_again_in_the_same_run(
    database: Pool, feed: ChangeFeed, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, failures = database.execute, 2

    async def now_and_then(*args: Any) -> str:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise DatabaseUnavailable("the connection was lost")
        return await execute(*args)

    monkeypatch.setattr(database, "execute", now_and_then)
    monkeypatch.setattr(change_feed, "RETRY_SECONDS", 0.01)
    async with running(feed):
        ids = [await write(database)]
        await until(lambda: failures < 2)
        ids.append(await write(database))
        await until(lambda: len(heard.ids) == 2)
    assert heard.ids == ids
    assert await database.fetchval("SELECT position FROM ops.positions") >= ids[-1]


async def test_while_nobody_listens_the_position_moves_on(database: Pool, feed: ChangeFeed, heard: Heard) -> None:
    heard.wanted = False
    written = await write(database)
    await drained(feed)
    assert feed.position is not None
    assert feed.position > written
    heard.wanted = True
    await drained(feed)
    assert heard.ids == []


async def test_a_listener_that_fails_costs_the_others_nothing(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    heard = Heard()

    def dispatch(change: MirrorChange) -> None:
        heard.changes.append(change)
        raise RuntimeError("a listener's own fault")

    feed = ChangeFeed(database, dispatch, wanted=lambda: True)
    await feed.step()
    ids = [await write(database), await write(database)]
    await drained(feed)
    assert heard.ids == ids
    assert "a change could not be handed out" in caplog.text


async def test_the_position_never_goes_back(database: Pool, feed: ChangeFeed) -> None:
    await write(database)
    await drained(feed)
    await database.execute("UPDATE ops.positions SET position = 9000000000000000000")
    await write(database)
    await drained(feed)
    assert await database.fetchval("SELECT position FROM ops.positions") == 9_000_000_000_000_000_000


async def test_a_clock_that_was_set_back_is_said_once(
    database: Pool, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    feed = heard.feed(database)
    await feed.step()
    assert feed.position is not None
    feed.position += 1 << 60
    await feed.step()
    assert "clock was set back" in caplog.text


async def test_a_notice_is_answered_before_the_poll(
    database: Pool, feed: ChangeFeed, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_feed, "POLL_SECONDS", 3_600)
    async with running(feed):
        await asyncio.sleep(0.3)
        written = await write(database)
        feed.notice()
        await until(lambda: heard.ids == [written], 5)


async def test_what_others_write_comes_with_the_poll(database: Pool, feed: ChangeFeed, heard: Heard) -> None:
    async with running(feed):
        await asyncio.sleep(0.3)
        written = await write(database)
        await until(lambda: heard.ids == [written], 5)


async def test_a_database_that_is_away_is_waited_for(
    database: Pool,
    feed: ChangeFeed,
    heard: Heard,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(change_feed, "RETRY_SECONDS", 0.01)
    fetchrow, failures = database.fetchrow, 0

    async def away(*args: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise DatabaseUnavailable("the server is restarting")
        return await fetchrow(*args)

    written = await write(database)
    monkeypatch.setattr(database, "fetchrow", away)
    async with running(feed):
        await until(lambda: heard.ids == [written])
    assert "changes wait to be handed out: the server is restarting" in caplog.text


async def test_notices_in_their_thousands_cost_few_reads(
    database: Pool, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetchrow, reads = database.fetchrow, 0

    async def counted(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        return await fetchrow(*args)

    monkeypatch.setattr(database, "fetchrow", counted)
    async with running(feed):
        for _ in range(100):
            feed.notice()
            await asyncio.sleep(0.005)
    assert reads <= 8

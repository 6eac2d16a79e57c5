"""The change feed: what it dispatches, where it starts, and how it behaves when something fails."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.mirror.feeding import INSERT_EVENT, INSERT_USER, Received, drained, running, write
from tests.mirror.tables import GUILD, OTHER_GUILD
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.mirror.change_feed import ChangeFeed, MirrorChange

POSITION = "SELECT position FROM ops.positions"


@pytest.fixture
def received() -> Received:
    return Received()


@pytest.fixture
async def feed(database: Pool, received: Received) -> ChangeFeed:
    """A feed that has started: what is written from now on is new."""
    return await started(database, received)


async def started(database: Pool, received: Received, **options: Any) -> ChangeFeed:
    feed = received.feed(database, **options)
    await feed.step()
    return feed


async def test_first_start_begins_at_the_present(database: Pool, received: Received) -> None:
    await write(database)
    await asyncio.sleep(0.003)
    feed = received.feed(database)
    await drained(feed)
    assert received.ids == []
    later = await write(database)
    await drained(feed)
    assert received.ids == [later]


async def test_dispatches_rows_users_and_events_in_one_order(
    database: Pool, feed: ChangeFeed, received: Received
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
    assert received.ids == ids
    event, removed, user = received.changes
    assert (event.table, event.action, event.guild_id, event.user_id) == ("member_events", "leave", GUILD, 5)
    assert (event.key, event.before, event.after) == ({"guild_id": GUILD, "user_id": 5}, None, None)
    assert (removed.table, removed.key, removed.action, removed.user_id) == ("members", {"user_id": 5}, "remove", 5)
    assert (removed.before, removed.after, removed.inferred) == ({"nick": "a"}, {"nick": None}, True)
    assert (user.table, user.guild_id, user.user_id, user.inferred) == ("users", None, 5, False)
    assert user.at.tzinfo is not None


async def test_dispatches_more_than_one_batch(database: Pool, received: Received) -> None:
    feed = await started(database, received, batch=3)
    ids = [await write(database, row) for row in range(10)]
    ids.append(await database.fetchval(INSERT_EVENT, OTHER_GUILD, 5))
    await drained(feed)
    assert received.ids == ids


async def test_restart_dispatches_what_was_missed_once(database: Pool, feed: ChangeFeed, received: Received) -> None:
    seen = await write(database)
    await drained(feed)
    missed = [await write(database), await write(database)]
    await drained(received.feed(database))
    assert received.ids == [seen, *missed]


async def test_unsaved_position_repeats_only_the_last_batch(
    database: Pool, received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = await started(database, received, batch=2)
    ids = [await write(database, row) for row in range(3)]
    await asyncio.sleep(0.003)
    await feed.step()

    async def fails(*args: Any) -> str:
        raise DatabaseUnavailable("the connection was lost")

    with monkeypatch.context() as context:
        context.setattr(database, "execute", fails)
        with pytest.raises(DatabaseUnavailable):
            await feed.step()
    await drained(received.feed(database))
    assert received.ids == [*ids, ids[-1]]


async def test_failed_save_repeats_nothing_in_the_same_run(
    database: Pool, received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = await started(database, received, retry_seconds=0.01)
    execute, failures = database.execute, 2

    async def fails_twice(*args: Any) -> str:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise DatabaseUnavailable("the connection was lost")
        return await execute(*args)

    monkeypatch.setattr(database, "execute", fails_twice)
    async with running(feed):
        ids = [await write(database)]
        await until(lambda: failures < 2)
        ids.append(await write(database))
        await until(lambda: len(received.ids) == 2)
    assert received.ids == ids
    assert await database.fetchval(POSITION) >= ids[-1]


async def test_skips_changes_without_listeners(database: Pool, feed: ChangeFeed, received: Received) -> None:
    received.has_listeners = False
    written = await write(database)
    await drained(feed)
    assert feed.position is not None
    assert feed.position > written
    received.has_listeners = True
    await drained(feed)
    assert received.ids == []


async def test_failing_listener_does_not_stop_the_feed(database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    received = Received()

    def dispatch(change: MirrorChange) -> None:
        received.changes.append(change)
        raise RuntimeError("a bug in a listener")

    feed = ChangeFeed(database, dispatch, has_listeners=lambda: True)
    await feed.step()
    ids = [await write(database), await write(database)]
    await drained(feed)
    assert received.ids == ids
    assert "could not dispatch a change" in caplog.text


async def test_saved_position_never_goes_back(database: Pool, feed: ChangeFeed) -> None:
    await write(database)
    await drained(feed)
    await database.execute("UPDATE ops.positions SET position = 9000000000000000000")
    await write(database)
    await drained(feed)
    assert await database.fetchval(POSITION) == 9_000_000_000_000_000_000


async def test_logs_a_clock_that_was_set_back_once(
    database: Pool, feed: ChangeFeed, caplog: pytest.LogCaptureFixture
) -> None:
    assert feed.position is not None
    feed.position += 1 << 60
    await feed.step()
    await feed.step()
    assert caplog.text.count("clock was set back") == 1


async def test_notice_triggers_a_read_before_the_poll(database: Pool, received: Received) -> None:
    feed = await started(database, received, poll_seconds=3_600)
    async with running(feed):
        await until(lambda: feed.is_waiting)
        written = await write(database)
        assert received.ids == []
        feed.notice()
        await until(lambda: received.ids == [written])


async def test_poll_finds_changes_of_other_processes(database: Pool, received: Received) -> None:
    feed = await started(database, received, poll_seconds=0.5)
    async with running(feed):
        await until(lambda: feed.is_waiting)
        written = await write(database)
        await until(lambda: received.ids == [written])


async def test_retries_while_the_database_is_unavailable(
    database: Pool, received: Received, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    feed = await started(database, received, retry_seconds=0.01)
    fetchrow, failures = database.fetchrow, 0

    async def fails_three_times(*args: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise DatabaseUnavailable("the server is restarting")
        return await fetchrow(*args)

    written = await write(database)
    monkeypatch.setattr(database, "fetchrow", fails_three_times)
    async with running(feed):
        await until(lambda: received.ids == [written])
    assert caplog.text.count("could not read changes; they wait: the server is restarting") == 3


async def test_many_notices_cause_few_reads(database: Pool, feed: ChangeFeed, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert 2 <= reads <= 8

"""While PostgreSQL accepts no writes nothing is lost, and nothing else waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from tests.mirror.faults.test_live import people
from tests.mirror.harness import changes, differences, mirrored, removals, runs, small_world, versions
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.mirror.records.rows import COUNTER_BITS
from utils.mirror.write.batch import WriteCounts, write_batch
from utils.service import metrics


async def end_connections(admin: asyncpg.Connection[asyncpg.Record]) -> int:
    """Terminate every other connection to the database, and return their number."""
    ended = await admin.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return len(ended)


@asynccontextmanager
async def administrator(database: Pool) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A separate connection, outside the bot's pool."""
    connection = await asyncpg.connect(**database.target.connect_kwargs())
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def refusing(database: Pool, how: str) -> AsyncIterator[None]:
    """Make the database refuse writes during the block."""
    async with administrator(database) as admin:
        name = database.target.database
        if how == "locked":
            async with admin.transaction():
                await admin.execute("LOCK TABLE users, members IN SHARE MODE")  # in the order of those who write
                yield
            return
        on, off = {
            "read-only": (
                f"ALTER DATABASE {name} SET default_transaction_read_only = on",
                f"ALTER DATABASE {name} RESET default_transaction_read_only",
            ),
            "missing a table": ("ALTER TABLE members RENAME TO mislaid", "ALTER TABLE mislaid RENAME TO members"),
            "gone": ("", ""),
        }[how]
        if how == "gone":
            ending = asyncio.create_task(_keep_ending(admin))
            try:
                yield
            finally:
                ending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await ending
            return
        await admin.execute(on)
        await end_connections(admin)
        try:
            yield
        finally:
            await admin.execute("SET default_transaction_read_only = off")
            await admin.execute(off)
            await end_connections(admin)


async def _keep_ending(admin: asyncpg.Connection[asyncpg.Record]) -> None:
    while True:
        await end_connections(admin)
        await asyncio.sleep(0.001)


def failures() -> float:
    """Return the number of failed flushes."""
    value: float = metrics.flush_failures._value.get()
    return value


#: How many connections are in the middle of a COPY.
COPYING = (
    "SELECT count(*) FROM pg_stat_activity "
    "WHERE datname = current_database() AND state = 'active' AND query LIKE 'COPY %'"
)
FAILED_MORE_THAN = "SELECT count(*) > $1 FROM sync_runs WHERE state = 'failed'"
HOW = ["read-only", "locked", "missing a table", "gone"]


@pytest.mark.parametrize("how", HOW)
async def test_live_rows_wait_while_the_database_refuses_writes(
    database: Pool, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    simulator, (guild_id, other) = small_world(monkeypatch, 45, 6, heartbeat_interval=0.3)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        before = failures()
        async with refusing(database, how):
            world.update_member(guild_id, crowd[0], nick="while it was down")
            world.leave(guild_id, crowd[1])
            world.rename_user(crowd[2], global_name="while it was down")
            world.create_role(guild_id, "while it was down")
            world.join(other)
            await until(bot.has_received_all)
            if how == "locked":
                await until(bot.mirror.writer.write_lock.locked)
            else:
                await until(lambda: failures() >= before + 2)
                # What the missing table does not concern is written meanwhile.
                assert len(bot.mirror.writer.buffer) > (0 if how == "missing a table" else 4)
            beats = sum(connection.last_heartbeat for connection in simulator.gateway.connections)
            await until(lambda: sum(c.last_heartbeat for c in simulator.gateway.connections) > beats)
            world.update_member(guild_id, crowd[0], nick="and once more")
        await bot.settled()
        assert simulator.gateway.identifies == 1
        assert simulator.gateway.resumes == 0
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", crowd[1])}
    assert [change[4]["nick"] for change in await changes(database, user_id=crowd[0])][-1] == "and once more"


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [6, 60], ids=["small guild", "large guild"])
@pytest.mark.parametrize("known", [False, True], ids=["first sync", "a sync of what is known"])
async def test_a_sync_survives_a_database_that_refuses_writes(
    database: Pool, monkeypatch: pytest.MonkeyPatch, how: str, size: int, known: bool
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, size, pages_per_second=40)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator:
        if known:
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.settled()
            world.leave(guild_id, crowd[0])
            world.update_member(guild_id, crowd[1], nick="meanwhile")
        async with mirrored(database, simulator, monkeypatch) as bot:
            await until(lambda: bot.mirror.reconciler.guilds)
            async with refusing(database, how):
                await until(bot.has_received_all)
                world.rename_user(crowd[2], global_name="while it was down")
                world.join(guild_id)
                await until(bot.has_received_all)
                await until(lambda: len(bot.mirror.writer.buffer) or bot.mirror.writer.write_lock.locked())
                ready, progress = bot.mirror.is_ready()
                assert not ready, progress
            await bot.settled()
    assert (await runs(database, guild_id))[-1][0] == "complete"
    assert await differences(database, simulator) == []
    assert await removals(database) <= ({("members", crowd[0])} if known else set())


async def test_connections_lost_during_a_listing_lose_no_member(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 120, pages_per_second=20)
    async with simulator, administrator(database) as admin:
        for round_ in range(2):  # the first sync, then one of what is known
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.listing(guild_id, pages=4)

                async def interrupted(round_: int = round_) -> bool:
                    if await admin.fetchval(COPYING):
                        await end_connections(admin)
                    return bool(await admin.fetchval(FAILED_MORE_THAN, round_))

                await until(interrupted)
                await bot.settled()
                states = [state for state, _ in await runs(database, guild_id)]
                assert states[-1] == "complete"
                assert states.count("failed") > round_
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


async def test_pending_rows_are_written_or_reported_lost_at_stop(
    database: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    async with simulator:
        async with mirrored(database, simulator, monkeypatch, flush_seconds=60) as bot:
            await bot.settled()
            world.update_guild(guild_id, name="written at the stop")
            await until(bot.has_received_all)
            assert len(bot.mirror.writer.buffer)
        assert await differences(database, simulator) == []
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            async with refusing(database, "locked"):
                world.join(guild_id)
                await until(bot.has_received_all)
                await bot.mirror.stop(0.1)
                bot.killed = True
    assert any("rows were not written" in record.getMessage() for record in caplog.records)


async def test_buffered_rows_older_than_a_listing_do_not_overwrite_it(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer waits when a new session begins, whose listing shows other nicks; its dispatches are partial."""
    simulator, (guild_id,) = small_world(monkeypatch, 60, pages_per_second=20)
    world, crowd = simulator.world, people(simulator, guild_id)
    is_down = [True]

    async def refused(*arguments: Any) -> WriteCounts:
        if is_down[0]:
            raise DatabaseUnavailable("the buffer cannot be written, COPY can")
        return await write_batch(*arguments)

    monkeypatch.setattr("utils.mirror.write.writer.write_batch", refused)
    simulator.faults.ignore_member_request(guild_id)
    async with simulator, mirrored(database, simulator, monkeypatch, page_timeout=20.0, user_batch_pages=25) as bot:
        await until(lambda: simulator.faults.injected["ignore_member_request"])
        for id in crowd:
            world.update_member(guild_id, id, nick="before")
        await until(lambda: len(bot.mirror.writer.buffer) > len(crowd))
        simulator.faults.refuse_resume()
        simulator.faults.drop_socket()
        for id in crowd:
            world.update_member(guild_id, id, nick="unheard")
        await until(lambda: simulator.gateway.identifies == 2)
        await bot.listing(guild_id, pages=1)
        for id in crowd:
            world.update_member(guild_id, id, roles=[])
        state = bot.mirror.reconciler.guilds[guild_id]
        await until(lambda: guild_id in bot.mirror.writer.buffer.held_guilds or state.failures)
        is_down[0] = False
        await bot.settled()
    assert simulator.faults.injected["refuse_resume"] == 1
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("pooled", [False, True], ids=["staged", "page by page"])
async def test_listing_older_than_a_complete_one_changes_nothing(
    database: Pool, monkeypatch: pytest.MonkeyPatch, pooled: bool
) -> None:
    if pooled:
        monkeypatch.setattr(database, "target", replace(database.target, pooled=True))
    simulator, (guild_id,) = small_world(monkeypatch, 60, pages_per_second=20)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        before = (await versions(database))["members"]
        for id in crowd:
            world.update_member(guild_id, id, nick="seen by the other process, and changed back since")
        async with mirrored(database, simulator, monkeypatch) as bot:
            listing = await bot.listing(guild_id, pages=1)
            await database.execute(
                "INSERT INTO sync_runs (guild_id, started_at, finished_at, state, source, reason, stamp, pages, "
                "rows_seen, rows_inserted, rows_updated, rows_left) "
                "VALUES ($1, now(), now(), 'complete', 'gateway', 'request', $2, 6, 60, 0, 0, 0)",
                guild_id,
                (bot.mirror.stamps.last >> COUNTER_BITS) + 1 << COUNTER_BITS,
            )
            await until(lambda: listing.is_complete and bot.mirror.reconciler.guilds[guild_id].listing is not listing)
            await bot.kill()
    assert (await versions(database))["members"] == before
    assert await removals(database) == set()

"""Dropped sockets, sessions that are refused and processes that are killed: nobody is tombstoned for them."""

from __future__ import annotations

import pytest

from tests.mirror.faults.test_live import people
from tests.mirror.harness import changes, differences, mirrored, removals, runs, small_world
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import SyncError

SIZE = 60


@pytest.mark.parametrize("known", [False, True], ids=["first sync", "a sync of what is known"])
async def test_listing_continues_after_a_resume(database: Pool, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, SIZE, pages_per_second=60)
    async with simulator:
        if known:
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.settled()
        simulator.faults.drop_socket_after_pages(guild_id, 3)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await until(lambda: simulator.faults.injected["drop_socket_after_pages"])
            simulator.world.leave(guild_id, gone := people(simulator, guild_id)[0])
            await bot.settled()
    assert simulator.gateway.resumes == 1
    assert {state for state, _ in await runs(database, guild_id)} == {"complete"}
    assert await differences(database, simulator) == []
    assert await removals(database) <= {("members", gone)}


@pytest.mark.parametrize("known", [False, True], ids=["first sync", "a sync of what is known"])
async def test_refused_resume_restarts_the_listing(
    database: Pool, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    simulator, (guild_id, other) = small_world(monkeypatch, SIZE, 12, pages_per_second=60)
    world = simulator.world
    async with simulator:
        if known:
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.settled()
        before = simulator.gateway.identifies
        simulator.faults.drop_socket_after_pages(guild_id, 3)
        simulator.faults.refuse_resume()
        async with mirrored(database, simulator, monkeypatch) as bot:
            await until(lambda: simulator.faults.injected["drop_socket_after_pages"])
            crowd = people(simulator, guild_id)
            world.leave(guild_id, crowd[0])  # while nobody listens
            world.update_member(guild_id, crowd[1], nick="unheard")
            world.join(other)
            await until(lambda: simulator.gateway.identifies == before + 2)
            await bot.settled()
    assert simulator.faults.injected["refuse_resume"] == 1
    assert (await runs(database, guild_id))[-1][0] == "complete"
    assert ("failed", "gateway") in await runs(database, guild_id)
    assert await differences(database, simulator) == []
    assert await removals(database) <= {("members", crowd[0])}


async def test_invalid_session_reconciles_every_guild(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (large, small) = small_world(monkeypatch, 45, 6)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        simulator.faults.pause()  # events of the old session that never come
        gone = people(simulator, large)[0]
        world.leave(large, gone)
        world.join(small)
        for session in simulator.gateway.sessions.values():
            session._outbox.clear()
        assert simulator.faults.invalidate_session(resumable=False) == 1
        simulator.faults.resume()
        await until(lambda: simulator.gateway.identifies == 2)
        await bot.settled()
        assert len(await runs(database, large)) == len(await runs(database, small)) == 2
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", gone)}


async def test_sync_fails_when_its_session_ends(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, SIZE, pages_per_second=30)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        simulator.faults.drop_socket_after_pages(guild_id, 2)
        simulator.faults.refuse_resume()
        with pytest.raises(SyncError, match="new gateway session"):
            await bot.mirror.sync(guild_id)
        await bot.settled()
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("known", [False, True], ids=["first sync", "a sync of what is known"])
@pytest.mark.parametrize("pages", [1, 3, 5])
async def test_next_start_repairs_a_listing_cut_by_a_kill(
    database: Pool, monkeypatch: pytest.MonkeyPatch, known: bool, pages: int
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, SIZE, pages_per_second=30)
    world = simulator.world
    async with simulator:
        if known:
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.settled()
        crowd = people(simulator, guild_id)
        world.leave(guild_id, crowd[0])
        world.update_member(guild_id, crowd[1], nick="while it was away")
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.listing(guild_id, pages=pages)
            world.leave(guild_id, crowd[2])
            world.rename_user(crowd[3], global_name="unheard")
            await bot.kill()
        assert await removals(database) <= {("members", crowd[0]), ("members", crowd[2])}
        assert await database.fetchval("SELECT count(*) FROM sync_runs WHERE state = 'complete'") == int(known)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    assert await differences(database, simulator) == []
    gone = {("members", crowd[0]), ("members", crowd[2])} if known else set()
    assert await removals(database) == gone


@pytest.mark.parametrize("echo", ["at once", "a few events later"])
async def test_duplicate_dispatches_count_once(database: Pool, monkeypatch: pytest.MonkeyPatch, echo: str) -> None:
    """The duplicate is older than what was received since: applied again, it would restore old values."""
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    world = simulator.world
    monkeypatch.setattr(simulator.faults.rng, "choice", lambda _: 0 if echo == "at once" else 3)
    async with simulator, mirrored(database, simulator, monkeypatch, flush_seconds=0.001) as bot:
        await bot.settled()
        simulator.faults.duplicate_events(1.0)
        crowd = people(simulator, guild_id)
        for number in range(10):
            world.update_member(guild_id, crowd[0], nick=f"nick {number}")
            world.leave(guild_id, crowd[1])
            world.join(guild_id, crowd[1])
        role = world.create_role(guild_id)
        world.delete_role(guild_id, role)
        for number in range(5):
            world.rename_user(crowd[3], global_name=f"the last {number}")
        await bot.settled()
    assert simulator.faults.injected["duplicate_events"] > 10
    assert await differences(database, simulator) == []
    nicks = [change[4]["nick"] for change in await changes(database, table_name="members", user_id=crowd[0])]
    assert nicks == sorted(nicks)
    assert nicks[-1] == "nick 9"


async def test_replayed_events_are_processed_once_in_order(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        crowd = people(simulator, guild_id)
        for number in range(40):
            if number % 10 == 0:
                simulator.faults.drop_socket_after_events(4)
            world.update_member(guild_id, crowd[number % 3], nick=f"nick {number}")
            await until(bot.has_received_all) if number % 7 == 0 else None
        await bot.settled()
    assert simulator.faults.injected["drop_socket_after_events"] >= 2
    assert simulator.gateway.resumes >= 2
    assert simulator.gateway.identifies == 1
    assert await differences(database, simulator) == []


async def test_gateway_reconnect_request_loses_nothing(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, SIZE, pages_per_second=60)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.listing(guild_id, pages=2)
        assert simulator.request_reconnect() == 1
        await until(lambda: simulator.gateway.resumes == 1)
        await bot.settled()
    assert await runs(database, guild_id) == [("complete", "gateway")]
    assert await differences(database, simulator) == []

"""REST responses that fail, are late or stale; and the history that each way of writing records."""

from __future__ import annotations

import asyncio

import pytest

from tests.mirror.faults.test_live import people
from tests.mirror.harness import changes, differences, mirrored, removals, runs, small_world
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import SyncError


@pytest.mark.parametrize("status", [500, 502, 429])
async def test_failed_member_list_is_retried(database: Pool, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    simulator, (small, large) = small_world(monkeypatch, 6, 45)
    simulator.faults.rest_fail("/members", status, times=12, retry_after=0.01)
    simulator.faults.rate_limit_next(large)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
    assert simulator.faults.injected["rest_fail"] == 12
    assert (await runs(database, small))[-1] == ("complete", "rest")
    assert (await runs(database, large))[-1][0] == "complete"
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


async def test_member_list_that_fails_midway_proves_nothing(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 60)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        simulator.faults.rate_limit_next(guild_id)
        simulator.faults.rest_delay("/members", 0.05)
        async with mirrored(database, simulator, monkeypatch) as bot:
            listing = await bot.listing(guild_id, pages=2)
            assert listing.source == "rest"
            simulator.faults.rest_fail("/members", 500, times=5)
            await bot.settled()
        assert simulator.faults.injected["rest_fail"] == 5
    assert ("failed", "rest") in await runs(database, guild_id)
    assert (await runs(database, guild_id))[-1][0] == "complete"
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


@pytest.mark.parametrize("is_gone", [False, True], ids=["still there", "unavailable"])
async def test_a_retry_is_announced_only_if_one_follows(
    database: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_gone: bool
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 60)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        caplog.clear()
        attempts = len(await runs(database, guild_id))
        simulator.faults.rate_limit_next(guild_id)
        simulator.faults.rest_delay("/members", 0.05)
        sync = asyncio.create_task(bot.mirror.reconciler.sync(guild_id))
        await bot.listing(guild_id, pages=2)
        if is_gone:
            simulator.world.guild_outage(guild_id)
            with pytest.raises(SyncError):
                await sync
        else:
            simulator.faults.rest_fail("/members", 500, times=5)  # discord.py tries five times
            await asyncio.wait([sync])
            sync.exception()
        expected = 2 if is_gone else 3  # over the gateway, over REST, and again only where it was announced

        async def are_recorded() -> bool:
            return len(await runs(database, guild_id)) - attempts == expected

        await until(are_recorded)
        await bot.mirror.reconciler.wait_until_idle()
        lines = [record for record in caplog.records if record.getMessage().startswith("guild not reconciled")]
        over_rest = [record.getMessage() for record in lines if record.__dict__["source"] == "rest"]
        assert ["; next attempt in " in line for line in over_rest] == [not is_gone]
        assert (await runs(database, guild_id))[-1][0] == ("failed" if is_gone else "complete")
        assert await are_recorded(), "and no other one follows"


async def test_failed_sync_raises_for_the_caller(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        for pattern, status in (("GET /guilds", 500), ("GET /guilds", 403), ("/members", 500)):
            simulator.faults.rest_fail(pattern, status, times=1_000)
            with pytest.raises(SyncError):
                await bot.mirror.sync(guild_id)
            simulator.faults.clear()
            await bot.settled()
        with pytest.raises(SyncError):
            await bot.mirror.sync(1)
    assert await differences(database, simulator) == []


async def test_late_response_is_older_than_dispatches(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response has the state in between: names that changed before the request and changed back after it.

    Both events wait in the buffer, where they cancel each other out, so that no stamp in the table tells.
    """
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    channel = next(c.id for c in world.guild(guild_id).channels.values() if not c.hidden)
    role, person = world.create_role(guild_id), people(simulator, guild_id)[0]

    def call(name: str) -> None:
        world.update_channel(guild_id, channel, name=name)
        world.update_role(guild_id, role, name=name)
        world.update_guild(guild_id, name=name)

    def call_person(name: str) -> None:
        world.update_member(guild_id, person, nick=name)
        world.rename_user(person, global_name=name)

    async with simulator:
        call("stored")
        call_person("stored")
        async with mirrored(database, simulator, monkeypatch, flush_seconds=60) as bot:
            await bot.settled()
            simulator.faults.rest_delay("GET /guilds", 0.15, times=3)
            asked = dict(simulator.rules.requests)
            call("between")
            await until(bot.has_received_all)
            sync = asyncio.create_task(bot.mirror.sync(guild_id))
            channels, members = f"GET /guilds/{guild_id}/channels", f"GET /guilds/{guild_id}/members"
            await until(lambda: simulator.rules.requests[channels] > asked.get(channels, 0))
            call("stored")
            created = world.create_role(guild_id), world.create_channel(guild_id), world.join(guild_id)
            call_person("between")
            await until(bot.has_received_all)
            await until(lambda: simulator.rules.requests[members] > asked.get(members, 0))
            call_person("stored")
            await until(bot.has_received_all)
            await sync
            await bot.settled()
        assert simulator.faults.injected["rest_delay"] == 3
    assert await differences(database, simulator) == []
    assert await removals(database) == set()
    assert all(created)


async def test_response_from_an_older_session_is_discarded(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatches between the response and the new session were missed: only the new session counts."""
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    channel = next(c.id for c in world.guild(guild_id).channels.values() if not c.hidden)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        simulator.faults.rest_delay(f"/guilds/{guild_id}/channels", 0.5, times=1)
        sync = asyncio.create_task(bot.mirror.sync(guild_id))
        await until(lambda: simulator.faults.injected["rest_delay"])
        stored = world.channel(guild_id, channel).name
        world.update_channel(guild_id, channel, name="never stored")
        world.update_channel(guild_id, channel, name=stored)
        simulator.faults.refuse_resume()
        simulator.faults.drop_socket()
        await until(lambda: simulator.gateway.identifies == 2)
        with pytest.raises(SyncError, match=r"became available again|new gateway session"):
            await sync
        await bot.settled()
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("size", [6, 15, 45], ids=["one REST page", "two pages", "staged"])
async def test_history_has_changes_removals_and_returns(
    database: Pool, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """For a reconcile and for dispatches: each change with its old and new values."""
    simulator, (guild_id,) = small_world(monkeypatch, size)
    world = simulator.world
    one, two = people(simulator, guild_id)[:2]
    async with simulator:
        world.update_member(guild_id, one, nick="a")
        world.rename_user(one, global_name="a")
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        assert await changes(database) == []
        assert await database.fetchval("SELECT count(*) FROM user_changes") == 0
        world.update_member(guild_id, one, nick="b")
        world.rename_user(one, global_name="b")
        world.leave(guild_id, two)
        async with mirrored(database, simulator, monkeypatch) as bot:  # learned by a listing
            await bot.settled()
            told = await changes(database)
            assert {change[:3] for change in told} == {("members", one, "update"), ("members", two, "remove")}
            for _, _, action, before, after in told:
                if action == "update":
                    assert (before, after) == ({"nick": "a"}, {"nick": "b"})
                else:
                    assert before == {"left_at": None}
                    assert after["left_at"] is not None
            world.join(guild_id, two)
            await bot.settled()
            world.update_member(guild_id, one, nick=None)
            world.rename_user(one, global_name=None)
            await bot.settled()
            world.leave(guild_id, two)
            await bot.settled()
            newcomer = world.join(guild_id)
            await bot.settled()
        world.join(guild_id, two)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    told = await changes(database)
    actions = [(change[1], change[2]) for change in told[2:]]
    assert actions == [(two, "return"), (one, "update"), (two, "remove"), (two, "return")]
    assert told[3][3:] == ({"nick": "b"}, {"nick": None})
    assert all(change[1] != newcomer for change in told)
    of_users = await database.fetch("SELECT user_id, table_name, action, before, after FROM user_changes ORDER BY id")
    assert [tuple(row) for row in of_users] == [
        (one, "users", "update", {"global_name": "a"}, {"global_name": "b"}),
        (one, "users", "update", {"global_name": "b"}, {"global_name": None}),
    ]
    assert {row["user_id"] for row in await database.fetch("SELECT user_id FROM changes")} == {one, two}
    assert await differences(database, simulator) == []

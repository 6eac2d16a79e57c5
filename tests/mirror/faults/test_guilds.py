"""Outages are not departures, and leaving one guild says nothing about another."""

from __future__ import annotations

import pytest

from tests.mirror.faults.test_live import people
from tests.mirror.harness import changes, differences, mirrored, removals, runs, small_world
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import SyncError


async def guild_row(database: Pool, guild_id: int) -> tuple[bool, bool]:
    """Return whether the guild is stored as unavailable, and whether as left."""
    row = await database.fetchrow("SELECT unavailable, left_at FROM guilds WHERE id = $1", guild_id)
    assert row is not None
    return row["unavailable"], row["left_at"] is not None


async def test_an_outage_without_events_tombstones_nobody(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id, other) = small_world(monkeypatch, 45, 12)
    world = simulator.world
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        world.guild_outage(guild_id)
        await bot.settled()
        assert await guild_row(database, guild_id) == (True, False)
        assert await differences(database, simulator) == []
        assert await changes(database) == []
        with pytest.raises(SyncError):
            await bot.mirror.sync(guild_id)
        gone = people(simulator, guild_id)[0]
        world.leave(guild_id, gone)
        world.join(guild_id)
        world.join(other)
        await bot.settled()
        world.guild_restore(guild_id)
        await bot.settled()
    assert await guild_row(database, guild_id) == (False, False)
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", gone)}


@pytest.mark.parametrize("known", [False, True], ids=["first sync", "a sync of what is known"])
async def test_guild_outage_ends_the_listing_without_proof(
    database: Pool, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 60, pages_per_second=40)
    world = simulator.world
    async with simulator:
        if known:
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.settled()
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.listing(guild_id, pages=3)
            world.guild_outage(guild_id)
            await bot.settled()
            assert (await runs(database, guild_id))[int(known) :] == [("failed", "gateway")]
            assert await guild_row(database, guild_id) == (True, False)
            assert await removals(database) == set()
            world.guild_restore(guild_id)
            await bot.settled()
    assert (await runs(database, guild_id))[-1][0] == "complete"
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


async def test_guild_outage_across_a_restart_blocks_nothing(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id, other) = small_world(monkeypatch, 45, 12)
    world = simulator.world
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        world.guild_outage(guild_id)
        world.join(other)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            assert bot.mirror.is_ready()[1]["available"] == 1
            assert await guild_row(database, guild_id) == (True, False)
            assert await differences(database, simulator) == []
            world.guild_restore(guild_id)
            await bot.settled()
    assert await guild_row(database, guild_id) == (False, False)
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


async def test_unavailable_guild_is_not_a_left_guild(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """GUILD_CREATE may contain an unavailable guild (Discord API reference, "Guild Create")."""
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        simulator.faults.inject_raw({"t": "GUILD_CREATE", "d": {"id": str(guild_id), "unavailable": True}})
        await bot.settled()
        assert await guild_row(database, guild_id) == (True, False)
    assert await removals(database) == set()


@pytest.mark.parametrize("away", [False, True], ids=["while connected", "while away"])
async def test_removal_from_a_guild_touches_no_other_guild(
    database: Pool, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    simulator, (guild_id, other) = small_world(monkeypatch, 45, 32)
    world = simulator.world
    shared = set(world.guild(guild_id).members) & set(world.guild(other).members)
    assert len(shared) > 2  # users of both
    counting = "SELECT count(*) FILTER (WHERE left_at IS NULL) FROM members WHERE guild_id = $1"
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            users = await database.fetch("SELECT ctid, xmin::text FROM users ORDER BY id")
            if not away:
                world.remove_bot(guild_id)
                await bot.settled()
        if away:
            world.remove_bot(guild_id)
            async with mirrored(database, simulator, monkeypatch) as bot:
                await bot.settled()
        assert await guild_row(database, guild_id) == (False, True)
        assert await guild_row(database, other) == (False, False)
        assert await removals(database) == {("guilds", guild_id)}
        assert await database.fetchval(counting, guild_id) == 45  # nothing is known of them any more
        assert await database.fetch("SELECT ctid, xmin::text FROM users ORDER BY id") == users
        assert await differences(database, simulator) == []
        gone = next(id for id in people(simulator, guild_id) if id not in shared)
        world.leave(guild_id, gone)
        async with mirrored(database, simulator, monkeypatch) as bot:
            world.add_bot_back(guild_id)
            await until(lambda: guild_id in bot.mirror.reconciler.guilds)
            await bot.settled()
    assert await guild_row(database, guild_id) == (False, False)
    assert await differences(database, simulator) == []
    assert await removals(database) == {("guilds", guild_id), ("members", gone)}
    told = [change[2] for change in await changes(database, table_name="guilds")]
    assert told == ["remove", "return"]


async def test_events_after_guild_create_win(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names change during an outage, and right after GUILD_CREATE they change back to the stored ones."""
    simulator, (guild_id,) = small_world(monkeypatch, 6)
    world = simulator.world
    channel = next(c.id for c in world.guild(guild_id).channels.values() if not c.hidden)
    role = world.create_role(guild_id)

    def call(name: str) -> None:
        world.update_channel(guild_id, channel, name=name)
        world.update_role(guild_id, role, name=name)

    async with simulator:
        call("stored")
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            world.guild_outage(guild_id)
            call("meanwhile")
            await bot.settled()
            original = bot.mirror.receive

            def receive(event: str, *rest: object) -> bool | None:
                kept = original(event, *rest)  # type: ignore[arg-type]
                if event == "GUILD_CREATE":  # in the same breath, before any task of ours has run
                    parts = {"guild_id": str(guild_id), "name": "stored"}
                    original("CHANNEL_UPDATE", parts | {"id": str(channel)}, 0, "")
                    original("GUILD_ROLE_UPDATE", parts | {"role": {"id": str(role), "name": "stored"}}, 0, "")
                return kept

            monkeypatch.setattr(bot.mirror, "receive", receive)
            world.guild_restore(guild_id)
            await bot.settled()
        call("stored")
    assert await differences(database, simulator) == []


async def test_ready_once_every_guild_is_reconciled(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, ids = small_world(monkeypatch, 45, 32, 12, pages_per_second=50)
    seen: list[bool] = []
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        original = bot.mirror.receive

        def receive(event: str, *rest: object) -> bool | None:
            kept = original(event, *rest)  # type: ignore[arg-type]
            seen.append(bot.mirror.is_ready()[0])
            return kept

        monkeypatch.setattr(bot.mirror, "receive", receive)
        await until(lambda: len(seen) >= 1 + len(ids))
        assert not any(seen)
        await bot.ready()
        for guild_id in ids:
            assert ("complete", "gateway") in await runs(database, guild_id)
        simulator.world.guild_outage(ids[0])
        await bot.settled()
        simulator.world.guild_restore(ids[0])
        await until(lambda: not bot.mirror.is_ready()[0])
        await bot.ready()


async def test_large_guilds_are_listed_in_turn(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging admits two; if the pages of a third were requested, they would pause the gateway."""
    simulator, ids = small_world(monkeypatch, 240, 230, 220, 210)
    async with simulator, mirrored(database, simulator, monkeypatch, pause_seconds=2.0) as bot:
        await bot.settled()
    for guild_id in ids:
        assert await runs(database, guild_id) == [("complete", "gateway")]
    assert await differences(database, simulator) == []

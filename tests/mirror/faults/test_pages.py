"""Member pages that are lost, late, duplicated or out of order tombstone nobody, and the next sync is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from simulator import Simulator
from simulator.faults import FaultInjector
from tests.mirror.harness import changes, differences, mirrored, removals, runs, small_world, versions
from tests.waiting import until
from utils.database import Pool

Fault = Callable[[FaultInjector, int], None]

#: Faults that break the first listing: the counter's key, and how to inject them.
BREAKING: dict[str, tuple[str, Fault]] = {
    "a lost middle page": ("drop_page", lambda faults, id: faults.drop_page(id, "middle")),
    "a lost last page": ("drop_page", lambda faults, id: faults.drop_page(id, "last")),
    "a lost first page": ("drop_page", lambda faults, id: faults.drop_page(id, "first")),
    "silence": ("ignore_member_request", lambda faults, id: faults.ignore_member_request(id)),
    "a rate limit": ("rate_limit_next", lambda faults, id: faults.rate_limit_next(id, retry_after=5.0)),
}
HARMLESS: dict[str, tuple[str, Fault]] = {
    "shuffled pages": ("reorder_pages", lambda faults, id: faults.reorder_pages(id)),
    "a doubled page": ("duplicate_page", lambda faults, id: faults.duplicate_page(id, "middle")),
    "a doubled last page": ("duplicate_page", lambda faults, id: faults.duplicate_page(id, "last")),
    "a doubled first page": ("duplicate_page", lambda faults, id: faults.duplicate_page(id, "first")),
}


def _meanwhile(simulator: Simulator, guild_id: int) -> int:
    """Change the guild while the bot is offline, and return the member who left."""
    world = simulator.world
    others = [id for id in world.guild(guild_id).ordered_member_ids() if id != world.bot.id]
    others.remove(world.guild(guild_id).owner_id)
    world.leave(guild_id, others[3])
    world.join(guild_id)
    world.update_member(guild_id, others[9], nick="renamed meanwhile")
    return others[3]


@pytest.mark.parametrize("size", [15, 45], ids=["two pages", "five pages"])
@pytest.mark.parametrize("lie", BREAKING)
async def test_incomplete_listing_tombstones_nobody(
    database: Pool, monkeypatch: pytest.MonkeyPatch, lie: str, size: int
) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, size)
    kind, tell = BREAKING[lie]
    async with simulator:
        tell(simulator.faults, guild_id)
        async with mirrored(database, simulator, monkeypatch, page_timeout=0.3) as bot:  # the first sync of all
            await bot.settled()
        assert simulator.faults.injected[kind] == 1
        assert await runs(database, guild_id) == [("failed", "gateway"), ("complete", "rest")]
        assert await differences(database, simulator) == []
        gone = _meanwhile(simulator, guild_id)
        tell(simulator.faults, guild_id)
        async with mirrored(database, simulator, monkeypatch, page_timeout=0.3) as bot:  # a sync of what is known
            await until(lambda: simulator.faults.injected[kind] == 2)
            await bot.settled()
    assert (await runs(database, guild_id))[2:] == [("failed", "gateway"), ("complete", "rest")]
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", gone)}


@pytest.mark.parametrize("lie", HARMLESS)
async def test_pages_complete_a_listing_in_any_order(database: Pool, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    kind, tell = HARMLESS[lie]
    async with simulator:
        tell(simulator.faults, guild_id)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        assert simulator.faults.injected[kind] == 1
        assert await differences(database, simulator) == []
        gone = _meanwhile(simulator, guild_id)
        tell(simulator.faults, guild_id)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
    assert simulator.faults.injected[kind] == 2
    assert await runs(database, guild_id) == [("complete", "gateway")] * 2
    seen = await database.fetch("SELECT pages, rows_seen FROM sync_runs WHERE guild_id = $1", guild_id)
    assert [tuple(row) for row in seen] == [(5, 45)] * 2
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", gone)}


async def test_a_duplicate_page_stands_for_no_other_page(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        simulator.faults.drop_page(guild_id, 3)
        simulator.faults.duplicate_page(guild_id, 1)  # five pages come in all, and one of them is missing
        async with mirrored(database, simulator, monkeypatch, page_timeout=0.3) as bot:
            await bot.settled()
    assert simulator.faults.injected["drop_page"] == simulator.faults.injected["duplicate_page"] == 1
    assert (await runs(database, guild_id))[1:] == [("failed", "gateway"), ("complete", "rest")]
    assert await removals(database) == set()
    assert await differences(database, simulator) == []


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "through a pooler"])
async def test_unchanged_world_writes_no_row(database: Pool, monkeypatch: pytest.MonkeyPatch, pooled: bool) -> None:
    if pooled:
        monkeypatch.setattr(database, "target", replace(database.target, pooled=True))
    simulator, ids = small_world(monkeypatch, 45, 15, 6)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        before = await versions(database)
        assert {table: len(rows) for table, rows in before.items()}["members"] == 66
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
            for guild_id in ids:
                await bot.mirror.sync(guild_id)
            await bot.settled()
    assert await versions(database) == before
    assert await changes(database) == []


@pytest.mark.parametrize("way", ["pooled", "two connections"])
async def test_without_staging_large_listings_are_written_page_by_page(
    database: Pool, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "pooled":
        monkeypatch.setattr(database, "target", replace(database.target, pooled=True))
        other = database
    else:
        other = Pool(database.target, pool_max=2, acquire_timeout=10)
        await other.connect()

    async def forbidden(*_: object) -> None:
        raise AssertionError("COPY was used")

    monkeypatch.setattr("utils.mirror.reconcile.staging._copy", forbidden)
    simulator, (guild_id,) = small_world(monkeypatch, 45)
    async with simulator:
        async with mirrored(other, simulator, monkeypatch) as bot:
            await bot.settled()
        assert await differences(database, simulator) == []
        gone = _meanwhile(simulator, guild_id)
        async with mirrored(other, simulator, monkeypatch) as bot:
            await bot.settled()
    assert await differences(database, simulator) == []
    assert await removals(database) == {("members", gone)}
    assert await runs(database, guild_id) == [("complete", "gateway")] * 2
    if other is not database:
        await other.close()

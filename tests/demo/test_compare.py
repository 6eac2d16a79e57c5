"""The comparison finds every difference; a scenario is deterministic and mirrored."""

from __future__ import annotations

import pytest

from simulator import Simulator, World
from tests.bot.running import running_bot, wait_until_mirrored
from utils.database import Pool
from utils.demo.compare import TABLES, compare
from utils.demo.scenario import Scenario


@pytest.fixture
def world() -> World:
    """One small guild with a hidden channel."""
    world = World(seed=5)
    world.add_guild(members=60, hidden_channels=1)
    return world


@pytest.fixture
async def mirrored(database: Pool, simulator: Simulator) -> Pool:
    """The database after a bot has mirrored the world into it."""
    async with running_bot(database, simulator):
        await wait_until_mirrored(database, simulator)
    return database


async def differences(pool: Pool, world: World, table: str) -> list[str]:
    """Compare one table and return the differences."""
    return (await compare(pool, table, world.expected_rows(table))).lines()


async def test_compares_every_row(mirrored: Pool, world: World) -> None:
    comparisons = {table: await compare(mirrored, table, world.expected_rows(table)) for table in TABLES}
    assert comparisons["members"].compared == 60
    assert all(result.compared == len(list(world.expected_rows(table))) for table, result in comparisons.items())
    assert sum(result.differences for result in comparisons.values()) == 0


async def test_finds_missing_extra_and_different_rows(mirrored: Pool, world: World) -> None:
    guild_id = next(iter(world.guilds))
    first, second, *_ = world.guild(guild_id).ordered_member_ids()
    await mirrored.execute("DELETE FROM members WHERE user_id = $1", first)
    await mirrored.execute("INSERT INTO members (guild_id, user_id) VALUES ($1, 77)", guild_id)
    await mirrored.execute("UPDATE members SET nick = 'someone' WHERE user_id = $1", second)
    lines = await differences(mirrored, world, "members")
    assert f"members {guild_id}/{first} is missing" in lines
    assert f"members {guild_id}/77 must not exist" in lines
    assert any(line.startswith(f"members {guild_id}/{second}: nick is 'someone', expected ") for line in lines)


async def test_tombstoned_row_counts_as_missing(mirrored: Pool, world: World) -> None:
    await mirrored.execute("UPDATE roles SET deleted_at = now() WHERE id = (SELECT max(id) FROM roles)")
    assert [line.rpartition(" ")[2] for line in await differences(mirrored, world, "roles")] == ["missing"]


async def test_ignores_what_the_bot_cannot_observe(mirrored: Pool, world: World) -> None:
    guild_id = next(iter(world.guilds))
    hidden = await mirrored.fetchval("SELECT id FROM channels WHERE hidden")
    await mirrored.execute("UPDATE channels SET name = 'as it was once' WHERE id = $1", hidden)
    await mirrored.execute("INSERT INTO threads (guild_id, id, parent_id) VALUES ($1, 5, $2)", guild_id, hidden)
    await mirrored.execute("INSERT INTO users (id, username) VALUES (6, 'left long ago')")
    for table in ("channels", "threads", "users"):
        assert await differences(mirrored, world, table) == []
    await mirrored.execute("UPDATE channels SET position = 999 WHERE id = $1", hidden)
    assert len(await differences(mirrored, world, "channels")) == 1


async def test_compares_a_single_guild(mirrored: Pool, world: World) -> None:
    guild_id = next(iter(world.guilds))
    for table in TABLES:
        assert (await compare(mirrored, table, world.expected_rows(table, guild_id), guild_id=guild_id)).lines() == []
        assert (await compare(mirrored, table, [], guild_id=1)).lines() == []


def test_scenario_is_deterministic() -> None:
    runs = []
    for _ in range(2):
        world = World(seed=5)
        world.add_guild(members=60)
        scenario = Scenario(world)
        runs.append((list(scenario.events(120)), [dict(row) for row in world.expected_rows("members")]))
    assert runs[0] == runs[1]
    assert {"guilds renamed", "roles deleted", "channels hidden from the bot", "threads created"} < set(runs[0][0])


async def test_tables_match_after_a_scenario(database: Pool, simulator: Simulator, world: World) -> None:
    async with running_bot(database, simulator):
        for _ in Scenario(world, seed=9).events(400):
            pass
        await wait_until_mirrored(database, simulator)

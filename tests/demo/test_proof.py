"""The proof must be able to fail."""

from __future__ import annotations

import pytest

from simulator import Simulator, World
from tests.bot.running import running_bot, wait_until_mirrored
from utils.database import Pool
from utils.demo.proof import TABLES, compare
from utils.demo.story import Story


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


async def found(database: Pool, world: World, table: str) -> list[str]:
    """Return the lines that the proof of one table has to say."""
    return (await compare(database, table, world.expected_rows(table))).lines()


async def test_every_row_is_compared(mirrored: Pool, world: World) -> None:
    proofs = {table: await compare(mirrored, table, world.expected_rows(table)) for table in TABLES}
    assert proofs["members"].compared == 60
    assert all(proof.compared == len(list(world.expected_rows(table))) for table, proof in proofs.items())
    assert sum(proof.differences for proof in proofs.values()) == 0


async def test_a_missing_row_an_extra_row_and_a_wrong_value_are_found(mirrored: Pool, world: World) -> None:
    guild_id = next(iter(world.guilds))
    first, second, *_ = world.guild(guild_id).ordered_member_ids()
    await mirrored.execute("DELETE FROM members WHERE user_id = $1", first)
    await mirrored.execute("INSERT INTO members (guild_id, user_id) VALUES ($1, 77)", guild_id)
    await mirrored.execute("UPDATE members SET nick = 'someone' WHERE user_id = $1", second)
    lines = await found(mirrored, world, "members")
    assert f"members {guild_id}/{first} is missing" in lines
    assert f"members {guild_id}/77 should not be there" in lines
    assert any(line.startswith(f"members {guild_id}/{second}: nick is 'someone', not ") for line in lines)


async def test_a_row_that_is_tombstoned_although_it_is_there_is_missing(mirrored: Pool, world: World) -> None:
    await mirrored.execute("UPDATE roles SET deleted_at = now() WHERE id = (SELECT max(id) FROM roles)")
    assert [line.rpartition(" ")[2] for line in await found(mirrored, world, "roles")] == ["missing"]


async def test_what_nobody_can_know_is_left_alone(mirrored: Pool, world: World) -> None:
    guild_id = next(iter(world.guilds))
    hidden = await mirrored.fetchval("SELECT id FROM channels WHERE hidden")
    await mirrored.execute("UPDATE channels SET name = 'as it was once' WHERE id = $1", hidden)
    await mirrored.execute("INSERT INTO threads (guild_id, id, parent_id) VALUES ($1, 5, $2)", guild_id, hidden)
    await mirrored.execute("INSERT INTO users (id, username) VALUES (6, 'left long ago')")
    for table in ("channels", "threads", "users"):
        assert await found(mirrored, world, table) == []
    await mirrored.execute("UPDATE channels SET position = 999 WHERE id = $1", hidden)
    assert len(await found(mirrored, world, "channels")) == 1


async def test_one_guild_can_be_compared_by_itself(mirrored: Pool, world: World) -> None:
    guild_id = next(iter(world.guilds))
    for table in TABLES:
        assert (await compare(mirrored, table, world.expected_rows(table, guild_id), guild_id=guild_id)).lines() == []
        assert (await compare(mirrored, table, [], guild_id=1)).lines() == []


def test_the_same_seed_tells_the_same_story() -> None:
    told = []
    for _ in range(2):
        world = World(seed=5)
        world.add_guild(members=60)
        story = Story(world)
        told.append((list(story.minute(120)), [dict(row) for row in world.expected_rows("members")]))
    assert told[0] == told[1]
    assert {"guilds renamed", "roles deleted", "channels hidden from the bot", "threads created"} < set(told[0][0])


async def test_a_story_ends_in_equal_tables(database: Pool, simulator: Simulator, world: World) -> None:
    async with running_bot(database, simulator):
        for _ in Story(world, seed=9).minute(400):
            pass
        await wait_until_mirrored(database, simulator)

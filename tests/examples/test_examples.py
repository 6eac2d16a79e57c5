"""The cogs in examples/, each run over the wire by simulated members."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from models import Base
from simulator import Simulator, World
from tests.bot.running import running_bot
from tests.waiting import until
from utils.bot.registrations import remove_tables
from utils.database import Pool

pytestmark = pytest.mark.guilds(8)


@pytest.fixture
def guild_id(world: World) -> int:
    """The id of the guild."""
    return next(iter(world.guilds))


@pytest.fixture
def member_ids(world: World, guild_id: int) -> list[int]:
    """The ids of its human members."""
    return [id for id in world.guild(guild_id).ordered_member_ids() if not world.user(id).bot]


@pytest.fixture(autouse=True)
def without_tables_afterwards() -> Iterator[None]:
    """Remove the tables that examples declare: other tests compare all declared tables with the database."""
    yield
    remove_tables("examples")


async def use(
    simulator: Simulator, command: str, user_id: int, guild_id: int, subcommand: str | None = None, **options: Any
) -> str:
    """Run a command and return its answer."""
    result = await simulator.run_command(
        command, user_id=user_id, guild_id=guild_id, subcommand=subcommand, options=options
    )
    await result.wait_done(30)
    return result.final_content or ""


async def test_welcome_greets_members_who_join(database: Pool, simulator: Simulator, guild_id: int) -> None:
    world, sent = simulator.world, simulator.channels.sent
    owner, channels = world.guild(guild_id).owner_id, world.guild(guild_id).channels.values()
    channel_id = next(channel.id for channel in channels if channel.type == 0 and not channel.hidden)
    async with running_bot(database, simulator, extensions=["examples.welcome"]):
        answer = await use(simulator, "welcome", owner, guild_id, channel=channel_id, text="Hello {member}")
        assert answer == f"New members are greeted in <#{channel_id}>."
        first = world.join(guild_id)
        await until(lambda: sent)
        (message,) = sent.values()
        assert (message["channel_id"], message["content"]) == (str(channel_id), f"Hello <@{first}>")
        assert await use(simulator, "welcome", owner, guild_id) == "Greetings are off."
        stored = "SELECT value -> 'channel_id' FROM documents WHERE namespace = 'welcome' AND guild_id = $1"
        assert await database.fetchval(stored, guild_id) is None


async def test_tally_counts_and_moves_points(
    database: Pool, simulator: Simulator, guild_id: int, member_ids: list[int]
) -> None:
    giver, receiver = member_ids[:2]
    async with running_bot(database, simulator, extensions=["examples.tally"]):
        create = CreateTable(Base.metadata.tables["tallies"])  # `make migration` writes it for a real bot
        await database.execute(str(create.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
        for points in (1, 2):
            assert await use(simulator, "tally", giver, guild_id, "add") == f"You have {points} points."
        answer = await use(simulator, "tally", giver, guild_id, "give", member=receiver, points=5)
        assert answer.startswith("You do not have 5 points")
        answer = await use(simulator, "tally", giver, guild_id, "give", member=giver, points=1)
        assert answer.startswith("You cannot give points to yourself")
        answer = await use(simulator, "tally", giver, guild_id, "give", member=receiver, points=2)
        assert answer == f"<@{receiver}> got 2 points. You have 0 left."
    rows = await database.fetch("SELECT user_id, points FROM tallies")
    assert {tuple(row) for row in rows} == {(giver, 0), (receiver, 2)}


@pytest.mark.guilds(24)
async def test_members_who_give_to_each_other_at_once_are_all_answered(
    database: Pool, simulator: Simulator, guild_id: int, member_ids: list[int]
) -> None:
    members = member_ids[:20]
    async with running_bot(database, simulator, extensions=["examples.tally"], db_transaction_timeout=60):
        create = CreateTable(Base.metadata.tables["tallies"])
        await database.execute(str(create.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
        await database.execute(
            "INSERT INTO tallies (guild_id, user_id, points) SELECT $1, unnest($2::bigint[]), 5", guild_id, members
        )
        answers = await asyncio.gather(
            *(
                use(simulator, "tally", members[n], guild_id, "give", member=members[(n + step) % 20], points=1)
                for n in range(20) for step in (1, -1, 3, -3)
            )
        )  # fmt: skip
    assert [answer for answer in answers if "got 1 points" not in answer] == []
    points = await database.fetch("SELECT points FROM tallies")
    assert [row["points"] for row in points] == [5] * 20


async def test_leaderboard_shows_top_members_and_ranks(
    database: Pool, simulator: Simulator, guild_id: int, member_ids: list[int]
) -> None:
    first, second, third = member_ids[:3]
    world = simulator.world
    async with running_bot(database, simulator, extensions=["examples.leaderboard"]):
        assert (await use(simulator, "leaderboard", first, guild_id, "rank")).startswith("You have not written")
        await database.execute(
            "INSERT INTO member_stats (guild_id, user_id, message_count) VALUES ($1, $2, 1200), ($1, $3, 7)",
            guild_id, first, second,
        )  # fmt: skip
        top = await use(simulator, "leaderboard", third, guild_id, "top")
        assert [line.split(" ")[0] for line in top.splitlines()] == ["1,200", "7"]
        assert world.user(first).username.replace("\\", "")[:3] in top.splitlines()[0]
        assert await use(simulator, "leaderboard", second, guild_id, "rank") == "You are number 2 with 7 messages."

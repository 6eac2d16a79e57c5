"""Dispatches during a listing beat its pages, in the columns that they named only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from simulator import Simulator
from simulator.payloads import member_payload
from simulator.state import Intent
from tests.mirror.harness import Mirrored, changes, differences, mirrored, removals, small_world
from tests.waiting import until
from utils.database import Pool

SIZE = 60
#: Members of page 0 have been sent once two pages have come; those of the last page have not.
EARLY, LATE = slice(0, 5), slice(-6, -1)


def people(simulator: Simulator, guild_id: int) -> list[int]:
    """Return the members in the order of the pages, without those that the simulator treats specially."""
    world = simulator.world
    special = (world.bot.id, world.guild(guild_id).owner_id)
    return [id for id in world.guild(guild_id).ordered_member_ids() if id not in special]


async def in_the_middle(bot: Mirrored, guild_id: int, happening: Callable[[], None]) -> None:
    """Change something after the first two of six pages, and check that it was received before the last."""
    listing = await bot.listing(guild_id, pages=2)
    happening()
    newest = bot.mirror.stamps.last
    assert listing.pages < 6
    await until(lambda: listing.pages == 6 and bot.mirror.stamps.last > newest)
    await bot.settled()


@pytest.fixture(params=["staged", "page by page", "over REST"])
def transport(request: pytest.FixtureRequest, database: Pool, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways to read a large listing."""
    if request.param == "page by page":
        monkeypatch.setattr(database, "target", replace(database.target, pooled=True))
    return str(request.param)


def slowed(monkeypatch: pytest.MonkeyPatch, transport: str, *, pages_per_second: float = 15) -> tuple[Simulator, int]:
    """Return a simulator that sends pages slowly enough for changes between them, and its guild."""
    simulator, (guild_id,) = small_world(monkeypatch, SIZE, pages_per_second=pages_per_second)
    if transport == "over REST":
        simulator.faults.rest_delay("/members", 0.06)
    return simulator, guild_id


def choose_transport(simulator: Simulator, guild_id: int, transport: str) -> None:
    """Make the next listing use the transport: refuse the gateway request for REST."""
    if transport == "over REST":
        simulator.faults.rate_limit_next(guild_id)


async def listing_by(bot: Mirrored, guild_id: int, transport: str) -> None:
    """Wait until the listing of the right kind is under way."""
    wanted = "rest" if transport == "over REST" else "gateway"

    def found() -> bool:
        state = bot.mirror.reconciler.guilds.get(guild_id)
        return state is not None and state.listing is not None and state.listing.source == wanted

    await until(found)


async def test_dispatches_during_the_first_sync_are_kept(
    database: Pool, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    simulator, guild_id = slowed(monkeypatch, transport)
    world, crowd = simulator.world, people(simulator, guild_id)
    joined: list[int] = []

    def happening() -> None:
        for part in (crowd[EARLY], crowd[LATE]):
            world.leave(guild_id, part[0])
            world.leave(guild_id, part[1])
            world.join(guild_id, part[1])  # and comes back
            world.rename_user(part[2], global_name="renamed")
            world.update_member(guild_id, part[3], nick="renicked")
            world.update_member(guild_id, part[4], roles=[])
        joined.append(world.join(guild_id))

    choose_transport(simulator, guild_id, transport)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await listing_by(bot, guild_id, transport)
        await in_the_middle(bot, guild_id, happening)
    assert await differences(database, simulator) == []
    assert {id for table, id in await removals(database)} <= {crowd[i] for i in (0, 1, -6, -5)}
    assert await database.fetchval("SELECT count(*) FROM members WHERE user_id = $1", joined[0]) == 1


async def test_dispatch_without_a_change_beats_an_older_page(
    database: Pool, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """A nick changes while the bot is offline, so the pages show it; then it changes back to the stored one."""
    simulator, guild_id = slowed(monkeypatch, transport)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator:
        early, late = crowd[0], crowd[-2]
        for id in (early, late):
            world.update_member(guild_id, id, nick="stored")
            world.rename_user(id, global_name="stored")
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        for id in (early, late):
            world.update_member(guild_id, id, nick="meanwhile")
            world.rename_user(id, global_name="meanwhile")

        def happening() -> None:
            for id in (early, late):
                world.update_member(guild_id, id, nick="stored")
                world.rename_user(id, global_name="stored")

        choose_transport(simulator, guild_id, transport)
        async with mirrored(database, simulator, monkeypatch, flush_seconds=0.5) as bot:
            await listing_by(bot, guild_id, transport)
            await in_the_middle(bot, guild_id, happening)
    assert await differences(database, simulator) == []
    assert await database.fetchval("SELECT count(*) FROM changes WHERE table_name = 'members'") == 0
    assert await database.fetchval("SELECT count(*) FROM user_changes") == 0


async def test_partial_dispatch_beats_the_page_in_its_columns_only(
    database: Pool, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Nicks changed while the bot was offline; dispatches without nick and pending must not hide that."""
    simulator, guild_id = slowed(monkeypatch, transport)
    world, crowd = simulator.world, people(simulator, guild_id)
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        for number, id in enumerate(crowd):
            world.update_member(guild_id, id, nick=f"meanwhile {number}", pending=bool(number % 2))
        newcomers = [world.join(guild_id) for _ in range(4)]
        for id in newcomers:
            world.update_member(guild_id, id, nick="newcomer")
        roles = sorted(world.guild(guild_id).roles.keys() - {guild_id})

        def happening() -> None:
            for id in (*crowd, *newcomers):
                world.update_member(guild_id, id, roles=roles[:3])

        choose_transport(simulator, guild_id, transport)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await listing_by(bot, guild_id, transport)
            await in_the_middle(bot, guild_id, happening)
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


@pytest.mark.parametrize("size", [6, 15, SIZE], ids=["one REST page", "two pages", "large"])
async def test_unchanged_return_during_a_listing_is_not_a_leave(
    database: Pool, monkeypatch: pytest.MonkeyPatch, transport: str, size: int
) -> None:
    """They left while the bot was offline, so no page contains them, and their return changes no row."""
    simulator, (guild_id,) = small_world(monkeypatch, size, pages_per_second=15)
    world = simulator.world
    guild, back = world.guild(guild_id), people(simulator, guild_id)[1]
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        member = guild.members[back]
        world.leave(guild_id, back)
        choose_transport(simulator, guild_id, transport)
        simulator.faults.rest_delay("/members", 0.15)
        over_rest = size == 6 or transport == "over REST"
        delayed, asked = simulator.faults.injected["rest_delay"], len(simulator.gateway.member_requests)
        async with mirrored(database, simulator, monkeypatch) as bot:
            if over_rest:
                await until(lambda: simulator.faults.injected["rest_delay"] > delayed)
            else:
                await until(lambda: len(simulator.gateway.member_requests) > asked)
            guild.add_member(member)
            member.user.guild_ids.append(guild_id)
            world.emit(
                "GUILD_MEMBER_ADD", guild, member_payload(member) | {"guild_id": str(guild_id)}, Intent.GUILD_MEMBERS
            )
            await bot.settled()
    assert await differences(database, simulator) == []
    assert await removals(database) == set()


async def test_role_deleted_during_a_listing_leaves_no_trace(
    database: Pool, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Its members changed, and some left, while the bot was offline: the cascade must not hide that."""
    simulator, guild_id = slowed(monkeypatch, transport)
    world, crowd = simulator.world, people(simulator, guild_id)
    role, given = world.create_role(guild_id), world.create_role(guild_id)
    for id in crowd:
        world.update_member(guild_id, id, roles=[role])
    async with simulator:
        async with mirrored(database, simulator, monkeypatch) as bot:
            await bot.settled()
        for id in crowd[::2]:
            world.update_member(guild_id, id, nick="meanwhile", roles=[role, given])
        left = [crowd[5], crowd[-5]]
        for id in left:
            world.leave(guild_id, id)

        def happening() -> None:
            world.delete_role(guild_id, role)
            world.delete_role(guild_id, given)  # members whose page came have it in their arrays, others never had

        choose_transport(simulator, guild_id, transport)
        async with mirrored(database, simulator, monkeypatch) as bot:
            await listing_by(bot, guild_id, transport)
            await in_the_middle(bot, guild_id, happening)
    assert await differences(database, simulator) == []
    assert await database.fetchval("SELECT count(*) FROM members WHERE roles && $1::bigint[]", [role, given]) == 0
    assert await removals(database) == {("roles", role), ("roles", given), *(("members", id) for id in left)}


async def test_short_lived_role_is_in_no_member_after_the_first_sync(
    database: Pool, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    simulator, guild_id = slowed(monkeypatch, transport)
    world, crowd = simulator.world, people(simulator, guild_id)
    roles: list[int] = []

    async def comes_and_goes(bot: Mirrored) -> None:
        listing = await bot.listing(guild_id, pages=1)
        roles.append(world.create_role(guild_id))
        for id in (*crowd[EARLY], *crowd[25:35], *crowd[LATE]):
            world.update_member(guild_id, id, roles=roles)
        await until(lambda: listing.pages >= 4)
        world.delete_role(guild_id, roles[0])
        assert listing.pages < 6
        await bot.settled()

    choose_transport(simulator, guild_id, transport)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await listing_by(bot, guild_id, transport)
        await comes_and_goes(bot)
    assert await differences(database, simulator) == []
    assert await database.fetchval("SELECT count(*) FROM members WHERE roles @> $1::bigint[]", roles) == 0


async def test_first_sync_is_one_copy_and_live_rows_wait(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No member row of the guild may exist before the COPY commits, or it would fail."""
    simulator, guild_id = slowed(monkeypatch, "staged", pages_per_second=4)
    world, crowd = simulator.world, people(simulator, guild_id)
    held: list[int] = []
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        listing = await bot.listing(guild_id, pages=3)
        await until(lambda: guild_id in bot.mirror.writer.buffer.held_guilds)
        world.update_member(guild_id, crowd[0], nick="live")
        world.join(guild_id)
        world.leave(guild_id, crowd[1])
        await until(lambda: len(bot.mirror.writer.buffer) >= 3)
        await bot.mirror.writer.flush()
        held.append(await database.fetchval("SELECT count(*) FROM members"))
        assert listing.pages < 6
        await bot.settled()
    assert held == [0]
    assert await differences(database, simulator) == []
    assert [tuple(row) for row in await database.fetch("SELECT state, rows_inserted, rows_left FROM sync_runs")] == [
        ("complete", SIZE, 0)
    ]
    told = {change[1]: change[2] for change in await changes(database, table_name="members")}
    assert told == {crowd[0]: "update", crowd[1]: "remove"}


async def test_sync_requested_during_a_sync_runs_after_it(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, guild_id = slowed(monkeypatch, "staged")
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        first = asyncio.create_task(bot.mirror.sync(guild_id))
        listing = await bot.listing(guild_id, pages=1)
        second = asyncio.create_task(bot.mirror.sync(guild_id))
        state = bot.mirror.reconciler.guilds[guild_id]
        await until(lambda: state.reason is not None)
        assert state.listing is listing  # the second one waits for its turn
        await asyncio.gather(first, second)
        await bot.settled()
    assert await database.fetchval("SELECT count(*) FROM sync_runs WHERE state = 'complete'") == 3
    assert await differences(database, simulator) == []

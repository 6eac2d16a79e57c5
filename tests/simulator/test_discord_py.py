"""An unmodified discord.py works against the simulator."""

from __future__ import annotations

import random
from typing import Any

import discord
import pytest
from discord import app_commands

from simulator import Simulator, World
from tests.simulator.client_cache import differences
from tests.simulator.clients import discord_client
from tests.waiting import until

KEYS = {"members": "user_id", "users": "id", "roles": "id", "channels": "id", "threads": "id"}


def expected(world: World, guild_id: int) -> dict[str, dict[int, dict[str, Any]]]:
    return {
        table: {row[key]: row for row in world.expected_rows(table, guild_id)}  # type: ignore[misc]
        for table, key in KEYS.items()
    }


async def test_client_becomes_ready_with_its_guilds(
    simulator: Simulator, world: World, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch) as client:
        assert {guild.id for guild in client.guilds} == set(world.guilds)
        guild = client.get_guild(large)
        assert guild is not None
        assert guild.member_count == 3500
        assert guild.me.id == world.bot.id
        assert guild.owner_id == world.guilds[large].owner_id
        assert len(guild.channels) == 12
        assert sum(channel.name == "___hidden___" for channel in guild.channels) == 2


async def test_chunking_fills_the_member_cache(
    simulator: Simulator, world: World, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch) as client:
        guild = client.get_guild(large)
        assert guild is not None
        await guild.chunk()
        assert guild.chunked
        assert differences(guild, expected(world, large)) == []


async def test_chunking_at_startup_completes_before_ready(
    simulator: Simulator, world: World, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = discord.Client(intents=discord.Intents.all(), chunk_guilds_at_startup=True, guild_ready_timeout=0.1)
    async with discord_client(simulator, monkeypatch, client):
        assert all(guild.chunked for guild in client.guilds)


async def test_sharded_client_gets_each_guild_once(
    simulator: Simulator, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = discord.AutoShardedClient(
        intents=discord.Intents.all(),
        chunk_guilds_at_startup=False,
        shard_count=2,
        shard_ids=[0, 1],
        guild_ready_timeout=0.1,
    )
    async with discord_client(simulator, monkeypatch, client):
        assert {guild.id: guild.shard_id for guild in client.guilds} == {g: (g >> 22) % 2 for g in world.guilds}


async def test_fetch_members_pages_over_rest(
    simulator: Simulator, world: World, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch) as client:
        guild = client.get_guild(large)
        assert guild is not None
        fetched = [member.id async for member in guild.fetch_members(limit=None)]
        assert sorted(fetched) == sorted(world.guilds[large].members)


async def test_archived_threads_page_over_rest(
    simulator: Simulator, world: World, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = next(c.id for c in world.guilds[small].channels.values() if c.type == 0 and not c.hidden)
    made = {world.create_thread(small, place) for _ in range(130)}
    for thread_id in made:
        world.archive_thread(small, thread_id)
    async with discord_client(simulator, monkeypatch) as client:
        channel = client.get_channel(place)
        assert isinstance(channel, discord.TextChannel)
        public = {thread.id async for thread in channel.archived_threads(limit=None)}
        private = {thread.id async for thread in channel.archived_threads(private=True, limit=None)}
        joined = {thread.id async for thread in channel.archived_threads(private=True, joined=True, limit=None)}
        rows = [row for row in world.expected_rows("threads", small) if row["parent_id"] == place and row["archived"]]
        assert made <= public | private == {row["id"] for row in rows}
        assert private == {row["id"] for row in rows if row["type"] == 12}
        assert joined == {t for t in private if world.thread(small, t).joined}


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_cache_equals_oracle_after_random_events(
    simulator: Simulator, world: World, large: int, small: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    async with discord_client(simulator, monkeypatch) as client:
        guilds = [client.get_guild(large), client.get_guild(small)]
        for guild in guilds:
            assert guild is not None
            await guild.chunk()
        for number in range(300):
            world.random_event(rng)
            if number in (100, 200):
                assert simulator.faults.drop_socket() == 1
        # Order holds, so what comes last proves that all came.
        last = world.join(large)
        await until(lambda: guilds[0] is not None and guilds[0].get_member(last) is not None)
        for guild in guilds:
            assert guild is not None
            assert differences(guild, expected(world, guild.id)) == []
    assert simulator.gateway.identifies == 1
    assert simulator.gateway.resumes >= 1


async def test_client_distinguishes_outage_from_removal(
    simulator: Simulator, world: World, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch) as client:
        world.guild_outage(small)
        await until(lambda: client.get_guild(small) is not None and client.get_guild(small).unavailable)  # type: ignore[union-attr]
        world.guild_restore(small)
        await until(lambda: not client.get_guild(small).unavailable)  # type: ignore[union-attr]
        world.remove_bot(small)
        await until(lambda: client.get_guild(small) is None)
        world.add_bot_back(small)
        await until(lambda: client.get_guild(small) is not None)
        new = world.add_guild(members=30)
        await until(lambda: client.get_guild(new) is not None)


async def test_client_resumes_after_dropped_socket(
    simulator: Simulator, world: World, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch) as client:
        guild = client.get_guild(small)
        assert guild is not None
        assert simulator.faults.drop_socket() == 1
        joined = [world.join(small) for _ in range(20)]
        await until(lambda: all(guild.get_member(user_id) for user_id in joined))
        assert (simulator.gateway.identifies, simulator.gateway.resumes) == (1, 1)


async def test_client_handles_reconnect_and_invalid_session(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch):
        assert simulator.request_reconnect() == 1
        await until(lambda: simulator.gateway.resumes == 1)
        assert simulator.faults.invalidate_session(resumable=True) == 1
        await until(lambda: simulator.gateway.resumes == 2)
        simulator.faults.refuse_resume()
        simulator.faults.drop_socket()
        await until(lambda: simulator.gateway.identifies == 2)


async def test_wrong_token_is_a_login_failure(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator.token = "another"
    client = discord.Client(intents=discord.Intents.none())
    monkeypatch.setattr(discord.http.Route, "BASE", simulator.api_base)
    with pytest.raises(discord.LoginFailure):
        await client.login("mistaken")
    await client.close()


async def test_disabled_privileged_intents_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Simulator(world, privileged_intents=0) as simulator:
        with pytest.raises(discord.PrivilegedIntentsRequired):
            async with discord_client(simulator, monkeypatch):
                pass


async def test_slash_commands_are_synced_run_and_edited(
    simulator: Simulator, world: World, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = discord.Client(intents=discord.Intents.all(), chunk_guilds_at_startup=False, guild_ready_timeout=0.1)
    tree = app_commands.CommandTree(client)
    group = app_commands.Group(name="mirror", description="The mirror")

    @group.command(description="Greet someone")
    async def greet(interaction: discord.Interaction, who: discord.Member, times: int = 1) -> None:
        await interaction.response.defer(ephemeral=True)
        for number in range(times):
            await interaction.edit_original_response(content=f"{number} {who.id}")
        await interaction.followup.send("and more")

    @tree.command(description="Answer at once")
    async def ping(interaction: discord.Interaction) -> None:
        await interaction.response.send_message("pong", embed=discord.Embed(title="a title"))

    tree.add_command(group)
    async with discord_client(simulator, monkeypatch, client):
        with pytest.raises(LookupError, match="no command /ping"):
            await simulator.run_command("ping", user_id=world.operator_id)
        await tree.sync()
        assert simulator.interactions.syncs[None] == 1
        owner = world.guilds[small].owner_id
        options = {"who": owner, "times": 3}
        result = await simulator.run_command(
            "mirror", subcommand="greet", user_id=owner, guild_id=small, options=options
        )
        await result.wait_done(until=lambda r: bool(r.followups))
        assert (result.deferred, result.ephemeral) == (True, True)
        assert [edit.content for edit in result.edits] == [f"{n} {owner}" for n in range(3)]
        assert result.final_content == f"2 {owner}"
        direct = await (await simulator.run_command("ping", user_id=world.operator_id)).wait_done()
        assert (direct.content, direct.embeds[0]["title"], direct.deferred) == ("pong", "a title", False)


async def test_bot_can_send_and_edit_messages(
    simulator: Simulator, world: World, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with discord_client(simulator, monkeypatch) as client:
        channel = next(c for c in client.get_guild(small).text_channels if c.name != "___hidden___")  # type: ignore[union-attr]
        message = await channel.send("first")
        await message.edit(content="second")
        assert simulator.channels.sent[message.id]["content"] == "second"
        user = await client.fetch_user(world.operator_id)
        assert (await user.send("hello")).content == "hello"

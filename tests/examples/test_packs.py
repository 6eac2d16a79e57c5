"""The bots in examples/ as their authors run them, and as a process through an outage of the database."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from simulator import Limits, Simulator, World
from simulator.entities import Permission
from tests.bot.running import TIMEOUT, BotProcess
from tests.conftest import admin_execute
from tests.docs.blocks import ROOT
from tests.packs.test_scaffold import run
from tests.waiting import until
from utils.database.embedded import EmbeddedServer
from utils.database.target import ConnectTarget

PACKS = [str(path.parent) for path in sorted((ROOT / "examples").glob("*/pack.toml"))]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_examples_pass_their_tests() -> None:
    assert " passed" in run(ROOT / "examples", sys.executable, "-m", "pytest", "-p", "no:cacheprovider")


@pytest.mark.exhaustive
@pytest.mark.timeout(240)
async def test_an_outage_of_30_seconds_ends_no_loop(
    tmp_path: Path, server: EmbeddedServer, target: ConnectTarget
) -> None:
    world = World(seed=3)
    guild_id = world.add_guild(members=8)
    guild = world.guild(guild_id)
    banned, talking = [id for id in guild.members if id != guild.owner_id and not world.user(id).bot][:2]
    world.grant(guild_id, guild.granted() | Permission.BAN_MEMBERS)
    channel_id = next(channel.id for channel in guild.channels.values() if channel.type == 0 and not channel.hidden)
    settings = {"DATABASE_URL": target.libpq_url(), "COGS": ",".join(PACKS), "SPOOL": "outage"}
    async with (
        Simulator(world, limits=Limits.none()) as simulator,
        BotProcess(tmp_path, DISCORD_TOKEN=simulator.token, DISCORD_API_BASE=simulator.api_base, **settings) as bot,
    ):
        await bot.wait_until_ready()

        async def use(command: str, **options: Any) -> str:
            result = await simulator.run_command(command, user_id=guild.owner_id, guild_id=guild_id, options=options)
            return (await result.wait_done(TIMEOUT)).texts[-1]

        assert (await use("ban", user=banned, reason="spam", days=1)).startswith("Case 1")
        connection = await asyncpg.connect(**target.connect_kwargs())
        await connection.execute("UPDATE moderation_cases SET expires_at = now()")
        await connection.close()
        await admin_execute(server, f"ALTER DATABASE {target.database} WITH ALLOW_CONNECTIONS false")
        await admin_execute(server, _END_SESSIONS.format(target.database))
        world.message(guild_id, channel_id, talking, "hello")
        assert "not available" in await use("daily")
        await asyncio.sleep(30)  # the outage itself
        assert banned in guild.bans
        await admin_execute(server, f"ALTER DATABASE {target.database} WITH ALLOW_CONNECTIONS true")
        await until(lambda: banned not in guild.bans, 90)
        assert (await use("daily")).startswith("You got 100 coins")
        connection = await asyncpg.connect(**target.connect_kwargs())
        while not await connection.fetchval("SELECT messages FROM levels_scores WHERE user_id = $1", talking):  # noqa: ASYNC110 - another process writes
            await asyncio.sleep(0.1)
        await connection.close()


_END_SESSIONS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}'"

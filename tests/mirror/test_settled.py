"""`settled`: what was received for a guild can be read from the tables."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from simulator import Simulator
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from tests.mirror.faults.test_database import refusing
from tests.mirror.harness import mirrored, small_world
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import SyncError

#: The writer flushes only when it is asked to.
NEVER = 3_600.0


async def test_everything_received_before_is_committed(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch, flush_seconds=NEVER) as bot:
        await bot.settled()
        user_id = simulator.world.join(guild_id)
        channel_id = next(iter(simulator.world.guild(guild_id).channels))
        simulator.world.message(guild_id, channel_id, user_id, "hello")
        simulator.world.update_member(guild_id, user_id, nick="new")
        await until(bot.has_received_all)
        assert await database.fetchval("SELECT count(*) FROM member_events") == 0
        await asyncio.gather(*(bot.mirror.settled(guild_id) for _ in range(20)))
        row = await database.fetchrow(
            "SELECT m.nick, e.kind, s.message_count FROM members m JOIN member_events e USING (guild_id, user_id)"
            " JOIN member_stats s USING (guild_id, user_id) WHERE user_id = $1",
            user_id,
        )
        assert row is not None
        assert tuple(row) == ("new", "join", 1)
        await bot.mirror.settled(guild_id, 1.0)  # there is nothing to wait for


async def test_snapshot_received_before_is_committed(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, _ = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch, flush_seconds=NEVER) as bot:
        await bot.settled()
        async with bot.mirror.writer.write_lock:  # nothing is written meanwhile
            guild_id = simulator.world.add_guild(members=5)
            await until(lambda: guild_id in bot.mirror.reconciler.guilds)
            waiting = asyncio.create_task(bot.mirror.settled(guild_id))
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await waiting
        assert await database.fetchval("SELECT count(*) FROM channels WHERE guild_id = $1", guild_id) > 0


async def test_outage_is_an_error_after_the_bound(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        async with refusing(database, "read-only"):
            simulator.world.join(guild_id)
            await until(bot.has_received_all)
            with pytest.raises(
                SyncError, match=rf"guild {guild_id}: what was received is not written after 0\.5 s: .*"
            ):
                await bot.mirror.settled(guild_id, 0.5)
        await bot.mirror.settled(guild_id)
        assert bot.mirror.writer.is_idle


async def test_row_that_is_refused_is_not_waited_for(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator, (guild_id,) = small_world(monkeypatch, 12)
    async with simulator, mirrored(database, simulator, monkeypatch) as bot:
        await bot.settled()
        await database.execute("ALTER TABLE members ADD CHECK (nick <> 'refused')")
        user_id = simulator.world.join(guild_id)
        simulator.world.update_member(guild_id, user_id, nick="refused")
        other = simulator.world.join(guild_id)
        await until(bot.has_received_all)
        await bot.mirror.settled(guild_id)
        assert await database.fetchval("SELECT count(*) FROM members WHERE user_id = $1", other) == 1
        assert await database.fetchval("SELECT count(*) FROM ops.dead_letters") == 1


READING = """
class Greeter(BaseCog):
    async def start(self) -> None:
        self.found = []

    @commands.Cog.listener()
    async def on_member_join(self, member: discord.Member) -> None:
        await self.bot.mirror.settled(member.guild.id)
        self.found.append((await self.members.get((member.guild.id, member.id))).user_id)

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Greeter(bot))
"""


@pytest.mark.guilds(10)
async def test_listener_reads_its_own_event(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write("greeter", READING)
    guild_id = next(iter(simulator.world.guilds))
    async with running_bot(database, simulator, extensions=cogs.extensions, flush_seconds=30) as bot:
        joined = [simulator.world.join(guild_id) for _ in range(5)]
        await until(lambda: len(bot.cogs["Greeter"].found) == 5)  # type: ignore[attr-defined]
        assert sorted(bot.cogs["Greeter"].found) == sorted(joined)  # type: ignore[attr-defined]

"""The bot's statistics, and discord.py's member cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import Simulator, World
from tests.bot.running import running_bot, wait_until_mirrored
from tests.waiting import until
from utils.bot.client import ERRORS_PER_LISTENER, member_cache_flags
from utils.database import Pool
from utils.service import metrics


async def test_stats_and_metrics_count_waiting_and_written_rows(
    simulator: Simulator, world: World, small: int, database: Pool, tmp_path: Path
) -> None:
    async with running_bot(database, simulator, spool="always", data_dir=tmp_path, flush_seconds=60) as bot:
        await until(lambda: bot.mirror.writer.is_idle)
        async with bot.mirror.writer.write_lock:  # keeps rows waiting
            channel = next(c.id for c in world.guild(small).channels.values() if c.type == 0 and not c.hidden)
            someone = world.guild(small).ordered_member_ids()[0]
            for _ in range(5):
                world.message(small, channel, someone, "hello")
            world.join(small)
            await until(lambda: bot.stats()["queue"]["events"] == 6)
            await until(lambda: bot.stats()["spool"]["events"] == 6 and bot.stats()["spool"]["bytes"] > 0)
            stats = bot.stats()
            assert (stats["buffer"]["rows"] >= 2, stats["buffer"]["dropped"]) == (True, 0)
            assert stats["queue"]["oldest"] > 0
            assert (stats["lease"]["state"], stats["lease"]["epoch"]) == ("active", bot.mirror.fence.epoch)
            assert {"created", "active", "idle", "waiting"} <= stats["pool"].keys()
            assert stats["guilds"] == {"total": 2, "unavailable": 0}
            assert stats["users"].keys() == {"total", "bots", "at"}
            bot.update_metrics()
            assert "guildbook_queue_events 6.0" in metrics.render().decode()
        await bot.mirror.writer.flush()
        assert bot.stats()["written"]["events"] == 6
        assert bot.stats()["queue"]["events"] == 0
    rows = await database.fetch("SELECT message_count FROM member_stats")
    assert [row["message_count"] for row in rows] == [5]


async def test_a_listener_that_always_fails_does_not_flood_the_log(
    database: Pool, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    seen = 0

    async def on_flood() -> None:
        nonlocal seen
        seen += 1
        raise ValueError(seen)

    async with running_bot(database, simulator, extensions=[]) as bot:
        bot.add_listener(on_flood)
        for _ in range(40):
            bot.dispatch("flood")
        await until(lambda: seen == 40)
    assert caplog.messages.count("listener failed: on_flood") == ERRORS_PER_LISTENER
    assert [line for line in caplog.messages if "keeps failing" in line] == [
        f"listener keeps failing: on_flood: ValueError({ERRORS_PER_LISTENER + 1}); most of its errors are left out"
    ]


@pytest.mark.parametrize("member_cache", ["none", "voice", "all"])
async def test_the_mirror_does_not_depend_on_the_member_cache(
    database: Pool, simulator: Simulator, member_cache: str, small: int
) -> None:
    async with running_bot(database, simulator, member_cache=member_cache) as bot:
        await wait_until_mirrored(database, simulator)
        simulator.world.join(small)
        await wait_until_mirrored(database, simulator)
        guild = bot.get_guild(small)
        assert guild is not None
        in_voice = len(simulator.world.guild(small).voice)
        everyone = len(simulator.world.guild(small).members)
        assert len(guild.members) == {"none": 1, "voice": 1 + in_voice, "all": everyone}[member_cache]
    assert not member_cache_flags("none").joined

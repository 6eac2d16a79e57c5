"""The bot's figures: what waits, what was written, and who acts."""

from __future__ import annotations

from pathlib import Path

from simulator import Simulator, World
from tests.bot.running import running_bot
from tests.waiting import until
from utils.database import Pool
from utils.service import metrics
from utils.service.lease import Lease, holder


async def test_the_figures_tell_what_waits_what_was_written_and_who_acts(
    simulator: Simulator, world: World, small: int, database: Pool, tmp_path: Path
) -> None:
    async with running_bot(database, simulator, spool="always", data_dir=tmp_path, flush_seconds=60) as bot:
        await until(lambda: bot.mirror.writer.is_idle)
        async with bot.mirror.writer.write_lock:  # nobody else writes
            channel = next(c.id for c in world.guild(small).channels.values() if c.type == 0 and not c.hidden)
            someone = world.guild(small).ordered_member_ids()[0]
            for _ in range(5):
                world.message(small, channel, someone, "hello")
            world.join(small)
            await until(lambda: bot.stats()["queue"]["events"] == 6)
            await until(lambda: bot.stats()["spool"]["events"] == 6 and bot.stats()["spool"]["bytes"] > 0)
            figures = bot.stats()
            assert (figures["buffer"]["rows"] >= 2, figures["buffer"]["dropped"]) == (True, 0)
            assert figures["queue"]["oldest"] > 0
            assert (figures["lease"]["state"], figures["lease"]["epoch"]) == ("active", 1)
            assert {"created", "active", "idle", "waiting"} <= figures["pool"].keys()
            bot.update_metrics()
            assert "guildbook_queue_events 6.0" in metrics.render().decode()
        await bot.mirror.writer.flush()
        assert bot.stats()["written"]["events"] == 6
        assert bot.stats()["queue"]["events"] == 0
    rows = await database.fetch("SELECT message_count FROM member_stats")
    assert [row["message_count"] for row in rows] == [5]


async def test_a_process_that_was_stopped_is_in_doubt_until_it_has_asked(database: Pool) -> None:
    lease = Lease(database.target, holder())
    await lease.wait()
    try:
        assert not lease.was_suspended()
        lease._last_tick -= 60  # as long as nothing of this process ran
        assert lease.was_suspended()
        await until(lambda: not lease.was_suspended())
        assert lease.is_sure()
    finally:
        await lease.release(5)

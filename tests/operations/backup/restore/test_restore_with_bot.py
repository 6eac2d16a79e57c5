"""A restore under a running bot, which keeps running and converges with Discord again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from simulator import Simulator, World
from tests.bot.running import BotProcess, running_bot, wait_until_mirrored
from tests.operations.backup.helpers import dropping_scratch_databases, dump, until_query
from tests.waiting import until
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.operations.backup.restore.restore import restore_archive

pytestmark = [pytest.mark.slow, pytest.mark.guilds(1_500, 40)]


async def no_safety_backup() -> tuple[None, str]:
    return None, "There was nothing to back up."


async def test_a_running_bot_keeps_its_lease_and_reconciles(
    tmp_path: Path,
    server: EmbeddedServer,
    database: Pool,
    world: World,
    simulator: Simulator,
) -> None:
    small = list(world.guilds)[1]
    async with (
        dropping_scratch_databases(database.target),
        running_bot(database, simulator, extensions=()) as bot,
    ):
        await wait_until_mirrored(database, simulator)
        archive = await dump(server, database.target, tmp_path / "dump")
        since = [world.join(small) for _ in range(20)]
        rng = random.Random(7)
        for _ in range(200):
            world.random_event(rng)
        await wait_until_mirrored(database, simulator)

        async def reconcile() -> None:
            assert await database.fetchval("SELECT count(*) FROM members WHERE user_id = ANY($1)", since) == 0
            # A listing is not enough: threads, for one, are sent only at the start of a session.
            assert simulator.faults.invalidate_session(resumable=False) == 1

        outcome = await restore_archive(database, archive, safety_backup=no_safety_backup, after=reconcile)
        assert outcome.ok, outcome.text
        for _ in range(5):
            world.join(small)
        await wait_until_mirrored(database, simulator)
        assert bot.mirror.fence.epoch == await database.fetchval("SELECT epoch FROM ops.leases")
        assert await database.fetchval("SELECT count(*) FROM ops.dead_letters") == 0
        await until(lambda: bot.readiness()[0])


async def test_a_bot_in_another_process_starts_over(
    tmp_path: Path, server: EmbeddedServer, database: Pool, world: World, simulator: Simulator
) -> None:
    small = list(world.guilds)[1]
    settings = {
        "DISCORD_TOKEN": simulator.token,
        "DISCORD_API_BASE": simulator.api_base,
        "DATABASE_URL": database.target.libpq_url(),
        "DATA_DIR": str(tmp_path / "data"),
    }
    async with dropping_scratch_databases(database.target), BotProcess(tmp_path, **settings) as bot:
        await bot.wait_until_ready()
        await wait_until_mirrored(database, simulator)
        archive = await dump(server, database.target, tmp_path / "dump")
        rng = random.Random(7)
        for _ in range(200):
            world.random_event(rng)
        await wait_until_mirrored(database, simulator)
        epoch = await database.fetchval("SELECT epoch FROM ops.leases")
        outcome = await restore_archive(database, archive, safety_backup=no_safety_backup)
        assert outcome.ok, outcome.text
        for _ in range(5):
            world.join(small)
        await until_query(database.target, "SELECT epoch = $1 + 2 FROM ops.leases", epoch)
        await wait_until_mirrored(database, simulator)
        await bot.wait_until_ready()
        assert await database.fetchval("SELECT count(*) FROM ops.dead_letters") == 0

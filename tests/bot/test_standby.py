"""Two processes on one database: one acts, the other stands by, and takes over however the first one ends."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from simulator import Simulator
from tests.bot.running import TIMEOUT, BotProcess, wait_until_mirrored
from tests.waiting import until
from utils.database import Pool

pytestmark = pytest.mark.slow

#: The low bits of a stamp count; the high ones are the epoch.
COUNTER_BITS = 40


class Pair:
    """Makes processes for one simulator and one database, each on a disk of its own unless told otherwise."""

    def __init__(self, directory: Path, simulator: Simulator, url: str) -> None:
        self._directory = directory
        self._settings = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATABASE_URL": url}

    def process(self, disk: str) -> BotProcess:
        return BotProcess(self._directory, **self._settings, DATA_DIR=str(self._directory / disk), FLUSH_SECONDS="0.1")


async def epoch(database: Pool) -> int:
    return int(await database.fetchval("SELECT epoch FROM ops.leases"))


async def until_standing_by(bot: BotProcess) -> None:
    """Wait until the process says that it does nothing but look."""
    async with asyncio.timeout(TIMEOUT):
        while (await bot.get("/healthz")) != (200, {"ok": True, "state": "standby"}):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.05)


async def until_it_has_looked(bot: BotProcess) -> None:
    """Wait until the process has found another one acting."""
    await bot.wait_for_output("standing by: ")
    await until_standing_by(bot)


async def in_order(first: BotProcess, second: BotProcess) -> tuple[BotProcess, BotProcess]:
    """Wait until one of the two acts and the other stands by, and return them in that order."""
    async with asyncio.timeout(TIMEOUT):
        while not (ready := [bot for bot in (first, second) if (await bot.get("/readyz"))[0] == 200]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    (acting,) = ready
    other = second if acting is first else first
    await until_it_has_looked(other)
    return acting, other


def with_a_socket(simulator: Simulator) -> int:
    return sum(session.socket is not None for session in simulator.gateway.sessions.values())


async def stops(bot: BotProcess) -> None:
    bot.send_signal(signal.SIGTERM)
    assert await bot.wait_for_exit() == 0, bot.output
    assert "Traceback" not in bot.output


async def test_the_second_process_is_healthy_but_not_ready_and_does_not_connect(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    pair = Pair(tmp_path, simulator, database_url)
    async with pair.process("one") as first:
        await first.wait_until_ready()
        async with pair.process("two") as second:
            await until_it_has_looked(second)
            status, state = await second.get("/readyz")
            assert (status, state["state"]) == (503, "standby")
            assert "guildbook_lease_epoch 0" in (await second.get("/metrics"))[1]
            simulator.world.join(small)
            await wait_until_mirrored(database, simulator)
            assert (await first.get("/readyz"))[0] == 200
            assert simulator.gateway.identifies == len(simulator.gateway.connections) == 1
            assert await epoch(database) == 1
            await stops(second)
        assert (await first.get("/readyz"))[0] == 200
        assert simulator.gateway.identifies == await epoch(database) == 1
        await stops(first)


async def test_two_that_start_at_once_on_an_empty_database_do_not_both_act(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str
) -> None:
    pair = Pair(tmp_path, simulator, database_url)
    async with pair.process("one") as one, pair.process("two") as two:
        acting, other = await in_order(one, two)
        assert simulator.gateway.identifies == await epoch(database) == 1
        await stops(acting)
        await other.wait_until_ready()
        await wait_until_mirrored(database, simulator)
        await stops(other)


async def test_a_process_that_is_stopped_hands_over(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    pair = Pair(tmp_path, simulator, database_url)
    async with pair.process("one") as first, pair.process("two") as second:
        bots = await in_order(first, second)
        await stops(bots[0])
        assert await database.fetchval("SELECT expires_at IS NULL OR epoch = 2 FROM ops.leases"), "given back"
        simulator.world.join(small)
        await bots[1].wait_until_ready()
        await wait_until_mirrored(database, simulator)
        assert await epoch(database) == 2
        assert with_a_socket(simulator) == 1
        await stops(bots[1])


async def test_a_process_that_is_killed_is_followed_from_another_machine(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    await killed_and_followed(Pair(tmp_path, simulator, database_url), ("one", "two"), simulator, database, small)


async def test_a_process_that_is_killed_is_followed_on_the_same_disk(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    await killed_and_followed(Pair(tmp_path, simulator, database_url), ("one", "one"), simulator, database, small)


async def killed_and_followed(
    pair: Pair, disks: tuple[str, str], simulator: Simulator, database: Pool, guild: int
) -> None:
    async with pair.process(disks[0]) as first, pair.process(disks[1]) as second:
        bots = await in_order(first, second)
        before = await epoch(database)
        bots[0].send_signal(signal.SIGKILL)
        await bots[0].wait_for_exit()
        simulator.world.join(guild)
        await bots[1].wait_until_ready()
        await wait_until_mirrored(database, simulator)
        assert await epoch(database) == before + 1
        await stops(bots[1])


async def test_a_process_that_was_frozen_leaves_the_gateway_and_stands_by_until_it_is_its_turn_again(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    world = simulator.world
    pair = Pair(tmp_path, simulator, database_url)
    async with pair.process("one") as one, pair.process("two") as two:
        first, second = await in_order(one, two)
        first.send_signal(signal.SIGSTOP)
        try:
            world.join(small)  # the frozen process finds this in its socket when it wakes
            await second.wait_until_ready()
            assert await epoch(database) == 2
            world.join(small)
            await wait_until_mirrored(database, simulator)
        finally:
            first.send_signal(signal.SIGCONT)
        came = [world.join(small) for _ in range(5)]
        await until_standing_by(first)
        assert (await first.get("/readyz"))[0] == 503
        await until(lambda: len(simulator.gateway.connections) == with_a_socket(simulator) == 1)
        came += [world.join(small) for _ in range(5)]
        world.leave(small, came[-1])
        await wait_until_mirrored(database, simulator)
        stamps = "SELECT DISTINCT stamp >> $1 AS epoch FROM members WHERE user_id = ANY($2)"
        assert [row["epoch"] for row in await database.fetch(stamps, COUNTER_BITS, came)] == [2]
        assert (await second.get("/readyz"))[0] == 200
        assert await epoch(database) == 2
        events = "SELECT count(*) FROM member_events WHERE user_id = $1"
        for user in came[:-1]:
            assert await database.fetchval(events, user) == 1, "told by two, kept once"

        await stops(second)
        world.leave(small, came[0])
        await first.wait_until_ready()
        came = [world.join(small)]
        await wait_until_mirrored(database, simulator)
        assert await epoch(database) == 3
        assert [row["epoch"] for row in await database.fetch(stamps, COUNTER_BITS, came)] == [3]
        assert len(simulator.gateway.connections) == 1
        await stops(first)

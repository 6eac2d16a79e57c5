"""Several processes on one database: one is active, the others stand by and take over; and interrupted starts."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from simulator import Simulator
from simulator.proxy import Proxy
from tests.bot.running import TIMEOUT, BotProcess, restored_endpoints, settings_for, wait_until_mirrored
from tests.leases import seize
from tests.waiting import until
from utils.bot.client import SPOOL_DIRECTORY, Guildbook
from utils.bot.process import Process
from utils.database import ConnectTarget, Pool
from utils.database.embedded import PORT, EmbeddedServer
from utils.exceptions import DatabaseUnavailable, LeaseLost
from utils.service.lease import Fence

pytestmark = pytest.mark.slow

#: The bits of a stamp that count; the bits above them are the epoch.
COUNTER_BITS = 40


class Processes:
    """Creates processes for one simulator and one database, each with the data directory named by `disk`."""

    def __init__(self, directory: Path, simulator: Simulator, url: str) -> None:
        self._directory = directory
        self._settings = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATABASE_URL": url}

    def create(self, disk: str) -> BotProcess:
        return BotProcess(self._directory, **self._settings, DATA_DIR=str(self._directory / disk), FLUSH_SECONDS="0.1")


async def epoch(database: Pool) -> int:
    return int(await database.fetchval("SELECT epoch FROM ops.leases"))


async def wait_for_standby(bot: BotProcess) -> None:
    """Wait until the process reports that it stands by."""
    async with asyncio.timeout(TIMEOUT):
        while (await bot.get("/healthz")) != (200, {"ok": True, "state": "standby"}):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.05)


async def wait_until_it_found_another(bot: BotProcess) -> None:
    """Wait until the process has found another one active and stands by."""
    await bot.wait_for_output("standing by: ")
    await wait_for_standby(bot)


async def active_first(first: BotProcess, second: BotProcess) -> tuple[BotProcess, BotProcess]:
    """Wait until one process is active and the other stands by, and return them in that order."""
    async with asyncio.timeout(TIMEOUT):
        while not (ready := [bot for bot in (first, second) if (await bot.get("/readyz"))[0] == 200]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    (active,) = ready
    other = second if active is first else first
    await wait_until_it_found_another(other)
    return active, other


def open_sockets(simulator: Simulator) -> int:
    return sum(session.socket is not None for session in simulator.gateway.sessions.values())


async def stop_cleanly(bot: BotProcess) -> None:
    bot.send_signal(signal.SIGTERM)
    assert await bot.wait_for_exit() == 0, bot.output
    assert "Traceback" not in bot.output


async def test_second_process_is_healthy_but_not_ready(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    processes = Processes(tmp_path, simulator, database_url)
    async with processes.create("one") as first:
        await first.wait_until_ready()
        before = await epoch(database)
        async with processes.create("two") as second:
            await wait_until_it_found_another(second)
            status, state = await second.get("/readyz")
            assert (status, state["state"]) == (503, "standby")
            assert "guildbook_lease_epoch 0" in (await second.get("/metrics"))[1]
            simulator.world.join(small)
            await wait_until_mirrored(database, simulator)
            assert (await first.get("/readyz"))[0] == 200
            assert simulator.gateway.identifies == len(simulator.gateway.connections) == 1
            await stop_cleanly(second)
        assert (await first.get("/readyz"))[0] == 200
        assert simulator.gateway.identifies == 1
        assert await epoch(database) == before
        await stop_cleanly(first)


async def test_only_one_of_two_simultaneous_starts_is_active(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str
) -> None:
    processes = Processes(tmp_path, simulator, database_url)
    async with processes.create("one") as one, processes.create("two") as two:
        active, other = await active_first(one, two)
        assert simulator.gateway.identifies == 1
        await stop_cleanly(active)
        await other.wait_until_ready()
        await wait_until_mirrored(database, simulator)
        await stop_cleanly(other)


async def test_stopped_process_hands_over(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    processes = Processes(tmp_path, simulator, database_url)
    async with processes.create("one") as first, processes.create("two") as second:
        bots = await active_first(first, second)
        before = await epoch(database)
        await stop_cleanly(bots[0])
        assert await database.fetchval("SELECT expires_at IS NULL OR epoch > $1 FROM ops.leases", before), "released"
        simulator.world.join(small)
        await bots[1].wait_until_ready()
        await wait_until_mirrored(database, simulator)
        assert await epoch(database) > before
        assert open_sockets(simulator) == 1
        await stop_cleanly(bots[1])


@pytest.mark.parametrize("disks", [("one", "two"), ("one", "one")], ids=["other-machine", "same-disk"])
async def test_standby_takes_over_after_a_kill(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int, disks: tuple[str, str]
) -> None:
    processes = Processes(tmp_path, simulator, database_url)
    async with processes.create(disks[0]) as first, processes.create(disks[1]) as second:
        bots = await active_first(first, second)
        before = await epoch(database)
        bots[0].send_signal(signal.SIGKILL)
        await bots[0].wait_for_exit()
        simulator.world.join(small)
        await bots[1].wait_until_ready()
        await wait_until_mirrored(database, simulator)
        assert await epoch(database) > before
        await stop_cleanly(bots[1])


async def test_resumed_process_stands_by_until_it_takes_over_again(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, small: int
) -> None:
    world = simulator.world
    processes = Processes(tmp_path, simulator, database_url)
    async with processes.create("one") as one, processes.create("two") as two:
        first, second = await active_first(one, two)
        before = await epoch(database)
        first.send_signal(signal.SIGSTOP)
        try:
            world.join(small)  # the stopped process reads this from its socket when it continues
            await second.wait_until_ready()
            taken_over = await epoch(database)
            assert taken_over > before
            world.join(small)
            await wait_until_mirrored(database, simulator)
        finally:
            first.send_signal(signal.SIGCONT)
        joined = [world.join(small) for _ in range(5)]
        await wait_for_standby(first)
        assert (await first.get("/readyz"))[0] == 503
        await until(lambda: len(simulator.gateway.connections) == open_sockets(simulator) == 1)
        joined += [world.join(small) for _ in range(5)]
        world.leave(small, joined[-1])
        await wait_until_mirrored(database, simulator)
        stamps = "SELECT DISTINCT stamp >> $1 AS epoch FROM members WHERE user_id = ANY($2)"
        assert [row["epoch"] for row in await database.fetch(stamps, COUNTER_BITS, joined)] == [taken_over]
        assert (await second.get("/readyz"))[0] == 200
        assert await epoch(database) == taken_over
        events = "SELECT count(*) FROM member_events WHERE user_id = $1"
        for user in joined[:-1]:
            assert await database.fetchval(events, user) == 1, "received twice, stored once"

        await stop_cleanly(second)
        world.leave(small, joined[0])
        await first.wait_until_ready()
        joined = [world.join(small)]
        await wait_until_mirrored(database, simulator)
        taken_again = await epoch(database)
        assert taken_again > taken_over
        assert [row["epoch"] for row in await database.fetch(stamps, COUNTER_BITS, joined)] == [taken_again]
        assert len(simulator.gateway.connections) == 1
        await stop_cleanly(first)


# --- interrupted starts, the embedded server, outages


@asynccontextmanager
async def run_process(directory: Path, simulator: Simulator, url: str) -> AsyncIterator[Process]:
    """Run a `Process` in this process, and stop it with its signal handler."""
    settings = settings_for(simulator, database_url=url, data_dir=directory, health_host="127.0.0.1", health_port=0)
    # Freezing the heap would exempt the tests' objects from garbage collection.
    process = Process(settings, before_login=lambda: None)
    task = asyncio.create_task(process.run())
    with restored_endpoints():
        try:
            yield process
        finally:
            process._on_signal(signal.SIGTERM)
            async with asyncio.timeout(TIMEOUT):
                await task


def is_ready(process: Process) -> bool:
    return process._readiness()[0]


async def test_lost_lease_during_the_start_leads_to_standby(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup_hook, calls, other = Guildbook.setup_hook, 0, Fence("", 0)

    async def lose_lease_once(bot: Guildbook) -> None:
        nonlocal calls, other
        calls += 1
        if calls == 1:
            other = await seize(database, "another")
            raise LeaseLost("another process is active")
        await setup_hook(bot)

    monkeypatch.setattr(Guildbook, "setup_hook", lose_lease_once)
    async with run_process(tmp_path, simulator, database_url) as process:
        await until(lambda: is_ready(process))
        assert await epoch(database) > other.epoch
        assert simulator.gateway.identifies == 1
        await wait_until_mirrored(database, simulator)
    assert calls == 2


async def test_start_is_repeated_after_a_database_outage(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup_hook, calls = Guildbook.setup_hook, 0

    async def fail_once(bot: Guildbook) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise DatabaseUnavailable("no connection to the database: Connection refused")
        await setup_hook(bot)

    monkeypatch.setattr(Guildbook, "setup_hook", fail_once)
    async with run_process(tmp_path, simulator, database_url) as process:
        await until(lambda: is_ready(process))
        await wait_until_mirrored(database, simulator)
        assert simulator.gateway.identifies == 1
    assert calls == 2
    assert await database.fetchval("SELECT expires_at IS NULL FROM ops.leases"), "released"


async def test_standby_creates_no_partitions(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await seize(database, "another")
    await database.execute("UPDATE ops.leases SET expires_at = 'infinity'")
    async with run_process(tmp_path, simulator, database_url) as process:
        await until(lambda: process.state == "standby")
        assert process._liveness() == (True, {"state": "standby"})
        assert process._readiness() == (False, {"state": "standby"})

        async def fail(pool: Pool) -> None:
            pytest.fail("only the active process creates partitions")

        monkeypatch.setattr(process, "_create_partitions", fail)
        await process._maintain_partitions()
    row = await database.fetchrow("SELECT holder, expires_at = 'infinity' FROM ops.leases")
    assert row is not None
    assert tuple(row) == ("another", True), "a lease that was never acquired is not released"


async def test_two_processes_share_an_embedded_server(tmp_path: Path, simulator: Simulator, small: int) -> None:
    settings = {
        "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATA_DIR": str(tmp_path / "data"),
    }  # fmt: skip
    server = EmbeddedServer(tmp_path / "data")
    lock_file = server.cluster / "postmaster.pid"
    async with BotProcess(tmp_path, **settings) as first, BotProcess(tmp_path, **settings) as second:
        async with asyncio.timeout(TIMEOUT):
            while not (ready := [bot for bot in (first, second) if (await bot.get("/readyz"))[0] == 200]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        (active,) = ready
        other = second if active is first else first
        await other.wait_for_output("standing by: ")
        postmaster = lock_file.read_text().split()[0]
        await server.start()
        database = Pool(server.target(), pool_max=2)
        await database.connect()
        former = await epoch(database)
        active.send_signal(signal.SIGTERM)
        assert await active.wait_for_exit() == 0, active.output
        simulator.world.join(small)
        await other.wait_until_ready()
        assert lock_file.read_text().split()[0] == postmaster, "the other process still uses it"
        try:
            await wait_until_mirrored(database, simulator)
            assert await epoch(database) > former
        finally:
            await database.close()
        other.send_signal(signal.SIGTERM)
        assert await other.wait_for_exit() == 0, other.output
    assert not lock_file.exists(), "the last process stops it"


@pytest.mark.parametrize("signals", [1, 2])
async def test_shutdown_during_an_outage_keeps_events_in_the_journal(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    target: ConnectTarget,
    database_url: str,
    small: int,
    signals: int,
) -> None:
    settings = {
        "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATA_DIR": str(tmp_path / "data"),
        "FLUSH_SECONDS": "0.1", "DB_COMMAND_TIMEOUT": "60",
    }  # fmt: skip
    spool = tmp_path / "data" / SPOOL_DIRECTORY
    async with Proxy(f"{target.hosts[0]}/.s.PGSQL.{PORT}") as network:
        url = f"postgresql://{target.user}@127.0.0.1:{network.port}/{target.database}?sslmode=disable"
        # A second signal hurries a shutdown that would take up to an hour.
        seconds = {1: "9", 2: "3600"}[signals]
        async with BotProcess(tmp_path, **settings, DATABASE_URL=url, SHUTDOWN_SECONDS=seconds) as bot:
            await bot.wait_until_ready()
            await wait_until_mirrored(database, simulator)
            network.freeze()
            joined = simulator.world.join(small)
            async with asyncio.timeout(TIMEOUT):
                while not (await bot.get("/readyz"))[1]["rows_waiting"]:  # noqa: ASYNC110 - it is another process
                    await asyncio.sleep(0.01)
            for number in range(signals):
                bot.send_signal(signal.SIGTERM)
                await bot.wait_for_output("received SIGTERM: stopping" if number == 0 else "hurrying")
                await until(lambda: not simulator.gateway.connections)
                await bot.get("/healthz")  # it is writing by now
            assert await bot.wait_for_exit() == 0, bot.output
            assert "Traceback" not in bot.output
    assert [path for path in spool.glob("*/*.journal") if path.stat().st_size], bot.output
    query = "SELECT count(*) FROM member_events WHERE user_id = $1 AND NOT inferred"
    assert await database.fetchval(query, joined) == 0
    async with BotProcess(tmp_path, **settings, DATABASE_URL=database_url) as bot:
        await bot.wait_until_ready()
        await wait_until_mirrored(database, simulator)
        assert await database.fetchval(query, joined) == 1
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0, bot.output
    assert not list(spool.glob("*/*.journal"))

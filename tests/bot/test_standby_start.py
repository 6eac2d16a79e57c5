"""A start that is cut short, two processes on one embedded server, and an end without a database."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from discord import gateway, http

from simulator import Simulator
from simulator.proxy import Proxy
from tests.bot.running import TIMEOUT, BotProcess, settings_for, wait_until_mirrored
from tests.leases import seize
from tests.waiting import until
from utils.bot.client import SPOOL_DIRECTORY, Guildbook
from utils.bot.process import Process
from utils.database import ConnectTarget, Pool
from utils.database.embedded import PORT, EmbeddedServer
from utils.exceptions import DatabaseUnavailable, LeaseLost
from utils.service import heap

pytestmark = pytest.mark.slow


@asynccontextmanager
async def in_this_process(
    directory: Path, simulator: Simulator, url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Process]:
    """Run what `python bot.py` runs, and end it by the signal's own handler."""
    monkeypatch.setattr(http.Route, "BASE", http.Route.BASE)  # the bot sets both; given back afterwards
    monkeypatch.setattr(gateway.DiscordWebSocket, "DEFAULT_GATEWAY", gateway.DiscordWebSocket.DEFAULT_GATEWAY)
    monkeypatch.setattr(heap, "settle", lambda: None)  # the tests' own garbage is to be collected
    settings = settings_for(simulator, database_url=url, data_dir=directory, health_host="127.0.0.1", health_port=0)
    process = Process(settings)
    task = asyncio.create_task(process.run())
    try:
        yield process
    finally:
        process._on_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT):
            await task


def is_ready(process: Process) -> bool:
    return process._readiness()[0]


async def test_a_takeover_before_the_gateway_leads_back_to_standing_by(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_up, times = Guildbook.setup_hook, 0

    async def overtaken(bot: Guildbook) -> None:
        nonlocal times
        times += 1
        if times == 1:
            await seize(database, "another")
            raise LeaseLost("another process acts now")
        await set_up(bot)

    monkeypatch.setattr(Guildbook, "setup_hook", overtaken)
    async with in_this_process(tmp_path, simulator, database_url, monkeypatch) as process:
        await until(lambda: is_ready(process))
        assert await database.fetchval("SELECT epoch FROM ops.leases") == 3
        assert simulator.gateway.identifies == 1
        await wait_until_mirrored(database, simulator)
    assert times == 2


async def test_an_outage_in_the_middle_of_the_start_is_waited_out(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_up, times = Guildbook.setup_hook, 0

    async def cut_short(bot: Guildbook) -> None:
        nonlocal times
        times += 1
        if times == 1:
            raise DatabaseUnavailable("no connection to the database: Connection refused")
        await set_up(bot)

    monkeypatch.setattr(Guildbook, "setup_hook", cut_short)
    async with in_this_process(tmp_path, simulator, database_url, monkeypatch) as process:
        await until(lambda: is_ready(process))
        await wait_until_mirrored(database, simulator)
        assert simulator.gateway.identifies == 1
    assert times == 2
    assert await database.fetchval("SELECT expires_at IS NULL FROM ops.leases"), "it is given back"


async def test_whoever_stands_by_makes_no_partitions(
    tmp_path: Path,
    simulator: Simulator,
    database: Pool,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await seize(database, "another")
    await database.execute("UPDATE ops.leases SET expires_at = 'infinity'")
    async with in_this_process(tmp_path, simulator, database_url, monkeypatch) as process:
        await until(lambda: process.state == "standby")
        assert process._liveness() == (True, {"state": "standby"})
        assert process._readiness() == (False, {"state": "standby"})

        async def fail(pool: Pool) -> None:
            pytest.fail("only the active process creates partitions")

        monkeypatch.setattr(process, "_create_partitions", fail)
        await process._maintain_partitions()
    row = await database.fetchrow("SELECT holder, expires_at = 'infinity' FROM ops.leases")
    assert row is not None
    assert tuple(row) == ("another", True), "what was never won is not given back"


async def test_a_second_process_joins_the_embedded_server_stands_by_and_survives_the_first(
    tmp_path: Path, simulator: Simulator, small: int
) -> None:
    settings = {
        "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "DATA_DIR": str(tmp_path / "data"),
    }  # fmt: skip
    server = EmbeddedServer(tmp_path / "data")
    lock_file = server.cluster / "postmaster.pid"
    async with BotProcess(tmp_path, **settings) as first, BotProcess(tmp_path, **settings) as second:
        async with asyncio.timeout(TIMEOUT):
            while not (ready := [bot for bot in (first, second) if (await bot.get("/readyz"))[0] == 200]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        (acting,) = ready
        other = second if acting is first else first
        await other.wait_for_output("standing by: ")
        postmaster = lock_file.read_text().split()[0]
        acting.send_signal(signal.SIGTERM)
        assert await acting.wait_for_exit() == 0, acting.output
        simulator.world.join(small)
        await other.wait_until_ready()
        assert lock_file.read_text().split()[0] == postmaster, "somebody was left to use it"
        await server.start()
        database = Pool(server.target(), pool_max=2)
        await database.connect()
        try:
            await wait_until_mirrored(database, simulator)
            assert await database.fetchval("SELECT epoch FROM ops.leases") == 2
        finally:
            await database.close()
        other.send_signal(signal.SIGTERM)
        assert await other.wait_for_exit() == 0, other.output
    assert not lock_file.exists(), "nobody was left to use it"


@pytest.mark.parametrize("signals", [1, 2])
async def test_an_end_without_a_database_leaves_events_to_the_disk_and_the_next_start_writes_them(
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
        # Two signals hurry an end that would wait for an hour.
        seconds = {1: "9", 2: "3600"}[signals]
        async with BotProcess(tmp_path, **settings, DATABASE_URL=url, SHUTDOWN_SECONDS=seconds) as bot:
            await bot.wait_until_ready()
            await wait_until_mirrored(database, simulator)
            network.freeze()
            come = simulator.world.join(small)
            async with asyncio.timeout(TIMEOUT):
                while not (await bot.get("/readyz"))[1]["rows_waiting"]:  # noqa: ASYNC110 - it is another process
                    await asyncio.sleep(0.01)
            for number in range(signals):
                bot.send_signal(signal.SIGTERM)
                await bot.wait_for_output("SIGTERM: stopping" if number == 0 else "hurrying")
                await until(lambda: not simulator.gateway.connections)
                await bot.get("/healthz")  # by now it tries to write
            assert await bot.wait_for_exit() == 0, bot.output
            assert "Traceback" not in bot.output
    assert [path for path in spool.glob("*/*.journal") if path.stat().st_size], bot.output
    query = "SELECT count(*) FROM member_events WHERE user_id = $1 AND NOT inferred"
    assert await database.fetchval(query, come) == 0
    async with BotProcess(tmp_path, **settings, DATABASE_URL=database_url) as bot:
        await bot.wait_until_ready()
        await wait_until_mirrored(database, simulator)
        assert await database.fetchval(query, come) == 1
        bot.send_signal(signal.SIGTERM)
        assert await bot.wait_for_exit() == 0, bot.output
    assert not list(spool.glob("*/*.journal"))

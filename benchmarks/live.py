"""The live path: events a second against a listener that does nothing, time to the commit, memory, and an outage."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.report import Row
from simulator.remote import SimulatorProcess
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.proof import TABLES, compare
from utils.operations import migrations

ROOT = Path(__file__).parent.parent
PATIENCE = 1_800.0
#: Messages of one round, and rounds of each way. What counts is a rate that lasts: the last commit, for which the clock
#: waits as well, must not be a good part of it.
BURST, ROUNDS = 200_000, 3
#: Messages in all for the measurement of memory, and after how many it is read first.
MILLION, WARM = 1_000_000, 200_000
#: What memory may differ by and count as flat: discord.py alone goes up and down by as much.
FLAT_MB = 10
#: Events a second in everyday life of a large bot, and for how long they are timed.
RATE, TIMED_SECONDS = 500.0, 20.0
#: Seconds of the outage; `make bench ARGS=outage` takes the ten minutes.
SHORT_OUTAGE = 60.0
LONG_OUTAGE = 600.0
FLUSH_SECONDS = 1.0
#: Seconds after an outage until which the tables have to be equal.
CAUGHT_UP_SECONDS = 180.0
EMPTIED = (
    "guilds, users, members, roles, channels, threads, sync_runs, changes, user_changes, member_events, member_stats, "
    "ops.counted_messages, ops.positions"
)


class Client:
    """A client in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, line: str) -> dict[str, Any]:
        """Send a line and return the figures that come back."""
        self.send(line)
        return await self.answered()

    def send(self, line: str) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    async def answered(self) -> dict[str, Any]:
        """Return the figures of the next answer."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            figures: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return figures


@asynccontextmanager
async def client(way: str, simulator: SimulatorProcess, *arguments: str) -> AsyncIterator[Client]:
    """Run a client until it is ready; end it after the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.live_client", way, simulator.api_base, simulator.gateway_url, simulator.token,
        *arguments, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**26,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        async with asyncio.timeout(120):
            line = await process.stdout.readline()
        if line != b"ready\n":
            raise RuntimeError(f"benchmarks.live_client {way} did not become ready")
        yield Client(process)
        process.stdin.close()
        async with asyncio.timeout(60):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _burst(way: str, simulator: SimulatorProcess, *arguments: str) -> dict[str, Any]:
    async with client(way, simulator, *arguments) as running:
        running.send(f"expect {BURST}")
        await simulator.call("traffic.burst", BURST)
        return await running.answered()


async def _all_counted(database: Pool, told: int) -> None:
    counted = await database.fetchval("SELECT coalesce(sum(message_count), 0)::bigint FROM member_stats")
    if counted != told:
        raise RuntimeError(f"{told} messages were told and {counted} counted: the time measured is not worth anything")


async def _throughput(database: Pool) -> list[Row]:
    dsn = database.target.libpq_url()
    runs: dict[str, list[dict[str, Any]]] = {"default": [], "bare": [], "outage": [], "always": []}
    async with SimulatorProcess("--guild", "5000", "--no-limits", "--present", call_timeout=PATIENCE) as simulator:
        for _ in range(ROUNDS):
            for way in ("default", "bare"):
                runs[way].append(await _burst(way, simulator))
            for mode in ("outage", "always"):
                await database.execute(f"TRUNCATE {EMPTIED}")
                runs[mode].append(await _burst("mirror", simulator, dsn, mode))
                await _all_counted(database, BURST)

    def median(way: str, figure: str) -> float:
        return statistics.median(float(run[figure]) for run in runs[way])

    cpu = {way: median(way, "cpu") / BURST * 1e6 for way in runs}
    bare, kept, always = (median(way, "seconds") for way in ("bare", "outage", "always"))
    return [
        Row("live, events a second: the mirror against a no-op listener", bare / kept, "≥", 0.8),
        Row("the same with SPOOL=always", bare / always),
        Row("the first of these against Python's default collector settings", median("default", "seconds") / kept),
        Row("events a second with the no-op listener", BURST / bare, unit=" /s"),
        Row("CPU time of the client's process for an event, no-op listener", cpu["bare"], unit=" µs"),
        Row("the same with the mirror", cpu["outage"], unit=" µs"),
    ]  # fmt: skip


async def _latency(database: Pool) -> list[Row]:
    await database.execute(f"TRUNCATE {EMPTIED}")
    dsn = database.target.libpq_url()
    async with (
        SimulatorProcess("--guild", "5000", "--no-limits", "--present") as simulator,
        client("mirror", simulator, dsn, "outage") as running,
    ):
        await running.ask("time")
        await simulator.call("traffic.start", RATE)
        await asyncio.sleep(TIMED_SECONDS)
        await simulator.call("traffic.stop")
        await asyncio.sleep(2 * FLUSH_SECONDS)
        took = (await running.ask("time"))["took"]  # what is not committed by now counts with its age
    return [
        Row(
            f"from event to commit at {RATE:g} events/s, half of them, against FLUSH_SECONDS",
            took[len(took) // 2] / FLUSH_SECONDS,
        ),
        Row("the same, 99 % of them", took[int(len(took) * 0.99)] / FLUSH_SECONDS, "≤", 2.0),
    ]


async def _memory(database: Pool) -> list[Row]:
    await database.execute(f"TRUNCATE {EMPTIED}")
    grown = {}
    for way, arguments in (("bare", ()), ("mirror", (database.target.libpq_url(), "outage"))):
        async with (
            SimulatorProcess("--guild", "5000", "--no-limits", "--present", call_timeout=PATIENCE) as simulator,
            client(way, simulator, *arguments) as running,
        ):
            samples = []
            for _ in range(MILLION // WARM):
                running.send(f"expect {WARM}")
                await simulator.call("traffic.burst", WARM)
                samples.append((await running.answered())["memory"])
        grown[way] = samples[-1] - samples[0]
    return [
        Row(f"memory after {MILLION:,} events against {WARM:,}", grown["mirror"], "≤", FLAT_MB, " MB"),
        Row("the same of discord.py with a no-op listener", grown["bare"], unit=" MB"),
    ]


async def outage(seconds: float) -> list[Row]:
    """Stop a database for so long while events go on, and start it again."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-outage-"))
    server = EmbeddedServer(directory)
    await server.start()
    try:
        await migrations.upgrade(server.target())
        dsn = server.target().libpq_url()
        async with (
            SimulatorProcess("--guild", "20000", "--no-limits", "--present", call_timeout=PATIENCE) as simulator,
            client("mirror", simulator, dsn, "outage") as running,
        ):
            await simulator.call("traffic.start", RATE)
            await asyncio.sleep(10)
            before = (await running.ask("sample"))["memory"]
            await server.stop(force=True)
            await asyncio.sleep(seconds)
            during = await running.ask("sample")
            await server.start()
            await simulator.call("traffic.stop")
            told = (await simulator.call("world.ledger.since"))["messages"]
            wrong, different = await _caught_up(server, simulator, told)
            after = await running.ask("sample")
            resumes, identifies = await simulator.call("gateway.resumes"), await simulator.call("gateway.identifies")
    finally:
        await server.stop(force=True)
        shutil.rmtree(directory, ignore_errors=True)
    name = f"{seconds:g} s without a database at {RATE:g} events/s"
    return [
        Row(f"{name}: memory growth at its peak", during["peak"] - before, "≤", 50, " MB"),
        Row(f"{name}: the same while it catches up", after["peak"] - before, "≤", 50, " MB"),
        Row(f"{name}: connections to the gateway that were lost", resumes + identifies - 1, "≤", 0),
        Row(f"{name}: messages lost or doubled, of {len(told):,}", wrong, "≤", 0),
        Row(f"{name}: rows that differ from Discord's afterwards", different, "≤", 0),
        Row(f"{name}: rows dropped for want of memory, which a reconcile restored", after["dropped"]),
    ]


async def _caught_up(server: EmbeddedServer, simulator: SimulatorProcess, told: list[list[int]]) -> tuple[int, int]:
    """Wait until tables and counts agree with what was told; return by how many messages and rows they do not."""
    expected = Counter((guild, user) for _, guild, user in told)
    shown = {table: await simulator.rows(table) for table in TABLES}
    database = Pool(server.target(), pool_max=1)
    await database.connect()
    ends_at = time.monotonic() + CAUGHT_UP_SECONDS
    while True:
        await asyncio.sleep(2 * FLUSH_SECONDS)
        rows = await database.fetch("SELECT guild_id, user_id, message_count FROM member_stats")
        counted = Counter({(row["guild_id"], row["user_id"]): row["message_count"] for row in rows})
        wrong = sum(abs(expected[key] - counted[key]) for key in expected.keys() | counted.keys())
        different = 0
        if wrong == 0:
            different = sum([(await compare(database, table, shown[table])).differences for table in TABLES])
        if (wrong == 0 and different == 0) or time.monotonic() > ends_at:
            break
    await database.close()
    return wrong, different


async def measure(database: Pool) -> list[Row]:
    """Measure the live path; the outage in its short form."""
    rows = await _throughput(database)
    rows += await _latency(database)
    rows += await _memory(database)
    seconds = float(os.environ.get("GUILDBOOK_OUTAGE_SECONDS", SHORT_OUTAGE))
    return rows + await outage(seconds)


async def measure_outage(database: Pool) -> list[Row]:
    """Measure ten minutes without a database."""
    return await outage(LONG_OUTAGE)

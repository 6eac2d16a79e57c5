"""The live path: events a second against a listener that does nothing, time to the commit, memory, and an outage."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, ratio
from simulator.remote import SimulatorProcess
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.compare import TABLES, compare
from utils.operations import migrations

ROOT = Path(__file__).parent.parent
CLIENT_SECONDS = 1_800.0
#: Messages in one round: so many that the last commit, for which the clock waits as well, is a small part of the time.
BURST = 200_000
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
        async with asyncio.timeout(CLIENT_SECONDS):
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


async def _check_counts(pool: Pool, sent: int) -> None:
    counted = await pool.fetchval("SELECT coalesce(sum(message_count), 0)::bigint FROM member_stats")
    if counted != sent:
        raise RuntimeError(f"{sent} messages were sent but {counted} counted: the measured time is meaningless")


async def _throughput(pool: Pool, rounds: int) -> list[Figure]:
    dsn = pool.target.libpq_url()
    runs: dict[str, list[dict[str, Any]]] = {"default": [], "bare": [], "outage": [], "always": []}
    names = list(runs)
    async with SimulatorProcess(
        "--guild", "5000", "--no-limits", "--present", call_timeout=CLIENT_SECONDS
    ) as simulator:
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                if name in ("default", "bare"):
                    runs[name].append(await _burst(name, simulator))
                    continue
                await pool.execute(f"TRUNCATE {EMPTIED}")
                runs[name].append(await _burst("mirror", simulator, dsn, name))
                await _check_counts(pool, BURST)

    def of(name: str, figure: str) -> list[float]:
        return [float(run[figure]) for run in runs[name]]

    def micro(name: str) -> list[float]:
        return [value / BURST * 1e6 for value in of(name, "cpu")]

    bare, mirrored, always = (of(name, "seconds") for name in ("bare", "outage", "always"))
    return [
        ratio("live, events a second: the mirror against a no-op listener", bare, mirrored, "≥", 0.8),
        ratio("the same with SPOOL=always", bare, always),
        ratio("the first of these against Python's default collector settings", of("default", "seconds"), mirrored),
        ratio(
            "live, processor time an event: the mirror against a no-op listener", of("outage", "cpu"), of("bare", "cpu")
        ),
        Figure("events a second with the no-op listener", [BURST / value for value in bare], unit=" /s"),
        Figure("CPU time of the client's process for an event, no-op listener", micro("bare"), unit=" µs"),
        Figure("the same with the mirror", micro("outage"), unit=" µs"),
    ]


async def _latency(pool: Pool) -> list[Figure]:
    await pool.execute(f"TRUNCATE {EMPTIED}")
    dsn = pool.target.libpq_url()
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
        Figure(
            f"from event to commit at {RATE:g} events/s, half of them, against FLUSH_SECONDS",
            (took[len(took) // 2] / FLUSH_SECONDS,),
        ),
        Figure("the same, 99 % of them", (took[int(len(took) * 0.99)] / FLUSH_SECONDS,), "≤", 2.0),
    ]


async def _memory(pool: Pool) -> list[Figure]:
    await pool.execute(f"TRUNCATE {EMPTIED}")
    grown = {}
    for way, arguments in (("bare", ()), ("mirror", (pool.target.libpq_url(), "outage"))):
        async with (
            SimulatorProcess("--guild", "5000", "--no-limits", "--present", call_timeout=CLIENT_SECONDS) as simulator,
            client(way, simulator, *arguments) as running,
        ):
            samples = []
            for _ in range(MILLION // WARM):
                running.send(f"expect {WARM}")
                await simulator.call("traffic.burst", WARM)
                samples.append((await running.answered())["memory"])
        grown[way] = samples[-1] - samples[0]
    return [
        Figure(f"memory after {MILLION:,} events against {WARM:,}", (grown["mirror"],), "≤", FLAT_MB, " MB"),
        Figure("the same of discord.py with a no-op listener", (grown["bare"],), unit=" MB"),
    ]


async def outage(seconds: float) -> list[Figure]:
    """Stop a database for so long while events go on, and start it again."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-outage-"))
    server = EmbeddedServer(directory)
    await server.start()
    try:
        await migrations.upgrade(server.target())
        dsn = server.target().libpq_url()
        async with (
            SimulatorProcess("--guild", "20000", "--no-limits", "--present", call_timeout=CLIENT_SECONDS) as simulator,
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
        Figure(f"{name}: memory growth at its peak", (during["peak"] - before,), "≤", 50, " MB"),
        Figure(f"{name}: the same while it catches up", (after["peak"] - before,), "≤", 50, " MB"),
        Figure(f"{name}: connections to the gateway that were lost", (resumes + identifies - 1,), "≤", 0),
        Figure(f"{name}: messages lost or doubled, of {len(told):,}", (wrong,), "≤", 0),
        Figure(f"{name}: rows that differ from Discord's afterwards", (different,), "≤", 0),
        Figure(f"{name}: rows dropped for want of memory, which a reconcile restored", (after["dropped"],)),
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


async def measure(pool: Pool, *, rounds: int = 5) -> list[Figure]:
    """Measure the live path, with a short outage."""
    figures = await _throughput(pool, rounds)
    figures += await _latency(pool)
    figures += await _memory(pool)
    return figures + await outage(SHORT_OUTAGE)


async def measure_outage(pool: Pool, *, rounds: int = 1) -> list[Figure]:
    """Measure ten minutes without a database."""
    return await outage(LONG_OUTAGE)

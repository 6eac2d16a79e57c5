"""End to end over the wire: from the op 8 request to the commit, against bare discord.py's `guild.chunk()`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, ratio
from simulator.remote import SimulatorProcess
from utils.database import Pool

ROOT = Path(__file__).parent.parent
#: How long one client may take, in seconds.
CLIENT_SECONDS = 300.0
#: How long the database is stopped for the memory measurement, from before the client starts.
STOPPED_SECONDS = 6.0
#: Tables that a run begins with empty.
EMPTIED = "guilds, users, members, roles, channels, threads, sync_runs, changes, user_changes"


async def _client(way: str, simulator: SimulatorProcess, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.client", way, simulator.api_base, simulator.gateway_url, simulator.token,
        *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(CLIENT_SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise RuntimeError(f"benchmarks.client {way} ended with {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


async def _mirror(pool: Pool, simulator: SimulatorProcess) -> dict[str, Any]:
    await pool.execute(f"TRUNCATE {EMPTIED}")
    return await _client("mirror", simulator, pool.target.libpq_url())


async def _mirror_with_stopped_database(pool: Pool, simulator: SimulatorProcess) -> dict[str, Any]:
    """Mirror while the database is locked: back-pressure must reach the gateway, or memory would hold it all."""

    async def stop() -> None:
        async with pool.transaction() as connection:
            await connection.execute("LOCK TABLE users IN EXCLUSIVE MODE")
            await asyncio.sleep(STOPPED_SECONDS)

    await pool.execute(f"TRUNCATE {EMPTIED}")
    lock = asyncio.create_task(stop())
    figures = await _client("mirror", simulator, pool.target.libpq_url())
    await lock
    return figures


async def measure(pool: Pool, *, rounds: int = 5) -> list[Figure]:
    """Run both ways in turn beside one simulator, then the mirror alone on larger, on slower and on many guilds."""
    runs: dict[str, list[dict[str, Any]]] = {"bare": [], "settled": [], "mirror": []}
    async with SimulatorProcess("--seed", "1", "--guild", "100000", "--no-limits") as simulator:
        names = list(runs)
        for turn in range(rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                run = _mirror(pool, simulator) if name == "mirror" else _client(name, simulator)
                runs[name].append(await run)
        stopped = await _mirror_with_stopped_database(pool, simulator)
    async with SimulatorProcess("--seed", "1", "--guild", "400000", "--no-limits") as simulator:
        large = await _mirror(pool, simulator)
    paced_at = ("--seed", "1", "--guild", "100000", "--no-limits", "--pages-per-second", "20")
    async with SimulatorProcess(*paced_at) as simulator:
        paced = await _mirror(pool, simulator)
    async with SimulatorProcess("--seed", "1", "--guilds", "1000x200") as simulator:
        fleet = await _mirror(pool, simulator)

    def of(name: str, figure: str) -> list[float]:
        return [float(run[figure]) for run in runs[name]]

    chunk, settled = of("bare", "seconds"), of("settled", "seconds")
    first, again = of("mirror", "first_seconds"), of("mirror", "again_seconds")
    memory = of("mirror", "megabytes")
    stalls = [max(pair) for pair in zip(of("mirror", "first_stall"), of("mirror", "again_stall"), strict=True)]
    paced_stall = max(paced["first_stall"], paced["again_stall"]) * 1e3
    return [
        ratio("over the wire, nothing changed: time against `guild.chunk()`", again, chunk, "≤", 0.95),
        ratio("over the wire, first sync: time against `guild.chunk()`", first, chunk, "≤", 1.1),
        ratio("the first of these, with the mirror's collector settings on both sides", again, settled),
        ratio("the second, likewise", first, settled),
        ratio("over the wire, first sync: processor time of the client against `guild.chunk()`'s",
              of("mirror", "first_cpu"), of("bare", "cpu")),
        Figure("memory growth at 100,000 members", memory, "≤", 60, " MB"),
        Figure("the same while the database takes nothing for seconds", (stopped["megabytes"],), "≤", 60, " MB"),
        Figure("memory growth at 400,000 members against that", (large["megabytes"] / max(memory),), "≤", 1.5),
        ratio("longest loop stall against `guild.chunk()`'s", stalls, of("bare", "stall"), "≤", 1.0),
        Figure("longest loop stall at 20 pages a second", (paced_stall,), "≤", 50, " ms"),
        Figure("1,000 guilds × 200 members ready, under Discord's limits", (fleet["ready_seconds"],), "≤", 60, " s"),
    ]  # fmt: skip

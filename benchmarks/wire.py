"""End to end over the wire: from the op 8 request to the commit, against bare discord.py's `guild.chunk()`."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import Row
from simulator.remote import SimulatorProcess
from utils.database import Pool

ROOT = Path(__file__).parent.parent
#: Nothing may take longer than this, in seconds.
PATIENCE = 300.0
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
        async with asyncio.timeout(PATIENCE):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise RuntimeError(f"benchmarks.client {way} ended with {process.returncode}")
    figures: dict[str, Any] = json.loads(output)
    return figures


async def _mirror(database: Pool, simulator: SimulatorProcess) -> dict[str, Any]:
    await database.execute(f"TRUNCATE {EMPTIED}")
    return await _client("mirror", simulator, database.target.libpq_url())


async def _mirror_with_stopped_database(database: Pool, simulator: SimulatorProcess) -> dict[str, Any]:
    """Mirror while nothing can be written for a time: the gateway has to be made to wait, not memory to hold it all."""

    async def stop() -> None:
        async with database.transaction() as connection:
            await connection.execute("LOCK TABLE users IN EXCLUSIVE MODE")
            await asyncio.sleep(STOPPED_SECONDS)

    await database.execute(f"TRUNCATE {EMPTIED}")
    stopped = asyncio.create_task(stop())
    figures = await _client("mirror", simulator, database.target.libpq_url())
    await stopped
    return figures


async def measure(database: Pool, rounds: int = 3) -> list[Row]:
    """Run both ways in turn beside one simulator, then the mirror alone on larger, on slower and on many guilds."""
    bare: list[dict[str, Any]] = []
    settled: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    async with SimulatorProcess("--seed", "1", "--guild", "100000", "--no-limits") as simulator:
        for _ in range(rounds):
            bare.append(await _client("bare", simulator))
            settled.append(await _client("settled", simulator))
            kept.append(await _mirror(database, simulator))
        stopped = await _mirror_with_stopped_database(database, simulator)
    async with SimulatorProcess("--seed", "1", "--guild", "400000", "--no-limits") as simulator:
        large = await _mirror(database, simulator)
    paced_at = ("--seed", "1", "--guild", "100000", "--no-limits", "--pages-per-second", "20")
    async with SimulatorProcess(*paced_at) as simulator:
        paced = await _mirror(database, simulator)
    async with SimulatorProcess("--seed", "1", "--guilds", "1000x200") as simulator:
        fleet = await _mirror(database, simulator)

    def median(runs: list[dict[str, Any]], figure: str) -> float:
        return statistics.median(float(run[figure]) for run in runs)

    chunk = median(bare, "seconds")
    memory = max(run["megabytes"] for run in kept)
    stall = max(median(kept, "first_stall"), median(kept, "again_stall"))
    again, first = median(kept, "again_seconds") / chunk, median(kept, "first_seconds") / chunk
    same_collector = median(settled, "seconds")
    paced_stall = max(paced["first_stall"], paced["again_stall"]) * 1e3
    return [
        Row("over the wire, nothing changed: time against `guild.chunk()`", again, "≤", 0.95),
        Row("over the wire, first sync: time against `guild.chunk()`", first, "≤", 1.1),
        Row("the first of these, with the mirror's collector settings on both sides", again * chunk / same_collector),
        Row("the second, likewise", first * chunk / same_collector),
        Row("memory growth at 100,000 members", memory, "≤", 60, " MB"),
        Row("the same while the database takes nothing for seconds", stopped["megabytes"], "≤", 60, " MB"),
        Row("memory growth at 400,000 members against that", large["megabytes"] / memory, "≤", 1.5),
        Row("longest loop stall against `guild.chunk()`'s", stall / median(bare, "stall"), "≤", 1.0),
        Row("longest loop stall at 20 pages a second", paced_stall, "≤", 50, " ms"),
        Row("1,000 guilds × 200 members ready, under Discord's limits", fleet["ready_seconds"], "≤", 60, " s"),
    ]

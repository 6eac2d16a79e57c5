"""`make soak ARGS=--backups`: random histories of backups, prunes, losses, clocks, kills and stores that fail."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from tests.operations.backup.histories import run_history

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "soak-backups.md"
REPORT_EVERY = 100


async def soak_backups(histories: int, seed: int, *, only: int | None = None, results: Path | None = RESULTS) -> int:
    """Run random histories, write a summary to `results`, and return the exit code.

    `only`: the number of the one history to run, to repeat a failure.
    """
    print(f"seed {seed}: {histories} histories of two bots that share a store of backups", flush=True)
    logging.disable(logging.CRITICAL)
    started_at = time.monotonic()
    steps: Counter[str] = Counter()
    failures = 0
    numbers = range(histories) if only is None else (only,)
    for done, number in enumerate(numbers, 1):
        try:
            steps.update(
                step.split()[1] for step in await run_history(random.Random(f"{seed} {number}").getrandbits(32))
            )
        except AssertionError as error:
            failures += 1
            print(f"history {number} (repeat: --backups --seed {seed} --only {number}): {error}", flush=True)
        if done % REPORT_EVERY == 0:
            print(f"{done} histories, {failures} wrong, {time.monotonic() - started_at:.0f} s", flush=True)
    seconds = time.monotonic() - started_at
    print(f"{len(numbers)} histories in {seconds:.0f} s: {failures} wrong", flush=True)
    if results is not None and only is None:
        await asyncio.to_thread(results.write_text, _summary(seed, seconds, len(numbers), failures, steps))
    return 1 if failures else 0


def _summary(seed: int, seconds: float, histories: int, failures: int, steps: Counter[str]) -> str:
    names = sorted(steps)
    return (
        "# Soak of backups\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, `make soak ARGS=--backups` with seed {seed}: {seconds:.0f} s. In each history"
        " two bots share a store, half of the time with databases of the same address. They make backups and delete old"
        " ones, while the store refuses uploads or is away, databases are emptied and restored, clocks jump, disks are"
        " lost and processes are killed. After each step the newest good backup of each database, and the last one"
        " before a drop that nobody accepted, must still be wherever they were; a restore of `latest` must bring the"
        " newest good one of its own database that the stores have.\n\n"
        f"| histories | {' | '.join(names)} | nothing lost, nothing confused |\n"
        f"| {' | '.join(['---'] * (len(names) + 2))} |\n"
        f"| {histories:,} | {' | '.join(f'{steps[name]:,}' for name in names)} | {histories - failures:,} |\n"
    )

"""`make soak ARGS=--restores`: random histories of snapshots, restores, drops and restarts, compared with the world."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import stamina

from tests.conftest import TEMPLATE, make_template
from tests.mirror.restoring import Droppable, History, count_steps, droppable, find_differences, random_history
from utils.database.embedded import EmbeddedServer

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "soak-restores.md"
#: Histories between two lines of progress.
REPORT_EVERY = 10
#: Loggers of what the histories break on purpose.
_NOISY = ("asyncio", "asyncpg", "discord", "utils")


@dataclass(frozen=True, slots=True)
class Failure:
    """A history after which the database differed from the world."""

    number: int
    history: History
    wrong: list[str]


async def soak_restores(
    histories: int,
    seed: int,
    *,
    only: int | None = None,
    minutes: float | None = None,
    version: int = 18,
    results: Path | None = RESULTS,
) -> int:
    """Run random histories, write a summary to `results`, and return the exit code.

    Parameters
    ----------
    only: the number of the one history to run, to repeat a failure.
    minutes: start no further history after this time.
    version: PostgreSQL's major version.
    """
    print(f"seed {seed}: {histories} histories of snapshots, restores, drops and restarts", flush=True)
    stamina.instrumentation.set_on_retry_hooks([])
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    directory = Path(tempfile.mkdtemp(prefix="guildbook-soak-"))
    server = EmbeddedServer(directory, version, durable=False)
    started_at = time.monotonic()
    totals: Counter[str] = Counter()
    failures: list[Failure] = []
    try:
        await server.start()
        await make_template(server)
        async with droppable(server, TEMPLATE) as database:
            for number in range(histories) if only is None else (only,):
                if minutes is not None and time.monotonic() - started_at > minutes * 60:
                    break
                history = random_history(random.Random(f"{seed} {number}"))
                wrong = await _run(database, history)
                totals.update(histories=1, steps=len(history.steps), **count_steps(history))
                if wrong:
                    failures.append(Failure(number, history, wrong))
                    print(f"history {number} (repeat: --seed {seed} --only {number}): {'; '.join(wrong[:5])}")
                    print(f"  {history}", flush=True)
                if totals["histories"] % REPORT_EVERY == 0:
                    seconds = time.monotonic() - started_at
                    print(f"{seconds:5.0f} s  {_summary(totals)}; {len(failures)} failed", flush=True)
    finally:
        await server.stop(force=True)
        shutil.rmtree(directory, ignore_errors=True)
    text = report(totals, failures, seed=seed, seconds=time.monotonic() - started_at)
    print(f"\n{text}")
    if results is not None and only is None:
        await asyncio.to_thread(results.write_text, text)
    return 1 if failures or not totals else 0


async def _run(database: Droppable, history: History) -> list[str]:
    try:
        return await find_differences(database, history)
    except TimeoutError as error:
        return ["did not come to rest in time", *getattr(error, "__notes__", ())]
    except Exception as error:
        logging.getLogger(__name__).exception("the history raised an error")
        return [f"raised {error!r}"]


def _summary(totals: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in totals.items())


def report(totals: Counter[str], failures: list[Failure], *, seed: int, seconds: float) -> str:
    """Return the result as a Markdown page."""
    equal = totals["histories"] - len(failures)
    lines = [
        "# Soak of restores",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, `make soak ARGS=--restores` with seed {seed}: {seconds:.0f} s. Each history"
        " runs a bot with a spool against a simulator, while its database is set back to snapshots of any age, emptied,"
        " dropped and created anew with and without tables, and the bot is stopped, killed and started. After each one"
        " every row is compared with the simulator's world.",
        "",
        "| histories | steps | snapshots | restores | drops | restarts | equal to the world |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| {totals['histories']:,} | {totals['steps']:,} | {totals['snapshots']:,} | {totals['restores']:,}"
        f" | {totals['drops']:,} | {totals['restarts']:,} | {equal:,} |",
    ]
    if failures:
        lines += ["", "| history | afterwards |", "| --- | --- |"]
        lines += [f"| {failure.number} | {'; '.join(failure.wrong[:5])} |" for failure in failures]
    return "\n".join(lines) + "\n"

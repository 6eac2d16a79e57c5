"""`make soak`: inject every fault for a long time and kill the bot 200 times, under 500 events per second.

With `--restores`: random histories of snapshots, restores, drops and restarts instead. With `--backups`: those of two
bots that share a store of backups.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.faults.backups import soak_backups
from tests.faults.faults import FAULTS
from tests.faults.restores import soak_restores
from tests.faults.rig import RATE, Rig, running_rig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "soak.md"
DEFAULT_MINUTES = 10.0
#: Kills between two verifications.
KILLS_PER_ROUND = 20
#: Maximum seconds between a bot's start and its kill. Its start takes about half of that.
MAX_LIFE_SECONDS = 2.4
#: Faults that `kill_repeatedly` covers.
KILLS = ("kill -9 of the bot", "kill -9 of the bot at random times")
#: Seconds reserved for stopping everything.
CLEANUP_SECONDS = 20.0
#: On a slow machine the soak may take this many times the given minutes to inject every fault and every kill.
MAX_OVERRUN = 2.0


@dataclass(slots=True)
class Outcome:
    """The result of one fault or one round of kills."""

    name: str
    seconds: float
    messages: int
    moves: int
    wrong: list[str]

    def row(self) -> str:
        """Return a row of the Markdown table."""
        result = "equal, nothing lost, nothing duplicated" if not self.wrong else "; ".join(self.wrong)
        return f"| {self.name} | {self.seconds:.0f} s | {self.messages:,} | {self.moves:,} | {result} |"


async def kill_repeatedly(rig: Rig, rng: random.Random, kills: int, max_life: float) -> str:
    """Kill the bot at random times, also during its start, and return a description for the table."""
    delays = [rng.uniform(0.05, max_life) for _ in range(kills)]
    for delay in delays:
        await asyncio.sleep(delay)
        rig.mark_offline()
        if (await rig.bot.get("/readyz"))[0] == 200:
            await rig.mark_online()
            rig.mark_offline()
        await rig.bot.kill()
        await rig.record_journaled_messages()
        await rig.bot.start()
    await rig.bot.wait_until_ready()
    await rig.mark_online()
    return f"{kills} × kill -9 of the bot, {min(delays):.2f} to {max(delays):.2f} s after its start"


async def soak(
    minutes: float,
    seed: int,
    kills: int,
    *,
    kills_per_round: int = KILLS_PER_ROUND,
    max_life: float = MAX_LIFE_SECONDS,
    results: Path = RESULTS,
) -> int:
    """Run the soak, write its table to `results`, and return the exit code."""
    rng = random.Random(seed)
    pending = [name for name in FAULTS if name not in KILLS]
    rng.shuffle(pending)
    print(f"seed {seed}: {minutes:g} minutes, {kills} kills, {RATE:g} events per second", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="guildbook-soak-"))
    started_at = time.monotonic()
    ends_at = started_at + minutes * 60 - CLEANUP_SECONDS
    deadline = started_at + minutes * 60 * MAX_OVERRUN
    outcomes: list[Outcome] = []
    killed = 0
    try:
        async with running_rig(directory, seed) as rig:
            await rig.start(rig.new_bot())
            while not any(outcome.wrong for outcome in outcomes) and (
                time.monotonic() < ends_at or ((pending or killed < kills) and time.monotonic() < deadline)
            ):
                fault_started_at = time.monotonic()
                await rig.start_traffic()
                await asyncio.sleep(1.0)
                if killed < kills and (len(outcomes) % 2 == 0 or not pending):
                    count = min(kills_per_round, kills - killed)
                    name = await kill_repeatedly(rig, rng, count, max_life)
                    killed += count
                else:
                    name = pending.pop(0) if pending else rng.choice([it for it in FAULTS if it not in KILLS])
                    await FAULTS[name].inject(rig, FAULTS[name].long)
                wrong = await rig.verify()
                seconds = time.monotonic() - fault_started_at
                outcomes.append(Outcome(name, seconds, len(rig.audit.messages), len(rig.audit.moves), wrong))
                print(f"{time.monotonic() - started_at:4.0f} s  {outcomes[-1].row()}", flush=True)
                if wrong:
                    print(rig.log_tail(), flush=True)
            takeovers = rig.takeovers
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    text = report(outcomes, takeovers, seed=seed, kills=killed, seconds=time.monotonic() - started_at, pending=pending)
    print(f"\n{text}")
    await asyncio.to_thread(results.write_text, text)
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


def report(
    outcomes: list[Outcome], takeovers: list[float], *, seed: int, kills: int, seconds: float, pending: list[str]
) -> str:
    """Return the result as a Markdown page."""
    lines = [
        "# Soak",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, `make soak` with seed {seed}: {seconds:.0f} s, {kills} kills at random times,"
        f" {RATE:g} events per second. Messages and moves (joins, leaves, bans) are totals so far.",
        "",
        "| fault | duration | messages | moves | result |",
        "| --- | --- | --- | --- | --- |",
        *(outcome.row() for outcome in outcomes),
        "",
    ]
    if takeovers:
        lines.append(
            f"Takeovers: {len(takeovers)}, the slowest {max(takeovers):.1f} s. Writes by a former holder: none."
        )
    if pending:
        lines.append(f"Not run for lack of time: {', '.join(pending)}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run the soak."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=", description=__doc__)
    parser.add_argument("--minutes", type=float, default=None, help="default: 10, with --restores no limit")
    parser.add_argument("--seed", type=int, default=None, help="default: random; printed at the start")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--max-life", type=float, default=MAX_LIFE_SECONDS, help="maximum seconds from start to kill")
    parser.add_argument("--restores", action="store_true", help="run histories of restores instead of faults")
    parser.add_argument("--backups", action="store_true", help="run histories of backups instead of faults")
    parser.add_argument(
        "--histories", type=int, default=None, help="how many, default: 500 with --restores, 1,000 with --backups"
    )
    parser.add_argument("--only", type=int, default=None, help="with --seed: the number of one history")
    parser.add_argument("--pg", type=int, choices=(16, 18), default=18, help="with --restores: PostgreSQL's version")
    arguments = parser.parse_args()
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # stopping the server makes it log errors
    seed = random.SystemRandom().randrange(1, 100_000) if arguments.seed is None else arguments.seed
    if arguments.backups:
        work = soak_backups(arguments.histories or 1_000, seed, only=arguments.only)
    elif arguments.restores:
        work = soak_restores(
            arguments.histories or 500, seed, only=arguments.only, minutes=arguments.minutes, version=arguments.pg
        )
    else:
        minutes = DEFAULT_MINUTES if arguments.minutes is None else arguments.minutes
        work = soak(minutes, seed, arguments.kills, max_life=arguments.max_life)
    sys.exit(asyncio.run(work))


if __name__ == "__main__":
    main()

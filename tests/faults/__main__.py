"""`make soak`: the fault matrix in its long form, and 200 kills at random moments, at 500 events a second."""

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

from tests.faults.matrix import FAULTS
from tests.faults.rig import RATE, Rig, rigged

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "soak.md"
#: Kills between two verdicts.
CAMPAIGN = 20
#: Longest life of a bot that is to be killed, in seconds: start-up takes about half of it.
LIFE_SECONDS = 2.4
#: Names of faults that are kills of their own.
KILLS = ("kill -9 of the bot", "kill -9 of the bot at random moments")
#: Seconds kept back for the end.
KEPT_BACK = 20.0
#: Times the minutes that it may take for every fault and every kill to have had its turn: machines differ.
LONGEST = 2.0


@dataclass(slots=True)
class Outcome:
    """What one fault, or one campaign of kills, came to."""

    name: str
    seconds: float
    messages: int
    moves: int
    wrong: list[str]

    def row(self) -> str:
        """Return it as a row of the table."""
        verdict = "equal, nothing lost, nothing doubled" if not self.wrong else "; ".join(self.wrong)
        return f"| {self.name} | {self.seconds:.0f} s | {self.messages:,} | {self.moves:,} | {verdict} |"


async def kill_again_and_again(rig: Rig, chance: random.Random, kills: int) -> str:
    """Kill the bot at random moments of its life, start-up included; return how that is called."""
    moments = [chance.uniform(0.05, LIFE_SECONDS) for _ in range(kills)]
    for moment in moments:
        await asyncio.sleep(moment)
        rig.fell_silent()
        if (await rig.bot.get("/readyz"))[0] == 200:
            await rig.hears()
            rig.fell_silent()
        await rig.bot.kill()
        await rig.keep_what_is_on_disk()
        await rig.bot.start()
    await rig.bot.until_ready()
    await rig.hears()
    return f"{kills} × kill -9 of the bot, {min(moments):.2f} to {max(moments):.2f} s after its start"


async def soak(minutes: float, seed: int, kills: int) -> int:
    """Run it; return the exit code."""
    chance = random.Random(seed)
    others = [name for name in FAULTS if name not in KILLS]
    chance.shuffle(others)
    print(f"seed {seed}: {minutes:g} minutes, {kills} kills, {RATE:g} events a second", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="guildbook-soak-"))
    begun = time.monotonic()
    ends_at = begun + minutes * 60 - KEPT_BACK
    gives_up_at = begun + minutes * 60 * LONGEST
    outcomes: list[Outcome] = []
    done = 0
    try:
        async with rigged(directory, seed) as rig:
            await rig.start(rig.new_bot())
            while not any(outcome.wrong for outcome in outcomes) and (
                time.monotonic() < ends_at or ((others or done < kills) and time.monotonic() < gives_up_at)
            ):
                started = time.monotonic()
                await rig.begin()
                await asyncio.sleep(1.0)
                if done < kills and (len(outcomes) % 2 == 0 or not others):
                    name = await kill_again_and_again(rig, chance, min(CAMPAIGN, kills - done))
                    done += CAMPAIGN
                else:
                    name = others.pop(0) if others else chance.choice([it for it in FAULTS if it not in KILLS])
                    fault, _, seconds = FAULTS[name]
                    await fault(rig, seconds)
                wrong = await rig.verdict()
                books = rig.books
                outcome = Outcome(name, time.monotonic() - started, len(books.messages), len(books.moves), wrong)
                outcomes.append(outcome)
                print(f"{time.monotonic() - begun:4.0f} s  {outcome.row()}", flush=True)
                if wrong:
                    print(rig.last_words(), flush=True)
            takeovers = rig.takeovers
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report(outcomes, takeovers, seed=seed, kills=min(done, kills), seconds=time.monotonic() - begun, left=others)
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


def report(
    outcomes: list[Outcome], takeovers: list[float], *, seed: int, kills: int, seconds: float, left: list[str]
) -> None:
    """Print the table and write it beside the benchmarks' results."""
    lines = [
        "# Soak",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, `make soak` with seed {seed}: {seconds:.0f} s, {kills} kills at random moments,"
        f" {RATE:g} events a second (told so far: messages, and joins, leaves and bans).",
        "",
        "| fault | lasted | messages | moves | afterwards |",
        "| --- | --- | --- | --- | --- |",
        *(outcome.row() for outcome in outcomes),
        "",
    ]
    if takeovers:
        lines.append(f"Takeovers: {len(takeovers)}, the slowest {max(takeovers):.1f} s. Rows of a former holder: none.")
    if left:
        lines.append(f"Not run, for want of time: {', '.join(left)}.")
    text = "\n".join(lines) + "\n"
    print(f"\n{text}")
    RESULTS.write_text(text)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make soak ARGS=", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, without")
    parser.add_argument("--kills", type=int, default=200)
    given = parser.parse_args()
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # what it cannot reach is stopped on purpose
    seed = random.SystemRandom().randrange(1, 100_000) if given.seed is None else given.seed
    sys.exit(asyncio.run(soak(given.minutes, seed, given.kills)))


if __name__ == "__main__":
    main()

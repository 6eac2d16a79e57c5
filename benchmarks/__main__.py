"""`make bench`: measures every part on an embedded server and writes the tables under results/."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from benchmarks import backup, framework, live, merge, versions, wire
from benchmarks.figures import Figure, Verdict, table
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.operations import migrations

RESULTS = Path(__file__).parent / "results"
#: What ends the process when a bound is missed, and when the spread is too wide to judge one.
MISSED, UNCLEAR = 1, 3


class Part(Protocol):
    """Measures one subject."""

    async def __call__(self, pool: Pool, *, rounds: int = ...) -> list[Figure]:
        """Return its figures after so many rounds."""


PARTS: dict[str, Part] = {
    "merge": merge.measure,
    "wire": wire.measure,
    "live": live.measure,
    "framework": framework.measure,
    "backup": backup.measure,
    "outage": live.measure_outage,
}
#: Measured unless the arguments name others: "backup" and "outage" take minutes.
USUAL = ("merge", "wire", "live", "framework")
#: The tables under results/: file name, title, and the parts that it consists of.
TABLES = {
    "foundation": ("Foundation", ["merge", "wire"]),
    "live": ("The live path", ["live"]),
    "framework": ("The framework", ["framework"]),
    "backup": ("Backups", ["backup"]),
    "outage": ("Ten minutes without a database", ["outage"]),
}


async def run(names: Sequence[str], rounds: int | None) -> int:
    """Measure the parts, print and write their tables, and return the exit code."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-bench-"))
    server = EmbeddedServer(directory)
    await server.start()
    try:
        await migrations.upgrade(server.target())
        pool = Pool(server.target())
        await pool.connect()
        figures: dict[str, list[Figure]] = {}
        for name in names:
            figures[name] = await (PARTS[name](pool) if rounds is None else PARTS[name](pool, rounds=rounds))
            print(table(figures[name]), flush=True)
        machine = _machine(pool)
        await pool.close()
    finally:
        await server.stop(force=True)
    RESULTS.mkdir(exist_ok=True)
    for file, (title, parts) in TABLES.items():
        if all(part in figures for part in parts):
            rows = [figure for part in parts for figure in figures[part]]
            (RESULTS / f"{file}.md").write_text(f"# {title}\n\n{machine}\n\n{table(rows)}\n")
    every = [figure for part in figures.values() for figure in part]
    print(f"\n{machine}\n\n{table(every)}")
    return _exit_code(every)


def _exit_code(figures: Sequence[Figure]) -> int:
    verdicts = {figure.verdict for figure in figures}
    if Verdict.UNCLEAR in verdicts:
        print("\nSome figures spread too widely to be judged. Measure again with more rounds (--rounds N), alone.")
    return MISSED if Verdict.MISSED in verdicts else UNCLEAR if Verdict.UNCLEAR in verdicts else 0


def _machine(pool: Pool) -> str:
    server = pool.server_version_num
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), "
        f"Python {platform.python_version()}, PostgreSQL {server // 10_000}.{server % 10_000} (embedded, default "
        f"settings), discord.py {version('discord.py')}, asyncpg {version('asyncpg')}, "
        f"SQLAlchemy {version('sqlalchemy')}. Both sides of a ratio run in every round, in turn; the median is judged."
    )


def main() -> None:
    """Measure what the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Guildbook.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: {' '.join(USUAL)}"
    )
    parser.add_argument("--rounds", type=int, help="rounds of each part (default: each part's own)")
    parser.add_argument("--against", metavar="REVISION", help="compare with another version, both run in turn")
    parser.add_argument("--runs", type=int, default=5, help="runs of each version, with --against")
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown part: {', '.join(unknown)}; choose from {', '.join(PARTS)}")
    parts = options.parts or USUAL
    if options.against:
        figures = asyncio.run(versions.measure_against(options.against, parts, options.runs))
        print(f"Figures of this version over those of {options.against}\n\n{table(figures)}")
        sys.exit(_exit_code(figures))
    sys.exit(asyncio.run(run(parts, options.rounds)))


if __name__ == "__main__":
    main()

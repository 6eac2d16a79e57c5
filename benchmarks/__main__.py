"""`make bench`: measures everything on an embedded server and writes the table under results/."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import merge, wire
from benchmarks.report import Row, table
from utils import migrations
from utils.database import Database
from utils.database.embedded import EmbeddedServer

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[Database], Awaitable[list[Row]]]] = {"merge": merge.measure, "wire": wire.measure}


def _machine(database: Database) -> str:
    server = database.server_version_num
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), "
        f"Python {platform.python_version()}, PostgreSQL {server // 10_000}.{server % 10_000} (embedded, default "
        f"settings), discord.py {version('discord.py')}, asyncpg {version('asyncpg')}, "
        f"SQLAlchemy {version('sqlalchemy')}. Ratios within one run; medians where a run has several rounds."
    )


async def run(names: list[str]) -> int:
    """Measure the parts named (all without names), print and write the table; 1 when a bound is not kept."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-bench-"))
    server = EmbeddedServer(directory)
    await server.start()
    try:
        await migrations.upgrade(server.target())
        database = Database(server.target())
        await database.connect()
        rows: list[Row] = []
        for name in names or PARTS:
            rows += await PARTS[name](database)
            print(table(rows), flush=True)
        text = f"{_machine(database)}\n\n{table(rows)}\n"
        await database.close()
    finally:
        await server.stop(force=True)
    if not names:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "foundation.md").write_text(f"# Foundation\n\n{text}")
    print(f"\n{text}")
    return 0 if all(row.holds for row in rows) else 1


def main() -> None:
    """Run what the arguments name."""
    names = sys.argv[1:]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"no benchmark called {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    sys.exit(asyncio.run(run(names)))


if __name__ == "__main__":
    main()

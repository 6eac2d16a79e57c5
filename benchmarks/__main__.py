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

from benchmarks import backup, framework, live, merge, wire
from benchmarks.report import Row, table
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.operations import migrations

RESULTS = Path(__file__).parent / "results"
PARTS: dict[str, Callable[[Pool], Awaitable[list[Row]]]] = {
    "merge": merge.measure,
    "wire": wire.measure,
    "live": live.measure,
    "framework": framework.measure,
    "backup": backup.measure,
    "outage": live.measure_outage,
}
#: Parts that are measured together, and the name and title of their table; "outage" and "backup", which take minutes,
#: are asked for by name.
TABLES = {
    "foundation": ("Foundation", ["merge", "wire"]),
    "live": ("The live path", ["live"]),
    "framework": ("The framework", ["framework"]),
    "backup": ("Backups", ["backup"]),
    "outage": ("Ten minutes without a database", ["outage"]),
}


def _machine(database: Pool) -> str:
    server = database.server_version_num
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}, {platform.system()}), "
        f"Python {platform.python_version()}, PostgreSQL {server // 10_000}.{server % 10_000} (embedded, default "
        f"settings), discord.py {version('discord.py')}, asyncpg {version('asyncpg')}, "
        f"SQLAlchemy {version('sqlalchemy')}. Ratios within one run; medians where a run has several rounds."
    )


async def run(names: list[str]) -> int:
    """Measure the parts named (none: those of every run), print and write the tables; 1 when a bound is not kept."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-bench-"))
    server = EmbeddedServer(directory)
    await server.start()
    try:
        await migrations.upgrade(server.target())
        database = Pool(server.target())
        await database.connect()
        figures: dict[str, list[Row]] = {}
        for name in names or ("merge", "wire", "live", "framework"):
            figures[name] = await PARTS[name](database)
            print(table(figures[name]), flush=True)
        machine = _machine(database)
        await database.close()
    finally:
        await server.stop(force=True)
    RESULTS.mkdir(exist_ok=True)
    for file, (title, parts) in TABLES.items():
        if all(part in figures for part in parts):
            rows = [row for part in parts for row in figures[part]]
            (RESULTS / f"{file}.md").write_text(f"# {title}\n\n{machine}\n\n{table(rows)}\n")
    print(f"\n{machine}\n\n{table([row for rows in figures.values() for row in rows])}")
    return 0 if all(row.holds for rows in figures.values() for row in rows) else 1


def main() -> None:
    """Run what the arguments name."""
    names = sys.argv[1:]
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"no benchmark called {', '.join(unknown)}: choose of {', '.join(PARTS)}")
    sys.exit(asyncio.run(run(names)))


if __name__ == "__main__":
    main()

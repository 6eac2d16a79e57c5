"""For `make lint`: `python -m utils.operations.migrations check`, `lint` and `sql`; no database is needed.

check: start a throwaway server (`--pg 16`, 18 or all), go up, down and up again, and compare with the models.
lint:  hand the SQL of all revisions to squawk.
sql:   print that SQL.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import asyncpg

from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError
from utils.operations import migrations
from utils.operations.migrations import schema_catalog


async def check(version: int) -> list[str]:
    """Return what is wrong with the migrations on a server of one major, one line each."""
    directory = Path(tempfile.mkdtemp(prefix="guildbook-check-"))
    server = EmbeddedServer(directory, version, database="migrated", durable=False)
    try:
        await server.start()
        target, wanted = server.target(), server.target("wanted")
        connection = await asyncpg.connect(**server.target("postgres").connect_kwargs(), timeout=10)
        await connection.execute("CREATE DATABASE wanted")
        await connection.close(timeout=5)
        await migrations.upgrade(target)
        first = await schema_catalog.read(target)
        await migrations.downgrade(target, "base")
        lines = [f"left behind by downgrade: {name}" for name in sorted(await schema_catalog.read(target))]
        await migrations.upgrade(target)
        lines += [
            f"after downgrade and upgrade: {line}"
            for line in schema_catalog.differences(await schema_catalog.read(target), first)
        ]
        lines += await migrations.check_drift(target)
        await schema_catalog.build_from_models(wanted)
        return lines + schema_catalog.differences(first, await schema_catalog.read(wanted))
    finally:
        await server.stop(force=True)
        shutil.rmtree(directory, ignore_errors=True)


def lint() -> int:
    """Run squawk on the SQL of all revisions; return its exit code."""
    beside = Path(sys.executable).parent / "squawk"
    squawk = str(beside) if beside.exists() else shutil.which("squawk")
    if squawk is None:
        print("squawk is not installed: make setup", file=sys.stderr)
        return 2
    command = [squawk, "--config", str(migrations.SCRIPTS / "squawk.toml"), "--stdin-filepath", "migrations.sql"]
    return subprocess.run(command, input=migrations.offline_sql(), text=True, check=False, timeout=120).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; return the exit code: 0 when all is well."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.operations.migrations", description="Check the schema's revisions."
    )
    parser.add_argument("command", choices=("check", "lint", "sql"))
    parser.add_argument("--pg", choices=("16", "18", "all"), default="18", help="PostgreSQL's major, for check")
    given = parser.parse_args(arguments)
    try:
        if given.command == "sql":
            print(migrations.offline_sql())
            return 0
        if given.command == "lint":
            return lint()
        lines = [
            f"PostgreSQL {version}: {line}"
            for version in ((16, 18) if given.pg == "all" else (int(given.pg),))
            for line in asyncio.run(check(version))
        ]
    except GuildbookError as exc:
        print(exc, file=sys.stderr)
        return 2
    print("\n".join(lines) or "the migrations make what the models say")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

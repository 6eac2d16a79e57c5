"""`python -m utils.operations.migrations`: `check`, `lint` and `sql` for `make lint`, `revision` for `make migration`.

check: start a temporary server (`--pg 16`, 18 or all); upgrade, downgrade, upgrade again, and compare with the models.
lint:  run squawk on the SQL of all revisions.
sql:   print that SQL.
revision: upgrade the development database, compare it with the models, and write a revision that makes it match them;
       nothing if it does already. `--empty`: write one without statements, for changes of rows.

Only `revision` uses the database of the settings.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import asyncpg

from models.people import ROLE_MEMBERSHIP
from utils.database.address import open_target
from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError
from utils.operations import migrations
from utils.operations.migrations import schema_catalog
from utils.operations.migrations.revisions import UPGRADE
from utils.operations.migrations.writing import find_failing, write_revision
from utils.settings import load_settings


async def check(version: int, *, role_membership: str = ROLE_MEMBERSHIP) -> list[str]:
    """Check the migrations on a server of one major version; return one line for each problem.

    `role_membership`: the SQL of the models' view.
    """
    directory = Path(tempfile.mkdtemp(prefix="guildbook-check-"))
    server = EmbeddedServer(directory, version, database="migrated", durable=False)
    try:
        await server.start()
        migrated, modelled = server.target(), server.target("modelled")
        connection = await asyncpg.connect(**server.target("postgres").connect_kwargs(), timeout=10)
        await connection.execute("CREATE DATABASE modelled")
        await connection.close(timeout=5)
        await migrations.upgrade(migrated)
        first = await schema_catalog.read(migrated)
        await migrations.downgrade(migrated, "base")
        lines = [f"left behind by downgrade: {name}" for name in sorted(await schema_catalog.read(migrated))]
        await migrations.upgrade(migrated)
        lines += [
            f"after downgrade and upgrade: {line}"
            for line in schema_catalog.differences(await schema_catalog.read(migrated), first)
        ]
        lines += await migrations.check_drift(migrated)
        await schema_catalog.build_from_models(modelled, role_membership=role_membership)
        return lines + schema_catalog.differences(first, await schema_catalog.read(modelled))
    finally:
        await server.stop(force=True)
        shutil.rmtree(directory, ignore_errors=True)


async def _write_revision_of_settings(message: str, *, is_empty: bool) -> Path | None:
    settings = load_settings()
    async with open_target(settings.direct_target, settings.data_dir, schema=settings.db_schema) as target:
        return await write_revision(target, message, is_empty=is_empty, auto_migrate=settings.auto_migrate)


def _write_and_report(message: str, *, is_empty: bool) -> None:
    path = asyncio.run(_write_revision_of_settings(message, is_empty=is_empty))
    if path is None:
        print(
            "the database is as the models say: no revision was written (for one that changes rows: make migration"
            f" m={shlex.quote(message)} ARGS=--empty)"
        )
        return
    print(f"wrote {path}: read it, then run {UPGRADE}")
    for statement in find_failing(path):
        print(f"it fails on a table that has rows, for want of a default: {statement}", file=sys.stderr)


def lint(sql: str) -> int:
    """Run squawk on SQL; return its exit code."""
    installed = Path(sys.executable).parent / "squawk"
    squawk = str(installed) if installed.exists() else shutil.which("squawk")
    if squawk is None:
        print("squawk is not installed: make setup", file=sys.stderr)
        return 2
    command = [squawk, "--config", str(migrations.SCRIPTS / "squawk.toml"), "--stdin-filepath", "migrations.sql"]
    return subprocess.run(command, input=sql, text=True, check=False, timeout=120).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.operations.migrations", description="Check the schema's revisions."
    )
    parser.add_argument("command", choices=("check", "lint", "sql", "revision"))
    parser.add_argument("message", nargs="?", help="What the revision does, for revision")
    parser.add_argument("--empty", action="store_true", help="Write a revision without statements, for revision")
    parser.add_argument("--pg", choices=("16", "18", "all"), default="18", help="PostgreSQL's major version, for check")
    given = parser.parse_args(arguments)
    try:
        if given.command == "sql":
            print(migrations.offline_sql())
            return 0
        if given.command == "revision":
            if not given.message:
                parser.error('revision needs a message: make migration m="what it does"')
            _write_and_report(given.message, is_empty=given.empty)
            return 0
        if given.command == "lint":
            return lint(migrations.offline_sql())
        lines = [
            f"PostgreSQL {version}: {line}"
            for version in ((16, 18) if given.pg == "all" else (int(given.pg),))
            for line in asyncio.run(check(version))
        ]
    except GuildbookError as exc:
        print(exc, file=sys.stderr)
        return 2
    print("\n".join(lines) or "the migrations match the models")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

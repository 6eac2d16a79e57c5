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
import contextlib
import io
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.operations.ops import MigrationScript
from alembic.util import CommandError

from models.people import ROLE_MEMBERSHIP
from utils.database import ConnectTarget
from utils.database.address import open_target
from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError, MigrationError
from utils.operations import migrations
from utils.operations.migrations import schema_catalog
from utils.operations.migrations.comparison import import_models
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions, MigrationRun
from utils.operations.migrations.history import ALEMBIC
from utils.operations.migrations.revisions import UPGRADE, Revisions, alembic_config
from utils.operations.migrations.statements import parse
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


async def _upgrade_base(target: ConnectTarget, options: MigrationOptions, *, auto_migrate: bool) -> None:
    base = replace(options, scripts=options.base)
    if auto_migrate and await migrations.pending(target, options=base):
        await migrations.upgrade(target, respect_pause=True, by=ALEMBIC, options=base)


async def write_revision(
    target: ConnectTarget,
    message: str,
    *,
    is_empty: bool = False,
    auto_migrate: bool = True,
    options: MigrationOptions = DEFAULTS,
) -> Path | None:
    """Upgrade the development database and write a revision for what the models have beyond it; return the file.

    Returns None, and writes nothing, if the models have nothing beyond it. `is_empty`: compare nothing, and write a
    revision without statements. Raises `MigrationError` where revisions need a merge first, or may not be applied.
    """
    import_models()
    revisions = migrations.Revisions(options.scripts)
    if revisions.pack is not None:  # its tables may refer to Guildbook's newest
        (revisions.pack.scripts / "versions").mkdir(parents=True, exist_ok=True)
        await _upgrade_base(target, options, auto_migrate=auto_migrate)
    if len(revisions.heads) > 1:
        raise MigrationError(revisions.merge_advice())
    if missing := await migrations.pending(target, options=options):
        if not auto_migrate:
            raise MigrationError(
                f"AUTO_MIGRATE is off, and the database lacks revision {', '.join(missing)}: run python bot.py db"
                " upgrade, then try again"
            )
        paused = (await migrations.upgrade(target, respect_pause=True, by=ALEMBIC, options=options)).paused
        if paused is not None:
            raise MigrationError(f"AUTO_MIGRATE is paused: {paused}; run python bot.py db upgrade, then try again")
    config = _writing_config(options.scripts)
    config.attributes["run"] = MigrationRun(target=target, options=options, by=ALEMBIC)
    try:
        # Alembic prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            written = await asyncio.to_thread(
                command.revision,
                config,
                message,
                autogenerate=not is_empty,
                rev_id=revisions.next_id(),
                version_path=_version_path(revisions),
                process_revision_directives=None if is_empty else _discard_empty,
            )
    except CommandError as exc:
        raise MigrationError(f"could not write the revision: {exc}") from exc
    scripts = written if isinstance(written, list) else [written]
    return next((Path(script.path) for script in scripts if script is not None), None)


def _writing_config(scripts: Path) -> Config:
    """Return the configuration for writing revisions into a directory: with its template and its hooks."""
    config = Config(str(migrations.SCRIPTS.parent / "alembic.ini"), stdout=io.StringIO())
    for option in ("script_location", "version_locations"):
        value = alembic_config(scripts).get_main_option(option)
        if value is not None:
            config.set_main_option(option, value.replace("%", "%%"))
    return config


def _version_path(revisions: Revisions) -> str | None:
    return None if revisions.pack is None else str(revisions.pack.scripts / "versions")


def write_merge(message: str, scripts: Path = migrations.SCRIPTS) -> Path:
    """Write a revision that merges the heads of a directory; return the file.

    Raises `MigrationError` if there is one head only.
    """
    revisions = Revisions(scripts)
    if len(revisions.heads) < 2:
        raise MigrationError(f"there is one head, {', '.join(revisions.heads) or 'none'}: nothing to merge")
    with contextlib.redirect_stdout(io.StringIO()):  # Alembic prints what it does
        written = command.merge(
            _writing_config(scripts), list(revisions.heads), message=message, rev_id=revisions.merge_id()
        )
    assert written is not None, "there are heads to merge"
    return Path(written.path)


def _discard_empty(context: Any, revision: Any, directives: list[MigrationScript]) -> None:
    """Keep Alembic from writing a revision that does nothing."""
    if all(script.upgrade_ops is None or script.upgrade_ops.is_empty() for script in directives):
        directives.clear()


def find_failing(path: Path, options: MigrationOptions = DEFAULTS) -> list[str]:
    """Return the statements of a revision that fail on a table with rows."""
    revisions = Revisions(options.scripts)
    (revision,) = [id for id in revisions.ids if revisions.files([id]) == [path]]
    parents = revisions.parents(revision)
    sql = migrations.offline_sql(revision, current=parents, options=options)
    return [statement.title for statement in parse(sql) if statement.is_failing]


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

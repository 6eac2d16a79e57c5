"""`python bot.py db …`: the schema, statistics, maintenance, psql, and made-up data."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from utils.cli.common import (
    AsJson,
    DataDir,
    ask,
    confirm,
    is_terminal,
    parse_path,
    print_outcome,
    run_action,
    run_with_pool,
)
from utils.database import Pool
from utils.database.address import open_target
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError, GuildbookError, ValidationError
from utils.operations.action import Outcome, Progress
from utils.settings import Settings, load_settings

app = typer.Typer(help="The database: schema, statistics, maintenance, psql, made-up data.")

Revision = Annotated[str | None, typer.Argument(help="A revision such as 0002; the newest by default.")]

NoBackup = Annotated[bool, typer.Option("--no-backup", help="Make no backup first.")]

# --- the schema


@app.command("status")
def status(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Show the current revision, pending ones, and drift from the models; exit code 1 when there are any."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.status(pool, progress=progress)

    run_action("db status", action, data_dir=data_dir, as_json=as_json)


@app.command("history")
def history(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the revisions, oldest first, with when and by whom each was applied."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.history(pool, progress=progress)

    run_action("db history", action, data_dir=data_dir, as_json=as_json)


@app.command("preview")
def preview(
    revision: Revision = None,
    down: Annotated[bool, typer.Option("--down", help="A downgrade; by one revision by default.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="PATH", help="The file; by default one here, named for the revisions."),
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Write the SQL of an upgrade or a downgrade to a file, with what it locks, rewrites or drops; run nothing."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations.preview import preview

        outcome = await preview(pool, revision, down=down, progress=progress)
        if outcome.file is None:
            return outcome
        path = out or Path(outcome.file[0])
        try:
            await asyncio.to_thread(path.write_text, outcome.file[1], encoding="utf-8")
        except OSError as exc:
            raise GuildbookError(f"could not write {path}: {exc.strerror}; choose another file with --out") from exc
        return replace(outcome, text=f"{outcome.text}\nwrote {path}", data={**outcome.data, "file": str(path)})

    arguments = {"revision": revision, "down": down}
    run_action("db preview", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


@app.command("upgrade")
def upgrade(
    revision: Revision = None, no_backup: NoBackup = False, as_json: AsJson = False, data_dir: DataDir = None
) -> None:
    """Apply the pending revisions, or those up to a revision; after a backup if one of them destroys rows."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup import recovery
        from utils.operations.backup.catalog import BackupCatalog
        from utils.operations.backup.create import backup_before
        from utils.operations.migrations import admin

        await recovery.require_no_hold(pool, BackupCatalog(settings))
        backup = None if no_backup else backup_before("before upgrade", settings, pool, progress)
        return await admin.upgrade(pool, revision, backup=backup, progress=progress)

    arguments = {"revision": revision, "backup": not no_backup}
    run_action("db upgrade", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


@app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="A revision, or base to remove the schema.")],
    yes_destroy: Annotated[
        str | None, typer.Option("--yes-destroy", metavar="NAME", help="The database's name, instead of being asked.")
    ] = None,
    no_backup: NoBackup = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Revert revisions, after a backup; AUTO_MIGRATE is then paused until the next upgrade."""
    name = yes_destroy or _ask_for_name(load_settings(), data_dir, revision)

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations import migrations
        from utils.operations.backup.create import backup_before
        from utils.operations.migrations import admin

        if name is None:
            return Outcome(f"the schema is at {await migrations.current(pool)} already: nothing to do")
        actual = await pool.fetchval("SELECT current_database()")
        if name != actual:
            raise ValidationError(f"the database at {pool.target} is named {actual}, not {name}: nothing was changed")
        backup = None if no_backup else backup_before("before downgrade", settings, pool, progress)
        return await admin.downgrade(pool, revision, backup=backup, progress=progress)

    arguments = {"revision": revision, "backup": not no_backup}
    run_action("db downgrade", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


def _ask_for_name(settings: Settings, data_dir: Path | None, revision: str) -> str | None:
    """Show what a downgrade destroys and return the name that the operator types; None if there is nothing to do.

    Raises `ValidationError` without a terminal.
    """
    from utils.operations.migrations import admin

    otherwise = (
        "a downgrade destroys data and must be confirmed, but standard input is not a terminal: look at the SQL with"
        f" python bot.py db preview {revision} --down, then pass the database's name as --yes-destroy NAME"
    )

    async def look(pool: Pool) -> tuple[Outcome | None, str]:
        return await admin.plan_downgrade(pool, revision), await pool.fetchval("SELECT current_database()")

    plan, name = run_with_pool(settings, data_dir, look)
    if plan is None:
        return None
    if not is_terminal(sys.stdin):
        raise ValidationError(otherwise)
    typer.echo(plan.text, err=True)
    return ask(f"Type the database's name ({name}) to continue:", otherwise=otherwise)


@app.command("stamp")
def stamp(
    revision: Annotated[str, typer.Argument(help="A revision, or head.")],
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Record that the schema is at a revision, after checking that it is."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.stamp(pool, revision, progress=progress)

    run_action("db stamp", action, data_dir=data_dir, as_json=as_json, arguments={"revision": revision})


@app.command("begin-anew")
def begin_anew(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Create the schema in an empty database of which a backup is known, so that the bot fills it from Discord."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup import recovery

        return await recovery.begin_anew(pool, progress=progress)

    run_action("db begin-anew", action, data_dir=data_dir, as_json=as_json)


@app.command("adopt")
def adopt(
    application_id: Annotated[int, typer.Argument(help="The id of the application, as the refused start shows it.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Give the database to another application; refused while a bot runs.

    Guilds that the application is not in count as left from its first start on.
    """

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.upkeep import adopt

        return await adopt.adopt(pool, application_id)

    if not yes:
        confirm(
            f"Guilds that application {application_id} is not in will count as left. Give it the database?",
            otherwise="guilds that the application is not in will count as left: confirm with --yes",
        )
    arguments = {"application_id": application_id}
    run_action("db adopt", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


# --- the data


@app.command("stats")
def stats(
    picture: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="PATH", help="Write a chart to this PNG file.")
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show table sizes, their growth, and the server's activity."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup.catalog import BackupCatalog
        from utils.operations.backup.catalog.keeping import list_with_problems
        from utils.operations.upkeep.picture import draw
        from utils.operations.upkeep.statistics import collect, outcome

        backups, problems = await list_with_problems(await BackupCatalog(settings).serving(pool))
        statistics = await collect(pool, backups=backups, problems=problems)
        if picture is not None:
            chart = await draw(statistics)
            try:
                await asyncio.to_thread(picture.write_bytes, chart)
            except OSError as exc:
                raise GuildbookError(
                    f"could not write {picture}: {exc.strerror}; choose another file with --picture"
                ) from exc
        return outcome(statistics)

    run_action("db stats", action, data_dir=data_dir, as_json=as_json)


@app.command("maintain")
def maintain(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only list what would be done.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Analyze tables, rebuild bloated indexes, refresh views, create partitions."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.upkeep import maintain as upkeep

        return await (upkeep.maintain(pool, progress=progress) if yes else upkeep.preview(pool))

    run_action("db maintain", action, data_dir=data_dir, as_json=as_json, arguments={"yes": yes})


@app.command("describe")
def describe(
    table: Annotated[str | None, typer.Argument(help="One table; all by default.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show tables, columns, keys, indexes and sizes."""
    from utils.operations.upkeep import describe

    tables = run_with_pool(load_settings(), data_dir, lambda pool: describe.describe(pool, table))
    if not as_json and is_terminal(sys.stdout):
        from rich.console import Console

        Console().print(describe.pretty(tables))
        return
    print_outcome(Outcome(describe.plain(tables), {"tables": tables}), as_json=as_json)


@app.command("psql", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context, data_dir: DataDir = None) -> None:
    """Open psql on the database; further arguments go to psql."""
    raise typer.Exit(_run_psql(load_settings().with_data_dir(data_dir), context.args))


def _run_psql(settings: Settings, arguments: Sequence[str]) -> int:
    """Run psql on the database and return its exit code. Raises `DatabaseError` when there is none."""
    server = EmbeddedServer(settings.data_dir)
    target = settings.direct_target
    if target is not None:
        program = shutil.which("psql") or str(server.psql)
        command = [program, target.libpq_url(), *arguments]
        timeout = str(max(2, math.ceil(settings.db_connect_timeout)))  # libpq knows whole seconds, from 2
        os.execve(program, command, {"PGCONNECT_TIMEOUT": timeout, **os.environ, **target.libpq_environment()})
    if not server.has_data:
        raise DatabaseError(f"there is no database under {server.data_dir} yet: make run or make demo creates one")

    async def run() -> int:
        async with open_target(None, settings.data_dir, schema=settings.db_schema) as embedded:
            # Ctrl-C is for psql, which cancels its query. The child does not inherit a handler, but would SIG_IGN.
            previous = signal.signal(signal.SIGINT, lambda *_: None)
            try:
                process = await asyncio.create_subprocess_exec(str(server.psql), embedded.libpq_url(), *arguments)
                return await process.wait()
            finally:
                signal.signal(signal.SIGINT, previous)

    return asyncio.run(run())


@app.command("seed")
def seed(
    guilds: Annotated[int, typer.Option(min=1)] = 3,
    members: Annotated[int, typer.Option(min=1, help="Members of each guild.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same number produces the same data.")] = 0,
    more: Annotated[bool, typer.Option("--more", help="Add to existing guilds.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Fill an empty database with made-up guilds, to develop cogs against."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup import recovery
        from utils.operations.backup.catalog import BackupCatalog
        from utils.operations.development import seed as development

        await recovery.require_no_hold(pool, BackupCatalog(settings))
        written = await development.seed(pool, guilds=guilds, members=members, seed=seed, more=more)
        text = ", ".join(f"{table} {rows:,}" for table, rows in written.items())
        return Outcome(f"rows written: {text}", {"rows": written})

    arguments = {"guilds": guilds, "members": members, "seed": seed, "more": more}
    run_action("db seed", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


@app.command("reset")
def reset(
    yes_destroy: Annotated[
        str | None,
        typer.Option("--yes-destroy", metavar="NAME", help="The database's name, unless ENVIRONMENT=development."),
    ] = None,
    no_backup: NoBackup = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Drop and recreate every table of Guildbook's, after a backup; refused while a bot runs.

    No backup is made of a database that is empty, or has only what db seed wrote.
    """

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup.create import backup_before
        from utils.operations.development import seed as development

        backup = None if no_backup else backup_before("before reset", settings, pool, progress)
        done = await development.reset(pool, name=yes_destroy, environment=settings.environment, backup=backup)
        return Outcome(done.line, {"database": done.database, "backup": done.backup})

    arguments = {"backup": not no_backup}
    run_action("db reset", action, data_dir=data_dir, as_json=as_json, arguments=arguments)

"""`python bot.py db …`: the schema, psql, and what developers do to a database."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from utils.cli import shell
from utils.cli.common import AsJson, DataDir, act, plain_errors
from utils.database import Pool
from utils.exceptions import GuildbookError
from utils.operations.action import Outcome, Progress
from utils.settings import Settings, load_settings

app = typer.Typer(help="The database: schema, psql, and made-up data.", no_args_is_help=True)


Revision = Annotated[str | None, typer.Argument(help="A revision, like 0002; without it the newest.")]


@app.command("status")
def status(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Say which revision the database is at, what waits, and what differs; exit code 1 when anything does."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.status(database, progress=progress)

    act("db status", work, data_dir=data_dir, as_json=as_json)


@app.command("history")
def history(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the revisions, oldest first: which are applied, and when, where that is known."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.history(database, progress=progress)

    act("db history", work, data_dir=data_dir, as_json=as_json)


@app.command("preview")
def preview(
    revision: Revision = None,
    down: Annotated[bool, typer.Option("--down", help="Of a downgrade; without a revision, one step.")] = False,
    out: Annotated[Path | None, typer.Option(help="The file; without it one here that says what it is.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Write the SQL of an upgrade or a downgrade into a file, with what it locks, rewrites or drops; run nothing."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations.preview import preview

        outcome = await preview(database, revision, down=down, progress=progress)
        if outcome.file is None:
            return outcome
        path = out or Path(outcome.file[0])
        try:
            await asyncio.to_thread(path.write_text, outcome.file[1], encoding="utf-8")
        except OSError as exc:
            raise GuildbookError(f"{path} cannot be written: {exc.strerror}; choose another with --out") from exc
        return replace(outcome, text=f"{outcome.text}\nwrote {path}", data={**outcome.data, "file": str(path)})

    act("db preview", work, data_dir=data_dir, as_json=as_json, arguments={"revision": revision, "down": down})


@app.command("upgrade")
def upgrade(revision: Revision = None, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Bring the schema up to date, or to a revision."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.upgrade(database, revision, progress=progress)

    act("db upgrade", work, data_dir=data_dir, as_json=as_json, arguments={"revision": revision})


@app.command("downgrade")
def downgrade(
    revision: Annotated[str, typer.Argument(help="Where to: a revision, or base for nothing at all.")],
    yes_destroy: Annotated[
        str | None, typer.Option("--yes-destroy", metavar="NAME", help="The database's name, instead of being asked.")
    ] = None,
    no_backup: Annotated[bool, typer.Option("--no-backup", help="Make no backup first.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Take the schema down, after a backup; AUTO_MIGRATE then stays off until the next upgrade."""
    with plain_errors(as_json=as_json):
        name = yes_destroy or _confirmed(load_settings(), data_dir, revision)

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        found = await database.fetchval("SELECT current_database()")
        if name != found:
            raise GuildbookError(f"the database at {database.target} is named {found}, not {name}: nothing was changed")
        backup = None if no_backup else _backup(settings, database, progress)
        return await admin.downgrade(database, revision, backup=backup, progress=progress)

    arguments = {"revision": revision, "backup": not no_backup}
    act("db downgrade", work, data_dir=data_dir, as_json=as_json, arguments=arguments)


def _confirmed(settings: Settings, data_dir: Path | None, revision: str) -> str:
    """Show what a downgrade takes away, return the name that is typed. Raises `GuildbookError` without a terminal."""
    from utils.operations.migrations.preview import preview

    if not sys.stdin.isatty():
        raise GuildbookError(
            "a downgrade drops tables with everything in them, and nobody is here to be asked: look at it with"
            f" python bot.py db preview {revision} --down, then say so with --yes-destroy and the database's name"
        )

    async def look(database: Pool) -> tuple[str, str]:
        outcome = await preview(database, revision, down=True)
        return outcome.text, await database.fetchval("SELECT current_database()")

    told, name = asyncio.run(shell.on_database(settings, data_dir, look))
    typer.echo(told, err=True)
    typed: str = typer.prompt(f"To go on, type the database's name ({name})", err=True)
    return typed.strip()


def _backup(settings: Settings, database: Pool, progress: Progress) -> Callable[[], Awaitable[str]]:
    """Return what makes a backup and says which."""

    async def make() -> str:
        from utils.operations.backup.kept import Kept

        return await Kept(settings).save(database, "before downgrade", progress)

    return make


@app.command("stamp")
def stamp(
    revision: Annotated[str, typer.Argument(help="A revision, or head.")],
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Write down that the schema is at a revision, if it is just that."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        from utils.operations.migrations import admin

        return await admin.stamp(database, revision, progress=progress)

    act("db stamp", work, data_dir=data_dir, as_json=as_json, arguments={"revision": revision})


@app.command("current")
def current(data_dir: DataDir = None) -> None:
    """Say which revision the database is at."""
    with plain_errors():
        typer.echo(asyncio.run(shell.current(load_settings(), data_dir)))


@app.command("check")
def check(data_dir: DataDir = None) -> None:
    """Compare the database's tables with the models; exit code 1 when they differ."""
    with plain_errors():
        lines = asyncio.run(shell.check(load_settings(), data_dir))
        typer.echo("\n".join(lines) or "the tables are what the models say")
        raise typer.Exit(1 if lines else 0)


@app.command("psql", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context, data_dir: DataDir = None) -> None:
    """Open psql on the database; further arguments go to psql."""
    with plain_errors():
        raise typer.Exit(shell.psql(load_settings(), data_dir, context.args))


@app.command("seed")
def seed(
    guilds: Annotated[int, typer.Option(min=1)] = 3,
    members: Annotated[int, typer.Option(min=1, help="Members of each guild.")] = 200,
    seed: Annotated[int, typer.Option(help="The same number gives the same people.")] = 0,
    more: Annotated[bool, typer.Option("--more", help="Add to guilds that are there.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Fill an empty database with made-up guilds, to write cogs against."""
    from utils.operations.development import seed as development

    with plain_errors():
        written = asyncio.run(
            shell.on_database(
                load_settings(),
                data_dir,
                lambda database: development.seed(database, guilds=guilds, members=members, seed=seed, more=more),
            )
        )
        typer.echo(", ".join(f"{rows:,} {table}" for table, rows in written.items()))


@app.command("reset")
def reset(
    yes_destroy: Annotated[
        str | None,
        typer.Option("--yes-destroy", metavar="NAME", help="The database's name, unless ENVIRONMENT=development."),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Drop every table of ours and make it anew; refused while a bot runs."""
    from utils.operations.development import seed as development

    with plain_errors():
        settings = load_settings()
        name = asyncio.run(
            shell.on_database(
                settings,
                data_dir,
                lambda database: development.reset(database, name=yes_destroy, environment=settings.environment),
            )
        )
        typer.echo(f"{name} is empty")


@app.command("describe")
def describe(
    table: Annotated[str | None, typer.Argument(help="One table; without it all of them.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Show tables, columns, keys, indexes and sizes."""
    from utils.operations.upkeep import describe

    with plain_errors():
        tables = asyncio.run(
            shell.on_database(load_settings(), data_dir, lambda database: describe.describe(database, table))
        )
        if as_json:
            typer.echo(json.dumps(tables, indent=2))
        elif sys.stdout.isatty():
            from rich.console import Console

            Console().print(describe.pretty(tables))
        else:
            typer.echo(describe.plain(tables))

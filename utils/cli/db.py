"""`python bot.py db …`: the schema, psql, and what developers do to a database."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer

from utils.cli import shell
from utils.cli.common import AsJson, DataDir, plain_errors
from utils.settings import load_settings

app = typer.Typer(help="The database: schema, psql, and made-up data.", no_args_is_help=True)


@app.command("upgrade")
def upgrade(data_dir: DataDir = None) -> None:
    """Bring the schema up to date."""
    with plain_errors():
        typer.echo(asyncio.run(shell.upgrade(load_settings(), data_dir)))


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
    from utils import development

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
    from utils import development

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
    from utils import describing

    with plain_errors():
        tables = asyncio.run(
            shell.on_database(load_settings(), data_dir, lambda database: describing.describe(database, table))
        )
        if as_json:
            typer.echo(json.dumps(tables, indent=2))
        elif sys.stdout.isatty():
            from rich.console import Console

            Console().print(describing.pretty(tables))
        else:
            typer.echo(describing.plain(tables))

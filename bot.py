"""Guildbook's command line: `python bot.py` runs the bot, its sub-commands are for operators."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from utils import shell
from utils.errors import GuildbookError, SettingsError, ValidationError
from utils.logs import hide
from utils.settings import DEVELOPER_PORTAL, Settings, load_settings

_log = logging.getLogger(__name__)

NO_TOKEN = (
    f"DISCORD_TOKEN: not set; get one at {DEVELOPER_PORTAL} > your application > Bot > Reset Token and put it into"
    " .env, or see Guildbook at work without one: make demo"
)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
db = typer.Typer(help="The database: schema and psql.", no_args_is_help=True)
app.add_typer(db, name="db")
new = typer.Typer(help="Begin something new.", no_args_is_help=True)
app.add_typer(new, name="new")

DataDir = Annotated[
    Path | None, typer.Option(help="Use the embedded server's data in this directory, whatever the settings say.")
]


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what goes wrong into lines for people and an exit code: 2 for settings, 1 for the rest."""
    try:
        yield
    except GuildbookError as exc:
        typer.echo(hide(str(exc)), err=True)
        raise typer.Exit(2 if isinstance(exc, SettingsError) else 1) from None


@app.callback(invoke_without_command=True)
def run(context: typer.Context) -> None:
    """Run the bot until SIGTERM or Ctrl-C; .env.example lists the settings."""
    if context.invoked_subcommand is not None:
        return
    with plain_errors():
        settings = load_settings()
        if settings.discord_token is None:
            raise SettingsError(NO_TOKEN)
        _run(settings)


def _run(settings: Settings) -> None:
    from utils import process  # loads discord.py, which takes its time

    try:
        process.run(settings)
    except GuildbookError:
        raise
    except Exception as exc:
        _log.critical("the bot was ended by an error that it does not know", exc_info=exc)
        raise typer.Exit(1) from None


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Go on until Ctrl-C, with a trickle of events.")] = False,
    data_dir: Annotated[Path, typer.Option(help="Where the demo's data goes; emptied first.")] = Path(".data/demo"),
) -> None:
    """Show the real bot at work on a simulated Discord, and prove every row."""
    from utils.demo import stage

    with plain_errors():
        raise typer.Exit(stage.run(data_dir, keep=keep))


@db.command("upgrade")
def upgrade(data_dir: DataDir = None) -> None:
    """Bring the schema up to date."""
    with plain_errors():
        typer.echo(asyncio.run(shell.upgrade(load_settings(), data_dir)))


@db.command("current")
def current(data_dir: DataDir = None) -> None:
    """Say which revision the database is at."""
    with plain_errors():
        typer.echo(asyncio.run(shell.current(load_settings(), data_dir)))


@db.command("check")
def check(data_dir: DataDir = None) -> None:
    """Compare the database's tables with the models; exit code 1 when they differ."""
    with plain_errors():
        lines = asyncio.run(shell.check(load_settings(), data_dir))
        typer.echo("\n".join(lines) or "the tables are what the models say")
        raise typer.Exit(1 if lines else 0)


@db.command("psql", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(context: typer.Context, data_dir: DataDir = None) -> None:
    """Open psql on the database; further arguments go to psql."""
    with plain_errors():
        raise typer.Exit(shell.psql(load_settings(), data_dir, context.args))


@db.command("seed")
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


@db.command("reset")
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


@db.command("describe")
def describe(
    table: Annotated[str | None, typer.Argument(help="One table; without it all of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
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


@new.command("cog")
def new_cog(name: Annotated[str, typer.Argument(help="Its short name: tally makes cogs/tally.py.")]) -> None:
    """Write a cog that works, its table and its test."""
    from utils import scaffold

    try:
        paths = scaffold.new_cog(name)
    except ValidationError as exc:
        typer.echo(str(exc), err=True)
        raise typer.Exit(2) from None
    typer.echo("\n".join(f"wrote {path}" for path in paths))
    typer.echo(f'next: make migration m="add {name}"')


if __name__ == "__main__":
    app()

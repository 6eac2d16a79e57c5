"""Guildbook's command line: `python bot.py` runs the bot, its sub-commands are for operators."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from utils import shell
from utils.errors import GuildbookError, SettingsError
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


if __name__ == "__main__":
    app()

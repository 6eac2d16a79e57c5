"""Guildbook's command line: `python bot.py` runs the bot, its sub-commands are for operators."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from utils.cli import backup, db, doctor, exporting, importing, pack
from utils.cli.common import AsJson, CommandGroup, RootCommand, parse_path, print_outcome
from utils.exceptions import GuildbookError, SettingsError
from utils.operations.action import Outcome
from utils.settings import DEVELOPER_PORTAL, Settings, load_settings

_log = logging.getLogger(__name__)

NO_TOKEN = (
    f"DISCORD_TOKEN: not set; get one at {DEVELOPER_PORTAL} > your application > Bot > Reset Token and put it into"
    " .env, or run make demo, which needs no token"
)

app = typer.Typer(cls=RootCommand, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(db.app, name="db", cls=CommandGroup)
app.add_typer(backup.app, name="backup", cls=CommandGroup)
app.add_typer(importing.app, name="import", cls=CommandGroup)
app.add_typer(exporting.app, name="export", cls=CommandGroup)
app.add_typer(pack.app, name="pack", cls=CommandGroup)
app.command("doctor")(doctor.doctor)
new = typer.Typer(help="Create files from a template.")
app.add_typer(new, name="new", cls=CommandGroup)


@app.callback(invoke_without_command=True)
def run(context: typer.Context) -> None:
    """Run the bot until SIGTERM or Ctrl-C; .env.example lists the settings."""
    if context.invoked_subcommand is not None:
        return
    settings = load_settings()
    if settings.discord_token is None:
        raise SettingsError(NO_TOKEN)
    _run(settings)


def _run(settings: Settings) -> None:
    from utils.bot import process  # here, because importing discord.py is slow

    try:
        process.run(settings)
    except GuildbookError:
        raise
    except Exception as exc:
        _log.critical("Unexpected error; shutting down", exc_info=exc)
        raise typer.Exit(1) from None


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Run until Ctrl-C, with two events per second.")] = False,
    as_json: AsJson = False,
    data_dir: Annotated[
        Path, typer.Option(parser=parse_path, metavar="PATH", help="Directory of the demo's data; emptied first.")
    ] = Path(".data/demo"),
) -> None:
    """Run the real bot against a simulated Discord and verify every row."""
    from utils.demo import runner

    outcome = runner.run(data_dir, keep=keep, reports_on_stderr=as_json)
    if not as_json:  # all has been said
        raise typer.Exit(outcome.exit_code or 0)
    print_outcome(outcome, as_json=True)


new.command("pack")(pack.new_pack)


@new.command("cog")
def new_cog(
    name: Annotated[str, typer.Argument(help="The short name: tally creates cogs/tally.py.")], as_json: AsJson = False
) -> None:
    """Write a working cog with a table and a test."""
    from utils.operations.development import scaffold

    paths = [str(path) for path in scaffold.new_cog(name)]
    command = f'make migration m="add {name}"'
    text = "\n".join([*(f"wrote {path}" for path in paths), f"next: {command}"])
    print_outcome(Outcome(text, {"files": paths, "next": command}), as_json=as_json)


if __name__ == "__main__":
    app()

"""`python bot.py backup restore` and `backup drill`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from utils.cli.common import AsJson, DataDir, exit_on_errors, run_action
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.operations.action import Outcome, Progress
from utils.settings import Settings, load_settings

if TYPE_CHECKING:
    from utils.operations.backup.source import Backups

Which = Annotated[str, typer.Argument(metavar="[ID]", help="The backup's id, or latest.")]


def _kept(settings: Settings) -> Backups:
    from utils.operations.backup.kept import Kept

    return Kept(settings)


def register(app: typer.Typer, backups: Callable[[Settings], Backups] = _kept) -> None:
    """Add the commands to `backup`; `backups` opens the place where backups are kept."""

    @app.command("restore")
    def restore(
        which: Annotated[str, typer.Argument(metavar="ID", help="The backup's id, or latest.")],
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask for the database's name.")] = False,
        drop_old: Annotated[bool, typer.Option("--drop-old", help="Do not keep the database until then.")] = False,
        as_json: AsJson = False,
        data_dir: DataDir = None,
    ) -> None:
        """Put a backup in the live database's place, after a backup of what is there; a bot may go on running."""

        async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
            from utils.operations.backup import restore

            return await restore.restore(
                database, backups(_at(settings, data_dir)), which, drop_old=drop_old, progress=progress
            )

        if not yes:
            with exit_on_errors(as_json=as_json):
                _confirm(load_settings(), data_dir)
        arguments = {"which": which, "drop_old": drop_old}
        run_action("backup restore", work, data_dir=data_dir, as_json=as_json, arguments=arguments)

    @app.command("drill")
    def drill(which: Which = "latest", as_json: AsJson = False, data_dir: DataDir = None) -> None:
        """Restore a backup beside the live database, look at it, and drop it; exit code 1 when it is not whole."""

        async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
            from utils.operations.backup import drill

            return await drill.drill(database, backups(_at(settings, data_dir)), which, progress=progress)

        run_action("backup drill", work, data_dir=data_dir, as_json=as_json, arguments={"which": which})


def _at(settings: Settings, data_dir: Path | None) -> Settings:
    """Return the settings with the backups of `data_dir`, where that is given."""
    return settings.with_data_dir(data_dir)


def _confirm(settings: Settings, data_dir: Path | None) -> None:
    """Have the database's name typed. Raises `ValidationError` for any other, and where nobody can type."""
    target = settings.with_data_dir(data_dir).direct_target
    name = "guildbook" if target is None else target.database or target.user or ""
    where = "of the embedded server" if target is None else f"at {target}"
    if not sys.stdin.isatty():
        raise ValidationError(f"a restore replaces everything in database {name} {where}: say --yes to do it unasked")
    typer.echo(f"This replaces everything in database {name} {where}.", err=True)
    typed = typer.prompt("Its name, to go on", default="", show_default=False, err=True)
    if typed != name:
        raise ValidationError(f"{typed!r} is not its name, {name}: nothing was done")

"""`python bot.py backup …`: create, list, verify, restore, drill and prune backups."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from utils.cli.common import AsJson, DataDir, exit_on_errors, run_action, run_with_pool
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.operations.action import Outcome, Progress
from utils.settings import Settings, load_settings

if TYPE_CHECKING:
    from utils.operations.backup.service import BackupService

app = typer.Typer(help="Backups: create, list, verify, restore, drill, prune.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="[ID]", help="The id of a backup; the newest full one if left out.")]


def _service(settings: Settings) -> BackupService:
    from utils.operations.backup.service import BackupService

    return BackupService(settings)


@app.command("create")
def create(
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help="Only these tables.")] = None,
    schema_only: Annotated[bool, typer.Option("--schema-only", help="No rows.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Back up the database."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).create(pool, tables=tables or (), schema_only=schema_only, progress=progress)

    arguments = {"tables": tables or [], "schema_only": schema_only}
    run_action("backup create", work, data_dir=data_dir, as_json=as_json, arguments=arguments)


@app.command("list")
def list_(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the backups and the results of their last drills."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).list()

    run_action("backup list", work, data_dir=data_dir, as_json=as_json)


@app.command("verify")
def verify(id: Id = "latest", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Check that a backup is undamaged."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).verify(id, progress=progress)

    run_action("backup verify", work, data_dir=data_dir, as_json=as_json, arguments={"id": id})


@app.command("restore")
def restore(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of a backup, or latest.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    whole_database: Annotated[
        bool,
        typer.Option("--whole-database", help="Replace the database with everything in it, after naming what is lost."),
    ] = False,
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="With --whole-database: drop the old database at once.")
    ] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Replace the rows of Guildbook's tables by a backup, after backing them up; a bot may keep running."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).restore(
            pool, id, whole_database=whole_database, drop_old=drop_old, progress=progress
        )

    with exit_on_errors(as_json=as_json):
        if drop_old and not whole_database:
            raise ValidationError("--drop-old needs --whole-database: a restore in place leaves no old database")
        if not yes:
            settings = load_settings().with_data_dir(data_dir)
            losses = None
            if whole_database:
                losses = run_with_pool(settings, data_dir, lambda pool: _service(settings).find_losses(pool, id))
            _confirm(settings, losses)
    arguments = {"id": id, "whole_database": whole_database, "drop_old": drop_old}
    run_action("backup restore", work, data_dir=data_dir, as_json=as_json, arguments=arguments)


def _confirm(settings: Settings, losses: Sequence[str] | None = None) -> None:
    """Ask for the name of the database. Raises `ValidationError` for any other answer, and without a terminal.

    losses: what replacing the whole database would lose; None: only rows are replaced.
    """
    target = settings.direct_target
    name = "guildbook" if target is None else target.database or target.user or ""
    where = "of the embedded server" if target is None else f"at {target}"
    what = f"the rows of Guildbook's tables in database {name}" if losses is None else f"database {name}"
    if losses:
        what += f", which loses {', '.join(losses)},"
    if not sys.stdin.isatty():
        raise ValidationError(f"a restore replaces {what} {where}: confirm with --yes")
    typer.echo(f"This replaces {what} {where}.", err=True)
    answer = typer.prompt("Type its name to go on", default="", show_default=False, err=True)
    if answer != name:
        raise ValidationError(f"{answer!r} is not the name of the database, {name}: nothing was done")


@app.command("drill")
def drill(id: Id = "latest", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Restore a backup into scratch tables, compare, and drop them; exit code 1 if it is not complete."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).drill(pool, id, progress=progress)

    run_action("backup drill", work, data_dir=data_dir, as_json=as_json, arguments={"id": id})


@app.command("prune")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Delete the backups that BACKUP_KEEP and the settings like it do not keep."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).prune(dry_run=dry_run)

    run_action("backup prune", work, data_dir=data_dir, as_json=as_json, arguments={"dry_run": dry_run})

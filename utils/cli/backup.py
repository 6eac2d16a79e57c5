"""`python bot.py backup …`: create, list, verify, restore, drill and prune backups."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from utils.cli.common import AsJson, DataDir, exit_on_errors, run_action
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
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Drop the old database at once.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Replace the live database by a backup, after backing it up; a bot may keep running."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings).restore(pool, id, drop_old=drop_old, progress=progress)

    if not yes:
        with exit_on_errors(as_json=as_json):
            _confirm(load_settings().with_data_dir(data_dir))
    arguments = {"id": id, "drop_old": drop_old}
    run_action("backup restore", work, data_dir=data_dir, as_json=as_json, arguments=arguments)


def _confirm(settings: Settings) -> None:
    """Ask for the name of the database. Raises `ValidationError` for any other answer, and without a terminal."""
    target = settings.direct_target
    name = "guildbook" if target is None else target.database or target.user or ""
    where = "of the embedded server" if target is None else f"at {target}"
    if not sys.stdin.isatty():
        raise ValidationError(f"a restore replaces everything in database {name} {where}: confirm with --yes")
    typer.echo(f"This replaces everything in database {name} {where}.", err=True)
    answer = typer.prompt("Type its name to go on", default="", show_default=False, err=True)
    if answer != name:
        raise ValidationError(f"{answer!r} is not the name of the database, {name}: nothing was done")


@app.command("drill")
def drill(id: Id = "latest", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Restore a backup next to the live database, compare, and drop it; exit code 1 if it is not complete."""

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

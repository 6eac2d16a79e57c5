"""`python bot.py backup …`: make, list, verify, restore, drill and prune backups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from utils.cli import restore
from utils.cli.common import AsJson, DataDir, run_action
from utils.database import Pool
from utils.operations.action import Outcome, Progress
from utils.settings import Settings

if TYPE_CHECKING:
    from utils.operations.backup.service import BackupService

app = typer.Typer(help="Backups: make, list, verify, restore, drill, prune.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID", help="A backup's id; without it the newest full one.")]


def vault(settings: Settings) -> BackupService:
    """Return the backups that the settings lead to."""
    from utils.operations.backup.service import BackupService

    return BackupService(settings)


@app.command("create")
def create(
    tables: Annotated[list[str] | None, typer.Argument(metavar="[TABLE]...", help="Only these tables.")] = None,
    schema_only: Annotated[bool, typer.Option("--schema-only", help="No rows.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Back the database up."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        return await vault(settings).create(database, tables=tables or (), schema_only=schema_only, progress=progress)

    arguments = {"tables": tables or [], "schema_only": schema_only}
    run_action("backup create", work, data_dir=data_dir, as_json=as_json, arguments=arguments)


@app.command("list")
def list_(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the backups, and how their last drills went."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        return await vault(settings).listing()

    run_action("backup list", work, data_dir=data_dir, as_json=as_json)


@app.command("verify")
def verify(id: Id = "latest", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Check that a backup is what it was when it was made."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        return await vault(settings).verify(id, progress=progress)

    run_action("backup verify", work, data_dir=data_dir, as_json=as_json, arguments={"id": id})


@app.command("prune")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, only say what would be.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Delete the backups that BACKUP_KEEP and its like do not keep."""

    async def work(settings: Settings, database: Pool, progress: Progress) -> Outcome:
        return await vault(settings).prune(dry_run=dry_run)

    run_action("backup prune", work, data_dir=data_dir, as_json=as_json, arguments={"dry_run": dry_run})


restore.register(app, vault)

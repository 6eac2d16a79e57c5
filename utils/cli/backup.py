"""`python bot.py backup …`: create, list, verify, restore, drill, push, sign, accept and prune backups."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from utils.cli.common import (
    AsJson,
    CommandGroup,
    DataDir,
    ask,
    make_pool,
    open_progress,
    parse_path,
    print_outcome,
    run_action,
    run_with_pool,
)
from utils.database import Pool
from utils.exceptions import DatabaseError, ValidationError
from utils.operations.action import Outcome, Progress
from utils.settings import Settings, load_settings

if TYPE_CHECKING:
    from utils.operations.backup.catalog import BackupCatalog
    from utils.operations.backup.service import BackupService

#: Seconds to ask the database whose it is, by commands that need none.
ASK_SECONDS = 3.0

app = typer.Typer(
    cls=CommandGroup,
    help="Backups: create, list, verify, restore, drill, push, sign, accept, prune.",
    no_args_is_help=True,
)

Id = Annotated[str, typer.Argument(metavar="[ID]", help="The id of a backup; the newest good one if left out.")]
From = Annotated[
    Path | None,
    typer.Option(
        "--from", parser=parse_path, metavar="DIR", help="Use the backups in this directory, and write nothing there."
    ),
]


def _service(settings: Settings, directory: Path | None = None) -> BackupService:
    from utils.operations.backup.service import BackupService

    return BackupService(settings, directory=directory)


def _run_without_database(
    work: Callable[[BackupService, Progress], Awaitable[Outcome]],
    *,
    directory: Path | None = None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Do what needs no database, which may be what was lost, and exit."""
    settings = load_settings().with_data_dir(data_dir)
    service = _service(settings, directory)

    async def run(progress: Progress) -> Outcome:
        service.catalog = await _ask_database(settings, service.catalog)
        return await work(service, progress)

    with open_progress(as_json) as progress:
        outcome = asyncio.run(run(progress))
    print_outcome(outcome, as_json=as_json)


async def _ask_database(settings: Settings, catalog: BackupCatalog) -> BackupCatalog:
    """Return the catalog as seen by the database, if that answers at once; otherwise the token says whose it is."""
    if settings.direct_target is None:
        return catalog  # an embedded server would have to be started
    hasty = settings.model_copy(update={"db_connect_timeout": ASK_SECONDS})
    pool = make_pool(hasty, settings.direct_target, connections=1)
    try:
        async with asyncio.timeout(ASK_SECONDS):  # one attempt to connect may take longer
            await pool.connect()
            return await catalog.serving(pool)
    except (DatabaseError, TimeoutError):
        return catalog
    finally:
        await pool.close()


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
def list_(directory: From = None, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the backups: where they are, whose, how old and whether complete. Needs no database."""
    _run_without_database(lambda service, _: service.list(), directory=directory, data_dir=data_dir, as_json=as_json)


@app.command("verify")
def verify(
    id: Id = "latest",
    deep: Annotated[bool, typer.Option("--deep", help="Also decompress it and count all rows.")] = False,
    directory: From = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Check that a backup is undamaged, in every store that has it. Needs no database."""
    _run_without_database(
        lambda service, progress: service.verify(id, is_deep=deep, progress=progress),
        directory=directory,
        data_dir=data_dir,
        as_json=as_json,
    )


@app.command("restore")
def restore(
    id: Annotated[str, typer.Argument(metavar="ID", help="The id of a backup, or latest.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    from_other: Annotated[
        bool, typer.Option("--from-other", help="Also a backup of another database or application.")
    ] = False,
    whole_database: Annotated[
        bool,
        typer.Option("--whole-database", help="Replace the database with everything in it, after naming what is lost."),
    ] = False,
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="With --whole-database: drop the old database at once.")
    ] = False,
    tables: Annotated[
        list[str] | None, typer.Option("--table", metavar="NAME", help="Only this table; may be given several times.")
    ] = None,
    guild: Annotated[
        int | None,
        typer.Option("--guild", metavar="ID", min=0, max=2**63 - 1, help="Only the documents of this guild."),
    ] = None,
    directory: From = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Replace the rows of Guildbook's tables by a backup, after backing them up; a bot may keep running."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings, directory).restore(
            pool,
            id,
            whole_database=whole_database,
            drop_old=drop_old,
            from_other=from_other,
            tables=tables or (),
            documents_of=guild,
            progress=progress,
        )

    from utils.operations.backup.restore.selection import check_options, describe_options

    if drop_old and not whole_database:
        raise ValidationError("--drop-old needs --whole-database: a restore in place leaves no old database")
    check_options(tables or (), guild, whole_database=whole_database)
    if not yes:
        settings = load_settings().with_data_dir(data_dir)
        what = describe_options(tables or (), guild, whole_database=whole_database)
        id = _confirm(settings, data_dir, _service(settings, directory), id, what, whole_database=whole_database)
    arguments = {
        "id": id,
        "whole_database": whole_database,
        "drop_old": drop_old,
        "from_other": from_other,
        "tables": tables or [],
        "guild": guild,
    }
    run_action("backup restore", work, data_dir=data_dir, as_json=as_json, arguments=arguments)


def _confirm(
    settings: Settings, data_dir: Path | None, service: BackupService, id: str, what: str, *, whole_database: bool
) -> str:
    """Ask for the name of the database, and return the id of the backup that was shown.

    Raises `ValidationError` for any other answer, and without a terminal.
    """

    async def describe(pool: Pool) -> tuple[str, str, str]:
        name: str = await pool.fetchval("SELECT current_database()")
        entry, text = await service.describe_restore(pool, id)
        losses = await service.find_losses(pool, entry.id) if whole_database else ()
        lost = f", which loses {', '.join(losses)}," if losses else ""
        return name, entry.id, f"{what} in database {name} at {pool.direct}{lost} by backup {text}"

    name, shown, question = run_with_pool(settings, data_dir, describe)
    answer = ask(
        f"This replaces {question}.\nType the name of the database to go on:",
        otherwise=f"a restore replaces {question}: confirm with --yes",
    )
    if answer != name:
        raise ValidationError(f"{answer!r} is not the name of the database, {name}: nothing was done")
    return shown


@app.command("drill")
def drill(id: Id = "latest", directory: From = None, as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Restore a backup into scratch tables, compare, and drop them; exit code 1 if it is not complete."""

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        return await _service(settings, directory).drill(pool, id, progress=progress)

    run_action("backup drill", work, data_dir=data_dir, as_json=as_json, arguments={"id": id})


@app.command("push")
def push(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One backup; all that are missing there.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Upload backups that the remote store lacks; the schedule does so too. Needs no database."""
    _run_without_database(
        lambda service, progress: service.push(id, progress=progress), data_dir=data_dir, as_json=as_json
    )


@app.command("sign")
def sign(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One backup; all that are not signed.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Sign backups from before BACKUP_SIGNING_KEY was set, in every store, after verifying them. Needs no database."""
    _run_without_database(
        lambda service, progress: service.sign(id, progress=progress), data_dir=data_dir, as_json=as_json
    )


@app.command("accept")
def accept(id: Id = "latest", as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """Say that a backup may have much less than the ones before it, so that these may be deleted in time."""
    _run_without_database(lambda service, _: service.accept(id), data_dir=data_dir, as_json=as_json)


@app.command("prune")
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Delete the backups that BACKUP_KEEP and the settings like it do not keep. Needs no database."""
    _run_without_database(lambda service, _: service.prune(dry_run=dry_run), data_dir=data_dir, as_json=as_json)

"""`python bot.py import …`: imports JSON files of other bots into the database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from utils.cli.common import AsJson, DataDir, parse_path, run_action
from utils.database import Pool
from utils.operations.action import Outcome, Progress
from utils.settings import Settings

app = typer.Typer(help="Import JSON files into the database.", subcommand_metavar="")


@app.callback(invoke_without_command=True, context_settings={"allow_interspersed_args": True})
def import_(
    paths: Annotated[list[Path], typer.Argument(parser=parse_path, metavar="PATH...", help="Files or directories.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be written.")] = False,
    kind: Annotated[
        str | None,
        typer.Option("--as", help="members, users, emojis, shop, settings or documents; default: by name and shape."),
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace for the originals; default: legacy.NAME.")] = None,
    guild: Annotated[
        int | None, typer.Option(min=1, max=2**63 - 1, help="Guild of entries that do not say theirs.")
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Encoding of the files, such as windows-1252; default: UTF-8, UTF-16 or UTF-32.")
    ] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Copy, validate, repair and import JSON files, each in one transaction; exit code 3 if something was left out."""
    from utils.operations.backup import recovery
    from utils.operations.backup.catalog import BackupCatalog
    from utils.operations.importing import importer
    from utils.operations.importing.originals import printable

    async def work(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        if data_dir is not None:  # the originals are copied to the database's data directory
            settings = settings.model_copy(update={"data_dir": data_dir})
        if not dry_run:
            await recovery.require_no_hold(pool, BackupCatalog(settings))
        return await importer.import_files(
            pool, settings, paths, dry_run, kind=kind, namespace=namespace, guild_id=guild, encoding=encoding,
            progress=progress,
        )  # fmt: skip

    arguments = {
        "paths": [printable(path) for path in paths], "dry_run": dry_run, "as": kind, "namespace": namespace,
        "guild": guild, "encoding": encoding,
    }  # fmt: skip
    run_action("import", work, data_dir=data_dir, as_json=as_json, arguments=arguments)

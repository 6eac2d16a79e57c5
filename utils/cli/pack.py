"""`python bot.py pack …`: what an author or an operator does with packs, and `new pack`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from utils import packs
from utils.cli.common import AsJson, DataDir, confirm, parse_path, print_outcome, run_action
from utils.database import Pool
from utils.database.address import open_target
from utils.exceptions import ValidationError
from utils.operations.action import Outcome, Progress
from utils.packs import Pack
from utils.settings import Settings, load_settings

app = typer.Typer(help="Packs: cogs, tables and settings in repositories of their own, which COGS names.")

Name = Annotated[str, typer.Argument(help="The name of a pack that COGS names.")]
NoBackup = Annotated[bool, typer.Option("--no-backup", help="Make no backup first.")]


def new_pack(
    name: Annotated[str, typer.Argument(help="The name: tally writes a repository with the package tally.")],
    directory: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="PATH", help="Where; by default beside this clone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the repository of a pack: a working cog with a table, settings, texts and a test."""
    from utils.operations.development import pack_scaffold

    paths = [str(path) for path in pack_scaffold.new_pack(name, directory)]
    root = str(next(Path(path) for path in paths if path.endswith("pyproject.toml")).parent)
    command = f"cd {root} && make test"
    text = "\n".join([*(f"wrote {path}" for path in paths), f"next: {command}"])
    print_outcome(Outcome(text, {"directory": root, "files": paths, "next": command}), as_json=as_json)


@app.command("list")
def list_(as_json: AsJson = False, data_dir: DataDir = None) -> None:
    """List the packs of COGS, and those that are gone and left tables; exit code 1 when something is to be done."""

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from dataclasses import asdict

        from utils.operations.migrations import pack_states

        states = await pack_states(pool)
        text = "\n".join(state.line() for state in states) or "there are no packs: COGS is empty"
        return Outcome(text, {"packs": [asdict(state) for state in states]}, ok=all(state.is_ok for state in states))

    run_action("pack list", action, data_dir=data_dir, as_json=as_json)


@app.command("migration")
def migration(
    name: Name,
    message: Annotated[str, typer.Option("--message", "-m", help="What the revision does.")],
    empty: Annotated[bool, typer.Option("--empty", help="Without statements, for changes of rows.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a revision for what a pack's models have beyond the database; other tables are not looked at."""
    settings = load_settings()
    pack = _find(name)

    async def write() -> Path | None:
        from utils.operations.migrations.environment import DEFAULTS
        from utils.operations.migrations.writing import write_revision

        async with open_target(settings.direct_target, settings.data_dir, schema=settings.db_schema) as target:
            return await write_revision(
                target, message, is_empty=empty, auto_migrate=settings.auto_migrate, options=DEFAULTS.of_pack(pack)
            )

    path = asyncio.run(write())
    text = f"the tables are as the models of pack {name} say: no revision was written"
    if path is not None:
        text = f"wrote {path}: read it; the next start applies it, and so does python bot.py db upgrade"
    print_outcome(Outcome(text, {"file": None if path is None else str(path)}), as_json=as_json)


@app.command("merge")
def merge(
    name: Name,
    message: Annotated[str, typer.Option("--message", "-m", help="What the revision says of itself.")] = "merge",
    as_json: AsJson = False,
) -> None:
    """Write a revision that merges a pack's heads, when two developers wrote one each."""
    load_settings()
    pack = _find(name)
    from utils.operations.migrations.writing import write_merge

    path = write_merge(message, pack.scripts)
    print_outcome(Outcome(f"wrote {path}", {"file": str(path)}), as_json=as_json)


@app.command("downgrade")
def downgrade(
    name: Name,
    revision: Annotated[str, typer.Argument(help="A revision of the pack, or base.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    no_backup: NoBackup = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Revert revisions of a pack, after a backup; AUTO_MIGRATE is then paused until the next db upgrade."""
    if not yes:
        consequence = f"All data in what the later revisions of pack {name} added is lost."
        confirm(f"{consequence} Continue?", otherwise=f"{consequence} Confirm with --yes")

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup.create import backup_before
        from utils.operations.migrations import admin
        from utils.operations.migrations.environment import DEFAULTS

        backup = None if no_backup else backup_before("before downgrade", settings, pool, progress)
        options = DEFAULTS.of_pack(_find(name))
        return await admin.downgrade(pool, revision, backup=backup, progress=progress, options=options)

    arguments = {"pack": name, "revision": revision, "backup": not no_backup}
    run_action("pack downgrade", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


@app.command("drop")
def drop(
    name: Annotated[str, typer.Argument(help="The name of a pack that COGS no longer names.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    no_backup: NoBackup = False,
    as_json: AsJson = False,
    data_dir: DataDir = None,
) -> None:
    """Drop the tables that a removed pack left, after a backup; refused while a bot runs."""
    if not yes:
        consequence = f"All tables of pack {name} are dropped."
        confirm(f"{consequence} Continue?", otherwise=f"{consequence} Confirm with --yes")

    async def action(settings: Settings, pool: Pool, progress: Progress) -> Outcome:
        from utils.operations.backup.create import backup_before
        from utils.operations.migrations.pack_revisions import drop_pack

        backup = None if no_backup else backup_before("before reset", settings, pool, progress)
        return await drop_pack(pool, name, backup=backup)

    arguments = {"pack": name, "backup": not no_backup}
    run_action("pack drop", action, data_dir=data_dir, as_json=as_json, arguments=arguments)


def _find(name: str) -> Pack:
    """Return an active pack. Raises `ValidationError` if there is none of that name."""
    known = {pack.name: pack for pack in packs.active()}
    if name not in known:
        raise ValidationError(
            f"COGS names no pack {name[:50]!r}: expected one of {', '.join(known) or '(COGS is empty)'}"
        )
    return known[name]

"""Writes revisions, of Guildbook or of a pack: from the difference between models and database, and merges of heads."""

from __future__ import annotations

import asyncio
import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.operations.ops import MigrationScript
from alembic.util import CommandError

from utils.database import ConnectTarget
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.migrations.comparison import import_models
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions, MigrationRun
from utils.operations.migrations.history import ALEMBIC
from utils.operations.migrations.revisions import Revisions, alembic_config
from utils.operations.migrations.statements import parse


async def _upgrade_base(target: ConnectTarget, options: MigrationOptions, *, auto_migrate: bool) -> None:
    base = replace(options, scripts=options.base)
    if auto_migrate and await migrations.pending(target, options=base):
        await migrations.upgrade(target, respect_pause=True, by=ALEMBIC, options=base)


async def write_revision(
    target: ConnectTarget,
    message: str,
    *,
    is_empty: bool = False,
    auto_migrate: bool = True,
    options: MigrationOptions = DEFAULTS,
) -> Path | None:
    """Upgrade the development database and write a revision for what the models have beyond it; return the file.

    Returns None, and writes nothing, if the models have nothing beyond it. `is_empty`: compare nothing, and write a
    revision without statements. Raises `MigrationError` where revisions need a merge first, or may not be applied.
    """
    import_models(scripts=options.scripts)
    revisions = migrations.Revisions(options.scripts)
    if revisions.pack is not None:  # its tables may refer to Guildbook's newest
        (revisions.pack.scripts / "versions").mkdir(parents=True, exist_ok=True)
        await _upgrade_base(target, options, auto_migrate=auto_migrate)
    if len(revisions.heads) > 1:
        raise MigrationError(revisions.merge_advice())
    if missing := await migrations.pending(target, options=options):
        if not auto_migrate:
            raise MigrationError(
                f"AUTO_MIGRATE is off, and the database lacks revision {', '.join(missing)}: run python bot.py db"
                " upgrade, then try again"
            )
        paused = (await migrations.upgrade(target, respect_pause=True, by=ALEMBIC, options=options)).paused
        if paused is not None:
            raise MigrationError(f"AUTO_MIGRATE is paused: {paused}; run python bot.py db upgrade, then try again")
    config = _writing_config(options.scripts)
    config.attributes["run"] = MigrationRun(target=target, options=options, by=ALEMBIC)
    try:
        # Alembic prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            written = await asyncio.to_thread(
                command.revision,
                config,
                message,
                autogenerate=not is_empty,
                rev_id=revisions.next_id(),
                version_path=_version_path(revisions),
                process_revision_directives=None if is_empty else _discard_empty,
            )
    except CommandError as exc:
        raise MigrationError(f"could not write the revision: {exc}") from exc
    scripts = written if isinstance(written, list) else [written]
    return next((Path(script.path) for script in scripts if script is not None), None)


def _writing_config(scripts: Path) -> Config:
    """Return the configuration for writing revisions into a directory: with its template and its hooks."""
    config = Config(str(migrations.SCRIPTS.parent / "alembic.ini"), stdout=io.StringIO())
    for option in ("script_location", "version_locations"):
        value = alembic_config(scripts).get_main_option(option)
        if value is not None:
            config.set_main_option(option, value.replace("%", "%%"))
    return config


def _version_path(revisions: Revisions) -> str | None:
    return None if revisions.pack is None else str(revisions.pack.scripts / "versions")


def write_merge(message: str, scripts: Path = migrations.SCRIPTS) -> Path:
    """Write a revision that merges the heads of a directory; return the file.

    Raises `MigrationError` if there is one head only.
    """
    revisions = Revisions(scripts)
    if len(revisions.heads) < 2:
        raise MigrationError(f"there is one head, {', '.join(revisions.heads) or 'none'}: nothing to merge")
    with contextlib.redirect_stdout(io.StringIO()):  # Alembic prints what it does
        written = command.merge(
            _writing_config(scripts), list(revisions.heads), message=message, rev_id=revisions.merge_id()
        )
    assert written is not None, "there are heads to merge"
    return Path(written.path)


def _discard_empty(context: Any, revision: Any, directives: list[MigrationScript]) -> None:
    """Keep Alembic from writing a revision that does nothing."""
    if all(script.upgrade_ops is None or script.upgrade_ops.is_empty() for script in directives):
        directives.clear()


def find_failing(path: Path, options: MigrationOptions = DEFAULTS) -> list[str]:
    """Return the statements of a revision that fail on a table with rows."""
    revisions = Revisions(options.scripts)
    (revision,) = [id for id in revisions.ids if revisions.files([id]) == [path]]
    parents = revisions.parents(revision)
    sql = migrations.offline_sql(revision, current=parents, options=options)
    return [statement.title for statement in parse(sql) if statement.is_failing]

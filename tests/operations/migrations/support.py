"""What the tests of migrations share: the revisions, and directories with other ones."""

from __future__ import annotations

import shutil
from pathlib import Path

from utils.operations import migrations
from utils.operations.migrations import MigrationOptions

KNOWN = [revision.id for revision in migrations.known_revisions()]
HEAD = KNOWN[-1]
#: The id of the revision that `with_revision` adds.
EXTRA = "9000"


def without_newest(directory: Path) -> MigrationOptions:
    """Return the options of an older version: one that does not know the newest revision."""
    scripts = _copy_scripts(directory)
    next((scripts / "versions").glob(f"{HEAD}_*.py")).unlink()
    return MigrationOptions(scripts=scripts)


def with_revision(directory: Path, body: str) -> MigrationOptions:
    """Return the options of a newer version: one with the revision `EXTRA`, whose functions are `body`."""
    scripts = _copy_scripts(directory)
    (scripts / "versions" / f"{EXTRA}_extra.py").write_text(
        f'"""Extra."""\nfrom alembic import op\n\nrevision = "{EXTRA}"\ndown_revision = "{HEAD}"\n\n\n{body}\n'
    )
    return MigrationOptions(scripts=scripts)


def _copy_scripts(directory: Path) -> Path:
    scripts = directory / "migrations"
    shutil.copytree(migrations.SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return scripts

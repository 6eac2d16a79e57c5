"""Packs that tests write, and what an import of theirs leaves behind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from utils import packs
from utils.bot.registrations import is_within, remove_tables
from utils.operations.development.pack_scaffold import new_pack
from utils.packs import Pack

REVISION = '''"""{title}."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "{id}"
down_revision = {down!r}
{more}

def upgrade() -> None:
    {up}


def downgrade() -> None:
    {undo}
'''


def write_pack(directory: Path, name: str, *, requires: str | None = None) -> Path:
    """Write a pack as `new pack` does, and return its repository. `requires`: another revision of Guildbook."""
    root = directory / name
    new_pack(name, root)
    if requires is not None:
        require(root, requires)
    return root


def require(root: Path, revision: str) -> None:
    """Let a pack need a revision of Guildbook."""
    (root / root.name / "pack.toml").write_text(f'name = "{root.name}"\nrequires = "{revision}"\n')


def versions(root: Path) -> Path:
    """Return the directory of a pack's revisions."""
    return root / root.name / "migrations/versions"


def add_revision(
    root: Path, id: str, down: str | tuple[str, ...] | None, up: str, undo: str = "pass", *, more: str = ""
) -> Path:
    """Write a revision of a pack. `up`, `undo`: one statement each; `more`: further constants."""
    path = versions(root) / f"{id}.py"
    path.write_text(REVISION.format(title=id, id=id, down=down, more=more, up=up, undo=undo))
    return path


@contextlib.contextmanager
def using(*roots: Path) -> Iterator[list[Pack]]:
    """Activate packs for a block, and forget what was imported of them afterwards."""
    with packs.using(*map(str, roots)) as found:
        try:
            yield found
        finally:
            for pack in found:
                forget(pack.package)


def forget(package: str) -> None:
    """Remove a package from what is imported, with its tables."""
    for name in [name for name in sys.modules if is_within(name, package)]:
        del sys.modules[name]
    remove_tables(package)

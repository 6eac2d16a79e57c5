"""What is ours, according to the models and to the revisions' source."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import Base
from utils.database import Pool
from utils.database.ownership import FORMER_VERSION_TABLE, MARKERS, VERSION_TABLE, fetch_version, owned, owned_tables
from utils.database.placement import Placement
from utils.operations.migrations.comparison import import_models

SOURCE = """
from alembic import op
import sqlalchemy as sa

revision = {revision!r}
down_revision = {parent!r}

TABLES = ("loop_a", "loop_b")


def upgrade():
    {upgrade}


def downgrade():
    op.create_table("only_in_downgrade", sa.Column("id"))
"""


def write(directory: Path, *upgrades: str) -> Path:
    """Write revisions that follow one another and whose functions have these lines."""
    versions = directory / "versions"
    versions.mkdir(exist_ok=True)
    for number, upgrade in enumerate(upgrades):
        # The names of the files do not give the order.
        (versions / f"{9 - number}.py").write_text(
            SOURCE.format(revision=str(number), parent=str(number - 1) if number else None, upgrade=upgrade)
        )
    return directory


def test_revisions_and_models_declare_the_same() -> None:
    import_models()
    ours = owned()
    assert ours.created == {(table.schema, table.name) for table in Base.metadata.tables.values()}
    for table in Base.metadata.tables.values():
        assert {column.name for column in table.columns} <= ours.columns[table.schema, table.name]
        assert {index.name for index in table.indexes} <= ours.indexes
    assert ours.created | {(None, VERSION_TABLE)} < owned_tables()
    assert (None, FORMER_VERSION_TABLE) not in owned_tables()


def test_names_are_qualified_for_a_placement() -> None:
    names = owned().qualified(Placement.of("botx"))
    assert ("botx", "members") in names
    assert ("botx_ops", "leases") in names
    assert {schema for schema, _ in names} == {"botx", "botx_ops"}


@pytest.mark.parametrize(
    ("upgrade", "table", "columns"),
    [
        ('op.create_table("a", sa.Column("x"), sa.Column("y"))', (None, "a"), {"x", "y"}),
        ('op.create_table("a", sa.Column("x"), schema="ops")', ("ops", "a"), {"x"}),
        ('op.execute("CREATE TABLE IF NOT EXISTS ops.a (x int)")', ("ops", "a"), {"x"}),
        ('op.execute("ALTER TABLE a ADD COLUMN x int")', (None, "a"), {"x"}),
        ('[op.add_column(name, sa.Column("x")) for name in TABLES]', (None, "loop_b"), {"x"}),
        ('op.create_table("b", sa.Column("x")); op.rename_table("b", "a")', (None, "a"), set()),
    ],
)
def test_finds_what_a_revision_makes(
    tmp_path: Path, upgrade: str, table: tuple[str | None, str], columns: set[str]
) -> None:
    ours = owned(write(tmp_path, upgrade))
    assert table in ours.tables
    assert ours.columns[table] >= columns
    assert (None, "only_in_downgrade") not in ours.tables


def test_what_a_later_revision_drops_is_not_ours(tmp_path: Path) -> None:
    creation = 'op.create_table("a", sa.Column("x")); op.create_table("b", sa.Column("x"), sa.Column("y"))'
    ours = owned(write(tmp_path, creation, 'op.drop_table("a"); op.drop_column("b", "x")'))
    assert (None, "a") not in ours.tables
    assert ours.columns[None, "b"] == {"y"}


def test_a_name_that_only_running_would_tell_is_not_ours(tmp_path: Path) -> None:
    ours = owned(write(tmp_path, "op.create_table(read_name(), sa.Column('x'))"))
    assert ours.created == frozenset()


@pytest.mark.slow
async def test_reads_the_version_without_changing_anything(database: Pool) -> None:
    version = await fetch_version(database)
    assert (version.table, version.is_former, version.is_complete) == ("public.guildbook_version", False, True)
    assert len(version.revisions) == 1
    await database.execute("ALTER TABLE roles RENAME stamp TO theirs; DROP SCHEMA ops CASCADE")
    assert set((await fetch_version(database)).missing) == {"roles", "ops.leases"} < set(MARKERS)

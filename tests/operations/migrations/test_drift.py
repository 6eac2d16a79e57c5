"""Drift: the database compared with the models, by Alembic and by the catalog."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy import Column, Index, MetaData, Text

from models import Base
from utils.database import ConnectTarget, Pool
from utils.operations import migrations
from utils.operations.migrations import schema_catalog


async def test_migrations_match_the_models(target: ConnectTarget, empty_target: ConnectTarget) -> None:
    assert await migrations.check_drift(target) == []
    await schema_catalog.build_from_models(empty_target)
    assert schema_catalog.differences(await schema_catalog.read(target), await schema_catalog.read(empty_target)) == []


async def test_drift_includes_missing_columns_and_indexes(target: ConnectTarget) -> None:
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)
    for table in Base.metadata.tables.values():
        table.to_metadata(metadata)
    metadata.tables["roles"].append_column(Column("extra", Text))
    Index(None, metadata.tables["threads"].c.owner_id)
    lines = await migrations.check_drift(target, metadata=metadata)
    assert sorted(line.partition(":")[0] for line in lines) == ["add_column", "add_index"]
    assert "extra" in "".join(lines)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("ALTER TABLE users ALTER COLUMN stamp SET DEFAULT 7", "column users.stamp"),
        ("ALTER TABLE changes ALTER COLUMN id DROP DEFAULT", "column changes.id"),
        ("ALTER TABLE sync_runs DROP CONSTRAINT ck_sync_runs_state", "ck_sync_runs_state"),
        ("ALTER TABLE guilds DROP COLUMN is_active; ALTER TABLE guilds ADD is_active bool", "guilds.is_active"),
        ("ALTER SEQUENCE ops.change_ids CYCLE", "sequence ops.change_ids"),
        ("CREATE OR REPLACE VIEW role_membership AS SELECT guild_id, id AS role_id, id AS user_id FROM roles", "view"),
    ],
)
async def test_catalog_finds_what_alembic_does_not_compare(
    target: ConnectTarget, empty_target: ConnectTarget, statement: str, expected: str
) -> None:
    conn = await asyncpg.connect(**target.connect_kwargs())
    await conn.execute(statement)
    await conn.close()
    await schema_catalog.build_from_models(empty_target)
    lines = schema_catalog.differences(await schema_catalog.read(target), await schema_catalog.read(empty_target))
    assert expected in "\n".join(lines)


async def test_drift_includes_the_view(database: Pool) -> None:
    await database.execute("DROP VIEW role_membership")
    assert await migrations.check_drift(database) == ["modify_view: role_membership"]


async def test_drift_ignores_other_schemas(database: Pool) -> None:
    await database.execute("CREATE SCHEMA theirs; CREATE TABLE theirs.things (id int)")
    assert await migrations.check_drift(database) == []

"""Compare the database with the models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, text

from models import Base
from models.people import ROLE_MEMBERSHIP
from utils.database import ConnectTarget, Pool
from utils.database.ownership import SCRIPTS
from utils.operations.migrations.comparison import comparison_options, import_models, list_partitions
from utils.operations.migrations.runner import read_schema


async def check_drift(
    database: Pool | ConnectTarget, *, metadata: MetaData = Base.metadata, scripts: Path = SCRIPTS
) -> list[str]:
    """Return the differences between the database and the models, one line each. Changes nothing.

    Tables and indexes that are not ours are not compared.
    """

    def compare(connection: Connection) -> list[str]:
        if metadata is Base.metadata:
            import_models(scripts=scripts)
        options = comparison_options(
            skip=list_partitions(connection), metadata=metadata, scripts=scripts, with_foreign_columns=True
        )
        migration = MigrationContext.configure(connection, opts=options)
        lines = [_describe(difference) for difference in _flatten(compare_metadata(migration, metadata))]
        lines += _compare_view(connection)
        connection.rollback()
        return lines

    return await read_schema(database, compare)


def _flatten(differences: list[Any]) -> list[Any]:
    return [inner for outer in differences for inner in (outer if isinstance(outer, list) else [outer])]


def _describe(difference: tuple[Any, ...]) -> str:
    kind, *rest = difference
    if kind == "remove_column":  # nobody is about to: autogenerate leaves what no revision made
        schema, table, column = rest
        return f"unexpected column: {f'{schema}.' if schema else ''}{table}.{column.name}"
    return f"{kind}: " + ", ".join(str(part) for part in rest if part is not None and not isinstance(part, dict))


def _compare_view(connection: Connection) -> list[str]:
    """Compare the view with its SQL in the models. PostgreSQL parses both, so that their spelling does not matter.

    It has to create one for that, so a read-only transaction compares nothing.
    """
    if connection.scalar(text("SELECT current_setting('transaction_read_only')")) == "on":
        return []
    connection.execute(text(re.sub(r"^CREATE VIEW (\w+)", r"CREATE TEMP VIEW expected_\1", ROLE_MEMBERSHIP)))
    query = text("SELECT pg_get_viewdef(to_regclass(:name))")
    expected = connection.scalar(query, {"name": "pg_temp.expected_role_membership"})
    actual = connection.scalar(query, {"name": "role_membership"})
    return [] if expected == actual else ["modify_view: role_membership"]

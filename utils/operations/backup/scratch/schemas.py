"""Scratch schemas: where a backup is loaded inside the live database before anything relies on it.

`guildbook_scratch_20260102_030405_9f3c` holds the main tables; the names of the others begin with it. Their creator
holds an advisory lock on the name. Those that nobody holds belonged to a killed process; the next restore or drill
drops them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence

from utils.database import ConnectTarget, ownership
from utils.database.placement import OPS, Placement
from utils.database.sessions import Connection, connect
from utils.database.sql import quote_identifier
from utils.exceptions import ForbiddenHere, translate_errors
from utils.operations.backup.archive.objects import Name, OwnTable, ScratchPlacement, qualified
from utils.operations.backup.scratch.locks import drop_abandoned, lock, lock_for_restore, new_suffix, try_to_drop

_log = logging.getLogger(__name__)

PREFIX = "guildbook_scratch_"
_NAME = re.compile(rf"({PREFIX}\d{{8}}_\d{{6}}_[0-9a-f]{{4}})(?:_ops|_\d+)?")
_SCHEMAS = """
SELECT nspname FROM pg_namespace WHERE nspname LIKE 'guildbook\\_scratch\\_%' AND pg_has_role(nspowner, 'USAGE')
ORDER BY nspname
"""
_MAY_CREATE = """
SELECT has_database_privilege(current_database(), 'CREATE') AS may_create, current_user::text AS role,
    current_database()::text AS database
"""
_OTHER_COLUMNS = """
SELECT quote_ident(attname) AS name FROM pg_attribute
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
    AND attname <> ALL($2::text[])
"""


@contextlib.asynccontextmanager
async def scratch_schemas(
    live: ConnectTarget, live_schemas: Placement, *, is_restore: bool
) -> AsyncIterator[ScratchPlacement]:
    """Create a schema for the main tables and name others, and drop all of them after the block.

    Leftovers of killed processes are dropped first. Raises `ForbiddenHere` if the user may not create schemas, and
    `BackupError` while another restore of the same database is running.
    """
    name = f"{PREFIX}{new_suffix()}"
    schemas = ScratchPlacement(name, f"{name}_ops", _others(name))
    async with connect(live) as connection:
        with translate_errors("the scratch schemas"):
            if is_restore:
                await lock_for_restore(connection, live_schemas.main)
            await check_privileges(connection)
            await drop_leftovers(connection)
            await lock(connection, name)
        try:
            with translate_errors("the scratch schemas"):
                await connection.execute(f"CREATE SCHEMA {quote_identifier(name)}")
            yield schemas
        finally:
            await try_to_drop(live, connection, name, _drop_statement(schemas.schemas()))


def _others(name: str) -> dict[str, str]:
    """Return a scratch schema for every schema with tables of cogs that is neither the main one nor `ops`."""
    schemas = sorted({schema for schema, _ in ownership.owned_tables() if schema not in (None, OPS)} - {None})
    return {str(schema): f"{name}_{number}" for number, schema in enumerate(schemas)}


async def check_privileges(connection: Connection) -> None:
    """Raise `ForbiddenHere` unless we may create schemas in the database."""
    row = await connection.fetchrow(_MAY_CREATE)
    assert row is not None, "one row"
    if not row["may_create"]:
        raise ForbiddenHere(
            f"the database user {row['role']} may not create schemas in database {row['database']}, and a backup is"
            " loaded into scratch schemas first (to allow it: GRANT CREATE ON DATABASE"
            f" {quote_identifier(row['database'])} TO {quote_identifier(row['role'])})"
        )


async def drop_leftovers(connection: Connection) -> None:
    """Drop the scratch schemas that killed processes left."""
    by_owner: dict[str, list[str]] = {}
    for row in await connection.fetch(_SCHEMAS):
        if (match := _NAME.fullmatch(row["nspname"])) is not None:
            by_owner.setdefault(match[1], []).append(match[0])
    await drop_abandoned(connection, {name: _drop_statement(schemas) for name, schemas in by_owner.items()})


def _drop_statement(schemas: Sequence[str]) -> str:
    # CASCADE reaches only what was made on scratch tables.
    return f"DROP SCHEMA IF EXISTS {', '.join(map(quote_identifier, schemas))} CASCADE"


async def copy_structure(
    connection: Connection, tables: Sequence[OwnTable], live: Placement, scratch: Placement
) -> None:
    """Make empty tables like live ones: with the same columns, checks and indexes, each partitioned one as one table.

    Triggers and foreign keys are left out.
    """
    for table in tables:
        schema = scratch.resolve(live.spell(table.schema))
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(schema)}")
        copy = qualified((schema, table.name))
        await connection.execute(f"CREATE UNLOGGED TABLE {copy} (LIKE {table.quoted} INCLUDING ALL)")


async def drop_columns(connection: Connection, kept: Mapping[Name, Sequence[str]]) -> None:
    """Drop the columns of copied tables that are not among these, of which the backup knows nothing."""
    for name, columns in kept.items():
        rows = await connection.fetch(_OTHER_COLUMNS, qualified(name), list(columns))
        if rows:
            drops = ", ".join(f"DROP COLUMN {row['name']}" for row in rows)
            await connection.execute(f"ALTER TABLE {qualified(name)} {drops}")

"""Brings back live tables that are missing: their scratch tables are moved into their place.

For a damaged database to which every revision has been applied. Definitions are adapted by their text, in which the
scratch schemas have names that occur nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.database import ownership
from utils.database.placement import Placement
from utils.database.sessions import Connection
from utils.database.sql import quote_identifier
from utils.exceptions import BackupError
from utils.operations.backup.archive.objects import OwnTable, find_sequences, find_tables, owned_names, qualified
from utils.operations.backup.scratch.load import FOREIGN_KEYS

_IS_MISSING = "SELECT to_regclass($1) IS NULL"
_DEFAULTS = """
SELECT d.adrelid::regclass::text AS table, quote_ident(a.attname) AS column,
    pg_get_expr(d.adbin, d.adrelid) AS definition
FROM pg_attrdef AS d JOIN pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
WHERE d.adrelid = ANY($1::text[]::regclass[]) AND a.attgenerated = '' AND a.attidentity = ''
"""
#: Defaults of scratch tables ($2) that the live ones ($1) have lost, with a sequence that was dropped.
_LOST_DEFAULTS = """
SELECT pair.live AS table, quote_ident(a.attname) AS column, pg_get_expr(d.adbin, d.adrelid) AS definition
FROM unnest($1::text[], $2::text[]) AS pair (live, scratch)
    JOIN pg_attrdef AS d ON d.adrelid = to_regclass(pair.scratch)
    JOIN pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
    JOIN pg_attribute AS l ON l.attrelid = to_regclass(pair.live) AND l.attname = a.attname
WHERE a.attgenerated = '' AND a.attidentity = '' AND NOT l.atthasdef
"""
#: Types in the scratch schemas ($2) that columns of tables ($1) have, or that their elements have.
_TYPES = """
SELECT DISTINCT n.nspname::text AS schema, t.typname::text AS name
FROM pg_attribute AS a JOIN pg_type AS c ON c.oid = a.atttypid JOIN pg_type AS t ON t.oid IN (c.oid, c.typelem)
    JOIN pg_namespace AS n ON n.oid = t.typnamespace
WHERE a.attrelid = ANY($1::text[]::regclass[]) AND a.attnum > 0 AND n.nspname = ANY($2::text[]) AND t.typelem = 0
ORDER BY 1, 2
"""


async def add_missing_tables(connection: Connection, live: Placement, scratch: Placement) -> list[OwnTable]:
    """Move scratch tables, with their rows, to where live ones are missing; return these. Make missing views.

    The `search_path` of the connection must be empty. Raises `BackupError` if a table cannot be moved.
    """
    existing = {(table.schema, table.name) for table in await find_tables(connection, owned_names(live))}
    tables = await find_tables(connection, owned_names(scratch))
    missing = [one for one in tables if (live.resolve(scratch.spell(one.schema)), one.name) not in existing]
    if missing:
        moved = await _move(connection, missing, live, scratch)
        await _add_defaults(connection, [one for one in tables if one not in missing], moved, live, scratch)
    else:
        moved = []
    for schema, name in sorted(ownership.owned().views, key=str):
        source, target = qualified((scratch.resolve(schema), name)), qualified((live.resolve(schema), name))
        if await connection.fetchval(_IS_MISSING, target) and not await connection.fetchval(_IS_MISSING, source):
            definition = await connection.fetchval("SELECT pg_get_viewdef(to_regclass($1))", source)
            await connection.execute(f"CREATE VIEW {target} AS {_adapt(definition, live, scratch)}")
    return moved


async def _move(
    connection: Connection, tables: Sequence[OwnTable], live: Placement, scratch: Placement
) -> list[OwnTable]:
    """Move tables from the scratch schemas to the live ones."""
    keys = await connection.fetch(FOREIGN_KEYS, [table.quoted for table in tables])
    for key in keys:
        await connection.execute(f"ALTER TABLE {key['table']} DROP CONSTRAINT {key['name']}")
    moved: list[OwnTable] = []
    for table in tables:
        schema = live.resolve(scratch.spell(table.schema))
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {quote_identifier(schema)}")
        for part in (table.quoted, *table.partitions):
            await connection.execute(f"ALTER TABLE {part} SET SCHEMA {quote_identifier(schema)}")
        moved += await find_tables(connection, [(schema, table.name)])
    await _move_types(connection, [name for table in moved for name in table.relations], live, scratch)
    for key in keys:
        of, definition = (_adapt(key[part], live, scratch) for part in ("table", "definition"))
        await connection.execute(f"ALTER TABLE {of} ADD CONSTRAINT {key['name']} {definition}")
    return moved


async def _add_defaults(
    connection: Connection,
    remaining: Sequence[OwnTable],
    moved: Sequence[OwnTable],
    live: Placement,
    scratch: Placement,
) -> None:
    """Let defaults draw from live sequences, which are moved where they are missing."""
    for schema, name in await find_sequences(connection, [*remaining, *moved]):
        target = live.resolve(scratch.spell(schema))
        if schema in scratch.schemas() and await connection.fetchval(_IS_MISSING, qualified((target, name))):
            await connection.execute(
                f"ALTER SEQUENCE {qualified((schema, name))} SET SCHEMA {quote_identifier(target)}"
            )
    defaults = await connection.fetch(_DEFAULTS, [name for table in moved for name in table.relations])
    lost = await connection.fetch(
        _LOST_DEFAULTS,
        [qualified((live.resolve(scratch.spell(table.schema)), table.name)) for table in remaining],
        [table.quoted for table in remaining],
    )
    for row in [*defaults, *lost]:
        definition = _adapt(row["definition"], live, scratch)
        await connection.execute(f"ALTER TABLE {row['table']} ALTER COLUMN {row['column']} SET DEFAULT {definition}")


async def _move_types(connection: Connection, tables: Sequence[str], live: Placement, scratch: Placement) -> None:
    for row in await connection.fetch(_TYPES, tables, scratch.schemas()):
        schema = live.resolve(scratch.spell(row["schema"]))
        source, target = qualified((row["schema"], row["name"])), qualified((schema, row["name"]))
        if await connection.fetchval("SELECT to_regtype($1) IS NOT NULL", target):
            raise BackupError(
                f"tables are missing whose columns have the type {target}, which exists: restore with --whole-database."
                " Nothing was changed"
            )
        await connection.execute(f"ALTER TYPE {source} SET SCHEMA {quote_identifier(schema)}")


def _adapt(definition: str, live: Placement, scratch: Placement) -> str:
    """Return a definition with the live schemas for the scratch ones."""
    for name in sorted(scratch.schemas(), key=len, reverse=True):  # the others begin with the first
        definition = definition.replace(f"{name}.", f"{quote_identifier(live.resolve(scratch.spell(name)))}.")
    return definition

"""Objects of other programs that depend on our tables: no downgrade may drop a table that has any."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from utils.database import Pool, ownership
from utils.exceptions import MigrationError
from utils.operations.migrations.environment import DEFAULTS, MigrationOptions
from utils.operations.migrations.revisions import Revisions

#: Objects that the message names.
SHOWN = 5
#: The revision that made this table made its schema too.
MADE_WITH_OPS = ("ops", "leases")
#: What depends on these tables (schemas in $1, names in $2) or on their row types, and belongs to none of them, nor to
#: our views ($3, in the schema $4).
_FIND = """
WITH ours AS (
    SELECT c.oid, c.reltype FROM unnest($1::text[], $2::text[]) AS wanted (schema, name)
    JOIN pg_namespace AS n ON n.nspname = wanted.schema
    JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = wanted.name
), kept AS (
    SELECT oid FROM ours UNION ALL
    SELECT c.oid FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = $4 AND c.relname = ANY($3::text[])
)
SELECT DISTINCT CASE WHEN r.oid IS NULL THEN pg_describe_object(d.classid, d.objid, d.objsubid)
    ELSE pg_describe_object('pg_class'::regclass, r.ev_class, 0) END AS name
FROM pg_depend AS d
LEFT JOIN pg_rewrite AS r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
LEFT JOIN pg_constraint AS k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
LEFT JOIN pg_attrdef AS a ON d.classid = 'pg_attrdef'::regclass AND a.oid = d.objid
WHERE d.deptype = 'n' AND (d.refclassid = 'pg_class'::regclass AND d.refobjid IN (SELECT oid FROM ours)
        OR d.refclassid = 'pg_type'::regclass AND d.refobjid IN (SELECT reltype FROM ours WHERE reltype <> 0))
    AND coalesce(r.ev_class, k.conrelid, a.adrelid, 0) NOT IN (SELECT oid FROM kept)
    AND NOT (d.classid = 'pg_class'::regclass AND d.objid IN (SELECT oid FROM kept))
ORDER BY 1
"""
#: The tables and views in the schema $1 besides these ($2) and their partitions: the revision that made the schema
#: drops it when it is reverted, which fails after all others were reverted if anything is left in it.
_FIND_IN_SCHEMA = """
SELECT pg_describe_object('pg_class'::regclass, c.oid, 0) AS name
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition
    AND c.relname <> ALL($2::text[])
ORDER BY 1
"""


async def find_dependents(pool: Pool, reverted: Collection[str], options: MigrationOptions = DEFAULTS) -> list[str]:
    """Return the objects of other programs that depend on tables or schemas which reverting these revisions drops.

    Each is described as PostgreSQL does, such as `view economy.rich`. Raises `DatabaseError`.
    """
    files = Revisions(options.scripts).files(reverted)
    created = ownership.created_by(files)
    found = await _find_dependents_of(pool, created)
    if MADE_WITH_OPS in created:
        names = [name for schema, name in ownership.relations_of(files) | created if schema == MADE_WITH_OPS[0]]
        found += [row["name"] for row in await pool.fetch(_FIND_IN_SCHEMA, pool.placement.ops, names)]
    return found


async def _find_dependents_of(pool: Pool, created: Collection[ownership.Name]) -> list[str]:
    placement = pool.placement
    names = [(placement.resolve(schema), name) for schema, name in created]
    rows = await pool.fetch(
        _FIND, [schema for schema, _ in names], [name for _, name in names], list(ownership.VIEWS), placement.main
    )
    return [row["name"] for row in rows]


async def refuse_dependents(pool: Pool, reverted: Collection[str], options: MigrationOptions = DEFAULTS) -> None:
    """Raise `MigrationError` if other programs' objects depend on tables which reverting these revisions drops."""
    _refuse(await find_dependents(pool, reverted, options))


async def refuse_dependents_of(pool: Pool, relations: Collection[ownership.Name]) -> None:
    """Raise `MigrationError` if other programs' objects depend on tables that are to be dropped."""
    _refuse(await _find_dependents_of(pool, relations))


def _refuse(found: Sequence[str]) -> None:
    if found:
        shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise MigrationError(
            f"objects of another program depend on tables or schemas that this would drop: {shown}. Nothing was"
            " changed: drop these objects first, or keep the tables"
        )

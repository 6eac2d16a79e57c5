"""The schema as PostgreSQL's catalog describes it, to compare two databases.

Alembic compares tables, columns, types and indexes. The catalog adds defaults, generated columns, check constraints,
index predicates, partition keys, sequences and views, but needs a second database to compare with.
"""

from __future__ import annotations

import re

import asyncpg
from sqlalchemy import Connection, MetaData, text

from models import Base
from models.people import ROLE_MEMBERSHIP
from utils.database.placement import OPS, Placement
from utils.database.sessions import apply_settings
from utils.database.sql import quote_identifier
from utils.database.target import ConnectTarget, located
from utils.exceptions import translate_errors
from utils.operations.migrations.comparison import import_models
from utils.operations.migrations.environment import run_on_connection

_RELATIONS = (
    "SELECT c.oid, CASE n.nspname WHEN $1 THEN c.relname ELSE 'ops.' || c.relname END AS name, c.relkind"
    " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname IN ($1, $2) AND NOT c.relispartition"
    " AND c.relname NOT IN ('alembic_version', 'guildbook_version')"
)
_QUERIES: tuple[str, ...] = (
    f"WITH r AS ({_RELATIONS})"  # noqa: S608 - constants
    " SELECT format('column %s.%s', r.name, a.attname) AS thing, concat_ws(' ', format_type(a.atttypid, a.atttypmod),"
    " CASE WHEN a.attnotnull THEN 'NOT NULL' END, nullif(a.attgenerated::text, ''), nullif(a.attidentity::text, ''),"
    " pg_get_expr(d.adbin, d.adrelid)) AS definition"
    " FROM r JOIN pg_attribute AS a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped"
    " LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE r.relkind IN ('r', 'p', 'v')",
    f"WITH r AS ({_RELATIONS})"  # noqa: S608 - constants
    " SELECT format('constraint %s on %s', c.conname, r.name), pg_get_constraintdef(c.oid)"
    " FROM r JOIN pg_constraint AS c ON c.conrelid = r.oid WHERE c.contype <> 'n'",
    f"WITH r AS ({_RELATIONS})"  # noqa: S608 - constants
    " SELECT format('index %s', i.indexrelid::regclass), concat_ws(' ', pg_get_indexdef(i.indexrelid),"
    " CASE WHEN NOT i.indisvalid THEN 'INVALID' END) FROM r JOIN pg_index AS i ON i.indrelid = r.oid",
    f"WITH r AS ({_RELATIONS})"  # noqa: S608 - constants
    " SELECT format('view %s', r.name), pg_get_viewdef(r.oid) FROM r WHERE r.relkind IN ('v', 'm')",
    f"WITH r AS ({_RELATIONS})"  # noqa: S608 - constants
    " SELECT format('partitions of %s', r.name), pg_get_partkeydef(r.oid) FROM r WHERE r.relkind = 'p'",
    f"WITH r AS ({_RELATIONS})"  # noqa: S608 - constants
    " SELECT format('sequence %s', r.name), concat_ws(' ', format_type(s.seqtypid, NULL), s.seqstart, s.seqincrement,"
    " s.seqmax, s.seqmin, s.seqcache, s.seqcycle) FROM r JOIN pg_sequence AS s ON s.seqrelid = r.oid",
)


async def read(target: ConnectTarget) -> dict[str, str]:
    """Return the name and the definition of every object in our schemas, with the schemas' names as in the models.

    Raises `DatabaseError`.
    """
    with translate_errors():
        target = await located(target)
        placement = target.placement or Placement()
        connection = await asyncpg.connect(**target.connect_kwargs(), timeout=30, command_timeout=60)
        try:
            await apply_settings(connection)
            rows = [row for query in _QUERIES for row in await connection.fetch(query, placement.main, placement.ops)]
        finally:
            await connection.close(timeout=5)
    return {_spell(row[0], placement): _spell(row[1], placement) for row in rows}


def _spell(definition: str | None, placement: Placement) -> str:
    """Return what PostgreSQL says, with the names of the schemas as in the models."""
    text = definition or ""
    for schema, spelled in ((placement.main, ""), (placement.ops, f"{OPS}.")):
        text = re.sub(rf'(?<![\w"$.]){re.escape(quote_identifier(schema))}\.', spelled, text)
    return text


async def build_from_models(
    target: ConnectTarget, *, metadata: MetaData = Base.metadata, role_membership: str = ROLE_MEMBERSHIP
) -> None:
    """Create everything in `models/` in an empty database, without the migrations."""

    def build(connection: Connection) -> None:
        if metadata is Base.metadata:
            import_models()
        connection.execute(text("CREATE SCHEMA ops"))
        metadata.create_all(connection)
        connection.execute(text(role_membership))
        connection.commit()

    await run_on_connection(target, build)


def differences(migrated: dict[str, str], modelled: dict[str, str]) -> list[str]:
    """Return one line for each object that the migrations and the models do not make alike."""
    lines = [f"not in the models: {name}" for name in sorted(migrated.keys() - modelled.keys())]
    lines += [f"not in the migrations: {name}" for name in sorted(modelled.keys() - migrated.keys())]
    lines += [
        f"differs: {name}: migrations {migrated[name]!r}, models {modelled[name]!r}"
        for name in sorted(migrated.keys() & modelled.keys())
        if migrated[name] != modelled[name]
    ]
    return lines


def mismatches(actual: dict[str, str], expected: dict[str, str], newest: dict[str, str]) -> list[str]:
    """Return one line for each object that shows that a schema is not at a revision.

    `expected`: what the revision makes. `newest`: what the newest one makes; tables in neither belong to others.
    """
    lines = [f"missing: {name}" for name in sorted(expected.keys() - actual.keys())]
    lines += [f"differs: {name}" for name in sorted(expected.keys() & actual.keys()) if expected[name] != actual[name]]
    relations = {relation for relation in map(_relation, expected) if relation}
    lines += [
        f"unexpected: {name}"
        for name in sorted(actual.keys() - expected.keys())
        if name in newest or _relation(name) in relations
    ]
    return lines


def _relation(name: str) -> str | None:
    """Return the relation that an object belongs to; None for an index, whose name does not tell."""
    kind, _, rest = name.partition(" ")
    if kind == "column":
        return rest.rpartition(".")[0]
    if kind == "constraint":
        return rest.rpartition(" on ")[2]
    return rest if kind in ("view", "sequence") else None

"""Describe the tables as PostgreSQL knows them: columns, keys, indexes and sizes, as text and as JSON."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import asyncpg

from models import Base
from utils.database import Pool
from utils.database.placement import Placement
from utils.database.pool import Record
from utils.exceptions import ValidationError
from utils.text import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Group


class Column(TypedDict):
    """One column."""

    name: str
    type: str
    nullable: bool
    #: The default as SQL, or the expression of a generated column; None without.
    default: str | None
    generated: bool
    comment: str | None


class Index(TypedDict):
    """One index, including that of a primary key."""

    name: str
    definition: str
    bytes: int


class Table(TypedDict):
    """One table or view; partitions count with their table."""

    schema: str
    #: The name as SQL of ours spells it, with a schema where it needs one.
    label: str
    name: str
    #: table, partitioned table, view or materialized view.
    kind: str
    comment: str | None
    #: The planner's estimate; None for a view, and if the table was never analyzed.
    estimated_rows: int | None
    #: With indexes and TOAST data; 0 for a view.
    bytes: int
    partitions: int
    columns: list[Column]
    #: Primary key, unique, foreign key and check constraints by name.
    keys: dict[str, str]
    indexes: list[Index]


#: SQLSTATEs of `to_regclass` for what cannot be the name of a table: syntax error, invalid name, other database.
NO_NAMES = ("42601", "42602", "0A000")
_TABLES = """
SELECT c.oid::bigint, n.nspname AS schema, c.relname AS name, c.relispartition,
    CASE c.relkind WHEN 'r' THEN 'table' WHEN 'p' THEN 'partitioned table' WHEN 'v' THEN 'view'
        ELSE 'materialized view' END AS kind,
    obj_description(c.oid, 'pg_class') AS comment, leaves.estimated_rows, coalesce(leaves.bytes, 0)::bigint AS bytes,
    CASE WHEN c.relkind = 'p' THEN leaves.number ELSE 0 END AS partitions
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
CROSS JOIN LATERAL (
    SELECT count(*) AS number, sum(l.reltuples::numeric) FILTER (WHERE l.reltuples >= 0)::bigint AS estimated_rows,
        sum(pg_total_relation_size(l.oid)) AS bytes
    FROM pg_class AS l WHERE l.relkind IN ('r', 'm')
        AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf))
) AS leaves
WHERE c.relkind IN ('r', 'p', 'v', 'm')
    AND CASE WHEN $1::text IS NULL THEN NOT c.relispartition AND n.nspname = ANY($2::text[])
        ELSE c.oid = to_regclass($1) END
ORDER BY n.nspname <> ($2::text[])[1], n.nspname, c.relname
"""
_COLUMNS = """
SELECT a.attrelid::bigint AS oid, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
    NOT a.attnotnull AS nullable, pg_get_expr(d.adbin, d.adrelid) AS default, a.attgenerated <> '' AS generated,
    col_description(a.attrelid, a.attnum) AS comment
FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = ANY($1::bigint[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attrelid, a.attnum
"""
_KEYS = """
SELECT conrelid::bigint AS oid, conname AS name, pg_get_constraintdef(oid) AS definition
FROM pg_constraint WHERE conrelid = ANY($1::bigint[]) AND contype IN ('p', 'u', 'f', 'c', 'x')
ORDER BY conrelid, contype <> 'p', conname
"""
_INDEXES = """
SELECT i.indrelid::bigint AS oid, c.relname AS name, pg_get_indexdef(i.indexrelid) AS definition,
    (SELECT sum(pg_relation_size(l.oid)) FROM pg_class AS l WHERE l.relkind = 'i'
        AND (l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid) WHERE isleaf)))::bigint AS bytes
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
WHERE i.indrelid = ANY($1::bigint[]) ORDER BY i.indrelid, NOT i.indisprimary, c.relname
"""


async def describe(pool: Pool, table: str | None = None) -> list[Table]:
    """Return every table and view in our schemas, or the one that `table` names, with or without its schema.

    The result is plain JSON. Raises `ValidationError` when there is no such table.
    """
    async with pool.transaction(isolation="repeatable_read", readonly=True) as connection:
        schemas = pool.placement.schemas()
        try:
            relations = await connection.fetch(_TABLES, None if table is None else pool.placement.adapt(table), schemas)
        except asyncpg.PostgresError as exc:
            if exc.sqlstate not in NO_NAMES:
                raise
            raise ValidationError(f"{table!r:.60} is not the name of a table: {exc.args[0]}") from exc
        if table is not None and not relations:
            ours = await connection.fetch(_TABLES, None, schemas)
            names = [pool.placement.shown(row["schema"], row["name"]) for row in ours]
            similar = difflib.get_close_matches(table, names) or names
            raise ValidationError(
                f"there is no table {table} in {pool.target}; there is {', '.join(similar) or 'none at all'}"
            )
        oids = [row["oid"] for row in relations]
        columns, keys, indexes = [
            _group_by_table(await connection.fetch(query, oids)) for query in (_COLUMNS, _KEYS, _INDEXES)
        ]
    comments = _comments_of_models(pool.placement)
    return [
        Table(
            schema=row["schema"],
            label=pool.placement.shown(row["schema"], row["name"]),
            name=row["name"],
            kind=row["kind"],
            comment=row["comment"] or comments.get((row["schema"], row["name"])),
            estimated_rows=row["estimated_rows"],
            bytes=row["bytes"],
            partitions=row["partitions"],
            columns=[Column(**column) for column in columns.get(row["oid"], [])],  # type: ignore[typeddict-item]
            keys={key["name"]: key["definition"] for key in keys.get(row["oid"], [])},
            indexes=[Index(**index) for index in indexes.get(row["oid"], [])],  # type: ignore[typeddict-item]
        )
        for row in relations
    ]


def _group_by_table(records: Sequence[Record]) -> dict[int, list[dict[str, Any]]]:
    tables: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        row = dict(record)
        tables.setdefault(row.pop("oid"), []).append(row)
    return tables


def _comments_of_models(placement: Placement) -> dict[tuple[str, str], str]:
    """Return the first line of each model's docstring: a comment for tables that have none in the database."""
    classes = [mapper.class_ for mapper in Base.registry.mappers]
    return {
        (placement.resolve(model.__table__.schema), model.__table__.name): (model.__doc__ or "").split("\n")[0]
        for model in classes
    }


def plain(tables: Sequence[Table]) -> str:
    """Return tables as text, one line for each column, key and index."""
    lines: list[str] = []
    for table in tables:
        lines += [_headline(table)] + ([f"  {table['comment']}"] if table["comment"] else [])
        widths = [max((len(column[part]) for column in table["columns"]), default=0) for part in ("name", "type")]
        for column in table["columns"]:
            details = "  ".join(filter(None, _details(column)))
            lines.append(f"  {column['name']:<{widths[0]}}  {column['type']:<{widths[1]}}  {details}".rstrip())
        lines += [f"  key    {name}: {definition}" for name, definition in table["keys"].items()]
        lines += [f"  index  {index['definition']} ({format_bytes(index['bytes'])})" for index in table["indexes"]]
        lines.append("")
    return "\n".join(lines).rstrip()


def pretty(tables: Sequence[Table]) -> Group:
    """Return tables for `rich.console.Console.print`."""
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    parts: list[Grid | Text] = []
    for table in tables:
        footer = "\n".join(
            [f"{name}: {definition}" for name, definition in table["keys"].items()]
            + [f"{index['definition']} ({format_bytes(index['bytes'])})" for index in table["indexes"]]
        )
        parts.append(Text(_headline(table), style="bold"))
        if table["comment"]:
            parts.append(Text(table["comment"]))
        has_comments = any(column["comment"] for column in table["columns"])
        grid = Grid("column", "type", "", "default", *(["comment"] if has_comments else []))
        for column in table["columns"]:
            cells = [column["name"], column["type"], *_details(column)][: len(grid.columns)]
            grid.add_row(*(Text(cell) for cell in cells))
        parts += [grid, Text(footer + "\n", style="dim")]
    return Group(*parts)


def _headline(table: Table) -> str:
    rows = (
        "rows not estimated yet"
        if table["estimated_rows"] is None
        else f"about {format_count(table['estimated_rows'], 'row')}"
    )
    parts = [f"{table['label']} ({table['kind']}"]
    if table["kind"] != "view":
        parts += [rows, format_bytes(table["bytes"])]
    if table["partitions"]:
        parts.append(f"partitions: {table['partitions']}")
    return ", ".join(parts) + ")"


def _details(column: Column) -> tuple[str, str, str]:
    """Return whether a column is nullable, its default, and its comment, as text."""
    default = column["default"] or ""
    if column["generated"]:
        default = f"generated: {default}"
    return "" if column["nullable"] else "not null", default, column["comment"] or ""

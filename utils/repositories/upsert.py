"""Many rows in one statement: sorted by key, each column an array, and only what differs is written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import orjson
from sqlalchemy import ARRAY, JSON, Column, Table, Text, and_, bindparam, cast, column, func, or_, select
from sqlalchemy.dialects.postgresql import Insert, insert

from models import Part, part_of
from utils.exceptions import ValidationError

Row = Mapping[str, Any]

#: Rows after which others get their turn: some 3 ms of work.
PAUSE = 2_000


def written_columns(table: Table) -> frozenset[str]:
    """Return the columns that may be given: all but those that the database works out."""
    return frozenset(column.name for column in table.columns if column.computed is None)


def column_with(table: Table, part: Part) -> Column[Any] | None:
    """Return the column that is this to the merge, None when the table has none."""
    return next((column for column in table.columns if part_of(column) is part), None)


async def in_key_order(table: Table, rows: Iterable[Row]) -> tuple[tuple[str, ...], list[Row]]:
    """Return the columns of the rows, and the rows by key; of two rows with one key the later stays.

    Raises `ValidationError` when rows differ in their columns, lack a key, or have a column that cannot be written.
    """
    keys = tuple(key.name for key in table.primary_key.columns)
    by_key: dict[tuple[Any, ...], Row] = {}
    names: tuple[str, ...] = ()
    for number, row in enumerate(rows):
        if not number:
            names = tuple(row)
            check_columns(table, names)
            if lacking := set(keys) - set(names):
                raise ValidationError(f"rows of {table.name} lack {', '.join(sorted(lacking))}: the key must be given")
        elif row.keys() != set(names):
            odd = ", ".join(sorted(set(names) ^ row.keys()))
            raise ValidationError(
                f"row {number} of {table.name} differs from row 0 in the columns {odd}: give all alike"
            )
        elif number % PAUSE == 0:
            await asyncio.sleep(0)
        by_key[tuple([row[key] for key in keys])] = row
    try:
        return names, [by_key[key] for key in sorted(by_key)]
    except TypeError as exc:
        raise ValidationError(f"keys of {table.name} are whole numbers: {exc}") from exc


def check_columns(table: Table, names: Iterable[str]) -> None:
    """Raise `ValidationError` for names that are no columns, or columns that the database works out itself."""
    if unknown := set(names) - written_columns(table):
        raise ValidationError(
            f"{', '.join(sorted(unknown))} cannot be written in {table.name}: its columns are"
            f" {', '.join(sorted(written_columns(table)))}"
        )


@cache
def statement(table: Table, names: tuple[str, ...]) -> Insert:
    """Return the upsert of rows with these columns; its parameters are `arrays`' lists.

    Rows that are as given already are neither written nor locked. A row that had gone is there again, unless the rows
    themselves say when it went.
    """
    columns = [table.columns[name] for name in names]
    kinds = [Text() if _as_text(one) is not None else one.type for one in columns]
    lists = [bindparam(f"all_{name}", type_=ARRAY(kind)) for name, kind in zip(names, kinds, strict=True)]
    given = (
        func.unnest(*lists)
        .table_valued(*(column(name, kind) for name, kind in zip(names, kinds, strict=True)), name="given")
        .render_derived()
    )
    values = {
        one.name: cast(given.c[one.name], one.type) if _as_text(one) is not None else given.c[one.name]
        for one in columns
    }
    keys = list(table.primary_key.columns)
    changing = [one for one in columns if not one.primary_key]
    compared = [one for one in changing if part_of(one) is not Part.TOUCHED]
    gone, touched = column_with(table, Part.TOMBSTONE), column_with(table, Part.TOUCHED)
    returns = [gone.is_not(None)] if gone is not None and gone.name not in names else []
    differs = [one.is_distinct_from(values[one.name]) for one in compared] + returns
    wanted = (
        select(*values.values())
        .select_from(given.outerjoin(table, and_(*(key == given.c[key.name] for key in keys))))
        .where(or_(keys[0].is_(None), *differs))
    )
    upsert = insert(table).from_select(list(names), wanted, include_defaults=False)
    if not differs:
        return upsert.on_conflict_do_nothing(index_elements=keys)
    changes: dict[str, Any] = {one.name: upsert.excluded[one.name] for one in changing}
    if gone is not None and returns:
        changes[gone.name] = None
    if touched is not None:
        changes.setdefault(touched.name, func.now())
    # Compared once more, for a row that somebody else wrote meanwhile.
    still = [one.is_distinct_from(upsert.excluded[one.name]) for one in compared] + returns
    return upsert.on_conflict_do_update(index_elements=keys, set_=changes, where=or_(*still))


def arrays(table: Table, names: tuple[str, ...], rows: list[Row]) -> dict[str, list[Any]]:
    """Return the parameters of `statement` for these rows: a list for each column; raises `ValidationError`."""
    given: dict[str, list[Any]] = {}
    for name in names:
        encode = _as_text(table.columns[name])
        values = [row[name] for row in rows]
        try:
            given[f"all_{name}"] = values if encode is None else [None if v is None else encode(v) for v in values]
        except TypeError as exc:
            raise ValidationError(f"a value of {table.name}.{name} cannot be written: {exc}") from exc
    return given


def _as_text(one: Column[Any]) -> Callable[[Any], str] | None:
    """Return what writes a value as text: UNNEST would flatten arrays of arrays."""
    if isinstance(one.type, ARRAY):
        return _array_literal
    if isinstance(one.type, JSON):
        return lambda value: orjson.dumps(value).decode()
    return None


def _array_literal(values: Iterable[Any]) -> str:
    """Write an array as PostgreSQL reads it (PostgreSQL manual, 8.15.2)."""
    return "{" + ",".join(_element(value) for value in values) + "}"


def _element(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)

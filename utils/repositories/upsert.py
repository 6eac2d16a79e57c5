"""Bulk upserts: one statement for many rows, with one array parameter per column; unchanged rows are not written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import orjson
from sqlalchemy import ARRAY, JSON, Column, Table, Text, and_, bindparam, cast, column, func, or_, select
from sqlalchemy.dialects.postgresql import Insert, insert

from models import Part, part_of
from utils.database.sql import array_literal
from utils.exceptions import ValidationError

Row = Mapping[str, Any]

#: Rows between two yields to the event loop, about 3 ms of work.
YIELD_EVERY = 2_000


def written_columns(table: Table) -> frozenset[str]:
    """Return the names of all columns except generated ones."""
    return frozenset(column.name for column in table.columns if column.computed is None)


def find_column(table: Table, part: Part) -> Column[Any] | None:
    """Return the table's column with this part in the merge, or None if it has none."""
    return next((column for column in table.columns if part_of(column) is part), None)


async def sort_by_key(table: Table, rows: Iterable[Row]) -> tuple[tuple[str, ...], list[Row]]:
    """Return the column names and the rows sorted by key; of rows with the same key only the last is kept.

    Raises `ValidationError` if rows have different columns, no key, or a column that cannot be written.
    """
    keys = tuple(key.name for key in table.primary_key.columns)
    by_key: dict[tuple[Any, ...], Row] = {}
    names: tuple[str, ...] = ()
    for number, row in enumerate(rows):
        if not number:
            names = tuple(row)
            check_columns(table, names)
            if missing := set(keys) - set(names):
                raise ValidationError(f"rows of {table.name} have no {', '.join(sorted(missing))}: the key is required")
        elif row.keys() != set(names):
            different = ", ".join(sorted(set(names) ^ row.keys()))
            raise ValidationError(
                f"row {number} of {table.name} and row 0 differ in the columns {different}: use the same for all"
            )
        elif number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        by_key[tuple([row[key] for key in keys])] = row
    try:
        return names, [by_key[key] for key in sorted(by_key)]
    except TypeError as exc:
        raise ValidationError(f"keys of {table.name} cannot be compared with each other: {exc}") from exc


def check_columns(table: Table, names: Iterable[str]) -> None:
    """Raise `ValidationError` for names that are not columns, and for generated columns."""
    if unknown := set(names) - written_columns(table):
        raise ValidationError(
            f"{table.name} has no writable columns {', '.join(sorted(unknown))}: choose from"
            f" {', '.join(sorted(written_columns(table)))}"
        )


@cache
def upsert_statement(table: Table, names: tuple[str, ...]) -> Insert:
    """Return the upsert for rows with these columns; its parameters come from `array_parameters`.

    Unchanged rows are neither written nor locked. Tombstones are cleared, unless the rows contain that column.
    """
    columns = [table.columns[name] for name in names]
    types = [Text() if _text_encoder(col) is not None else col.type for col in columns]
    parameters = [bindparam(f"all_{name}", type_=ARRAY(type_)) for name, type_ in zip(names, types, strict=True)]
    given = (
        func.unnest(*parameters)
        .table_valued(*(column(name, type_) for name, type_ in zip(names, types, strict=True)), name="given")
        .render_derived()
    )
    values = {
        col.name: cast(given.c[col.name], col.type) if _text_encoder(col) is not None else given.c[col.name]
        for col in columns
    }
    keys = list(table.primary_key.columns)
    updated = [col for col in columns if not col.primary_key]
    compared = [col for col in updated if part_of(col) is not Part.TOUCHED]
    tombstone, touched = find_column(table, Part.TOMBSTONE), find_column(table, Part.TOUCHED)
    clears_tombstone = tombstone is not None and tombstone.name not in names
    has_tombstone = [tombstone.is_not(None)] if tombstone is not None and clears_tombstone else []
    differs = [col.is_distinct_from(values[col.name]) for col in compared] + has_tombstone
    new_or_different = (
        select(*values.values())
        .select_from(given.outerjoin(table, and_(*(key == given.c[key.name] for key in keys))))
        .where(or_(keys[0].is_(None), *differs))
    )
    upsert = insert(table).from_select(list(names), new_or_different, include_defaults=False)
    if not differs:
        return upsert.on_conflict_do_nothing(index_elements=keys)
    changes: dict[str, Any] = {col.name: upsert.excluded[col.name] for col in updated}
    if tombstone is not None and clears_tombstone:
        changes[tombstone.name] = None
    if touched is not None:
        changes.setdefault(touched.name, func.now())
    # Compared again, because another transaction may have written the row in the meantime.
    still_differs = [col.is_distinct_from(upsert.excluded[col.name]) for col in compared] + has_tombstone
    return upsert.on_conflict_do_update(index_elements=keys, set_=changes, where=or_(*still_differs))


def array_parameters(table: Table, names: tuple[str, ...], rows: list[Row]) -> dict[str, list[Any]]:
    """Return the parameters of `upsert_statement` for these rows. Raises `ValidationError` for unfit values."""
    parameters: dict[str, list[Any]] = {}
    for name in names:
        encode = _text_encoder(table.columns[name])
        values = [row[name] for row in rows]
        try:
            parameters[f"all_{name}"] = (
                values if encode is None else [None if value is None else encode(value) for value in values]
            )
        except TypeError as exc:
            raise ValidationError(f"{table.name}.{name} has a value that cannot be stored: {exc}") from exc
    return parameters


def _text_encoder(col: Column[Any]) -> Callable[[Any], str] | None:
    """Return the function that encodes this column's values as text, or None: UNNEST would flatten nested arrays."""
    if isinstance(col.type, ARRAY):
        return array_literal
    if isinstance(col.type, JSON):
        return lambda value: orjson.dumps(value).decode()
    return None

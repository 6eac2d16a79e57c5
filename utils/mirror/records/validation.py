"""Checks that rows fit their tables before they are sent: one bad value would make the driver refuse a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Boolean, DateTime, Integer, SmallInteger, Text
from sqlalchemy.types import TypeEngine

from utils.exceptions import ValidationError
from utils.mirror.records.rows import Row, key_columns, table_of, value_columns

#: Years accepted in timestamps. Years 1 and 9999 may leave Python's range when converted to UTC.
_YEARS = (2, 9998)
#: Largest values of PostgreSQL's integer types (PostgreSQL documentation, "Numeric Types").
_LIMITS: dict[type[TypeEngine[Any]], int] = {BigInteger: 2**63 - 1, Integer: 2**31 - 1, SmallInteger: 2**15 - 1}


def validate_row(row: Row) -> Row:
    """Return the row unchanged. Raises `ValidationError` if its table cannot hold it."""
    names = tuple(name for name in value_columns(row.table) if name in row.values)
    validate_record(row.table, names, (*row.key, *(row.values[name] for name in names)))
    return row


def validate_record(table: str, columns: tuple[str, ...], record: tuple[Any, ...]) -> None:
    """Check one record (key, then columns). Raises `ValidationError` that names the first invalid value."""
    for column, value in zip(_validators(table, columns), record, strict=False):
        if not column.accepts((value,)):
            raise ValidationError(f"{table}.{column.name} cannot hold {value!r:.80}: Discord sent a malformed payload")


def all_valid(table: str, columns: tuple[str, ...], records: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether the table can hold every record (key, then columns, then anything)."""
    return all(
        column.accepts(values)
        for column, values in zip(_validators(table, columns), zip(*records, strict=True), strict=False)
    )


def filter_valid(
    table: str,
    columns: tuple[str, ...],
    records: Sequence[tuple[Any, ...]],
    on_invalid: Callable[[tuple[Any, ...], ValidationError], None],
) -> Sequence[tuple[Any, ...]]:
    """Return the records that the table can hold; `on_invalid` is called for each of the others."""
    if not records or all_valid(table, columns, records):
        return records
    valid = []
    for record in records:
        try:
            validate_record(table, columns, record)
        except ValidationError as error:
            on_invalid(record, error)
        else:
            valid.append(record)
    return valid


class _ColumnValidator:
    """Checks a whole column of values at once; comparing sets of types costs a few nanoseconds a value."""

    __slots__ = ("is_timestamp", "item_types", "limit", "name", "types")

    def __init__(self, name: str, type_: TypeEngine[Any], nullable: bool) -> None:
        self.name = name
        #: The largest absolute value of integers; None for other types.
        self.limit: int | None = None
        #: Types of an array's items; None for other types.
        self.item_types: frozenset[type] | None = None
        self.is_timestamp = isinstance(type_, DateTime)
        types: set[type] = {type(None)} if nullable else set()
        if isinstance(type_, ARRAY):
            types.add(list)
            item = type_.item_type
            self.item_types = frozenset({str} if isinstance(item, Text) else {int})
            self.limit = None if isinstance(item, Text) else _LIMITS[type(item)]
        elif isinstance(type_, (SmallInteger, BigInteger, Integer)):
            types.add(int)
            self.limit = _LIMITS[type(type_)]
        elif isinstance(type_, Boolean):
            types.add(bool)
        elif isinstance(type_, DateTime):
            types.add(datetime)
        else:  # text, and jsonb, which is passed as text
            types.add(str)
        self.types = frozenset(types)

    def accepts(self, values: Sequence[Any]) -> bool:
        """Return whether the column can hold every value."""
        if not set(map(type, values)) <= self.types:
            return False
        if self.item_types is not None:
            values = list(chain.from_iterable(filter(None, values)))
            if not set(map(type, values)) <= self.item_types:
                return False
        if self.is_timestamp:
            return all(_YEARS[0] <= value.year <= _YEARS[1] for value in values if value is not None)
        if self.limit is None:
            return True
        numbers = list(filter(None, values))
        return not numbers or (max(numbers) <= self.limit and min(numbers) >= -self.limit - 1)


@cache
def _validators(table: str, columns: tuple[str, ...]) -> tuple[_ColumnValidator, ...]:
    described = table_of(table).columns
    names = (*key_columns(table), *columns)
    return tuple(_ColumnValidator(name, described[name].type, bool(described[name].nullable)) for name in names)

"""Checks that rows fit their tables, before a driver finds out in the middle of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Boolean, DateTime, Integer, SmallInteger, Text
from sqlalchemy.types import TypeEngine

from utils.exceptions import ValidationError
from utils.mirror.records.rows import key_columns, table_of

_NONE = type(None)
#: The calendar's first and last years are left out: moved to UTC they may leave what the driver can tell Postgres.
_YEARS = (2, 9998)
#: Largest values of Postgres's integer types (PostgreSQL documentation, "Numeric Types").
_LIMITS: dict[type[TypeEngine[Any]], int] = {BigInteger: 2**63 - 1, Integer: 2**31 - 1, SmallInteger: 2**15 - 1}


class _Column:
    """Tells whether a whole column of values can be stored; sets of types keep it at a few nanoseconds a value."""

    __slots__ = ("dated", "kinds", "limit", "listed", "name")

    def __init__(self, name: str, type_: TypeEngine[Any], nullable: bool) -> None:
        self.name = name
        self.limit: int | None = None
        self.listed: frozenset[type] | None = None
        self.dated = isinstance(type_, DateTime)
        kinds: set[type] = {_NONE} if nullable else set()
        if isinstance(type_, ARRAY):
            kinds.add(list)
            item = type_.item_type
            self.listed = frozenset({str} if isinstance(item, Text) else {int})
            self.limit = None if isinstance(item, Text) else _LIMITS[type(item)]
        elif isinstance(type_, (SmallInteger, BigInteger, Integer)):
            kinds.add(int)
            self.limit = _LIMITS[type(type_)]
        elif isinstance(type_, Boolean):
            kinds.add(bool)
        elif isinstance(type_, DateTime):
            kinds.add(datetime)
        elif isinstance(type_, Text):
            kinds.add(str)
        else:  # jsonb, handed over as text
            kinds.add(str)
        self.kinds = frozenset(kinds)

    def fits(self, values: Sequence[Any]) -> bool:
        """Return whether every value can be stored in the column."""
        if not set(map(type, values)) <= self.kinds:
            return False
        if self.listed is not None:
            values = list(chain.from_iterable(filter(None, values)))
            if not set(map(type, values)) <= self.listed:
                return False
        if self.dated:
            return all(_YEARS[0] <= value.year <= _YEARS[1] for value in values if value is not None)
        if self.limit is None:
            return True
        numbers = list(filter(None, values))
        return not numbers or (max(numbers) <= self.limit and min(numbers) >= -self.limit - 1)


@cache
def _columns(table: str, columns: tuple[str, ...]) -> tuple[_Column, ...]:
    described = table_of(table).columns
    names = (*key_columns(table), *columns)
    return tuple(_Column(name, described[name].type, bool(described[name].nullable)) for name in names)


def fits(table: str, columns: tuple[str, ...], records: Sequence[tuple[Any, ...]]) -> bool:
    """Return whether every record (key, then columns, then anything) can be stored in the table."""
    return all(
        column.fits(values)
        for column, values in zip(_columns(table, columns), zip(*records, strict=True), strict=False)
    )


def require(table: str, columns: tuple[str, ...], record: tuple[Any, ...]) -> None:
    """Raise `ValidationError` naming the first value of one record that cannot be stored in the table."""
    for column, value in zip(_columns(table, columns), record, strict=False):
        if not column.fits((value,)):
            raise ValidationError(f"{table}.{column.name} cannot hold {value!r:.80}: Discord sent a malformed payload")


def sifted(
    table: str,
    columns: tuple[str, ...],
    records: Sequence[tuple[Any, ...]],
    refuse: Callable[[tuple[Any, ...], ValidationError], None],
) -> Sequence[tuple[Any, ...]]:
    """Return the records that can be stored; `refuse` is told of each of the others."""
    if not records or fits(table, columns, records):
        return records
    kept = []
    for record in records:
        try:
            require(table, columns, record)
        except ValidationError as error:
            refuse(record, error)
        else:
            kept.append(record)
    return kept

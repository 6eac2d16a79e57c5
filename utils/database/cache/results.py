"""What a result is kept under, and how it is handed out so that nobody can change what the next one gets."""

from __future__ import annotations

import datetime
import ipaddress
import uuid
from collections.abc import Callable, Hashable, Iterable
from decimal import Decimal
from enum import Enum
from typing import Any

import asyncpg

try:
    # A Record cannot be made or copied by public means; a test tells when this has gone.
    from asyncpg.protocol.protocol import _create_record  # type: ignore[attr-defined]
except ImportError:
    _create_record = None

Key = tuple[Hashable, ...]

#: Rows of a result that is still looked through and kept: 5,000 of ten cells take about 3 ms.
MOST_ROWS = 5_000

#: Types whose equal values are sent to the server as equal bytes.
_PLAIN = frozenset({int, str, bool, bytes, type(None), uuid.UUID, datetime.date, datetime.timedelta,
                    ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network,
                    ipaddress.IPv4Interface, ipaddress.IPv6Interface})  # fmt: skip
_IMMUTABLE = _PLAIN | {float, Decimal, datetime.datetime, datetime.time, asyncpg.Range, asyncpg.BitString,
                       asyncpg.Point, asyncpg.Box, asyncpg.Line, asyncpg.LineSegment, asyncpg.Circle}  # fmt: skip


class _Unfit(Exception):
    """A value that nothing is known about: it is neither compared nor copied."""


def key_of(verb: str, sql: str, args: tuple[Any, ...]) -> Key | None:
    """Return what a result is kept under, or None when an argument cannot be frozen.

    Arguments that are equal but not the same to the server (1, True and 1.0) give different keys.
    """
    if not args:
        return verb, sql
    types = tuple(map(type, args))
    if _PLAIN.issuperset(types):
        return verb, sql, args, types
    try:
        return verb, sql, tuple(map(_frozen, args)), types
    except _Unfit:
        return None


def _frozen(value: Any) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is float or kind is Decimal:
        return kind, repr(value)  # 0.0 == -0.0, Decimal("1.0") == Decimal("1.00")
    if kind is datetime.datetime or kind is datetime.time:
        return kind, value.isoformat(), value.fold
    if kind is list or kind is tuple:
        return kind, tuple(map(_frozen, value))
    if kind is dict:
        return kind, tuple((_frozen(name), _frozen(item)) for name, item in value.items())
    if isinstance(value, Enum):
        return kind, value.name
    raise _Unfit


class Kept:
    """A result that is kept: `expires` is on the cache's clock, `tables` is what it was read from."""

    __slots__ = ("_copy", "_value", "expires", "tables")

    def __init__(self, value: Any, expires: float, tables: frozenset[str], copy: Callable[[Any], Any] | None) -> None:
        self._value: Any = value
        self.expires: float = expires
        self.tables: frozenset[str] = tables
        #: Copies what has a list or dict among its cells, for each reader; None: there is none.
        self._copy: Callable[[Any], Any] | None = copy

    def take(self) -> Any:
        """Return the result for one reader, who may do with it as he likes."""
        value = self._value
        if self._copy is not None:
            return self._copy(value)
        return value.copy() if type(value) is list else value


def keep(value: Any, expires: float, tables: frozenset[str]) -> Kept | None:
    """Make a result ready to be handed out many times; None when it is too large or holds what cannot be copied."""
    if type(value) is list and len(value) > MOST_ROWS:
        return None
    is_rows = type(value) is list and all(type(row) is asyncpg.Record for row in value)
    try:
        is_mutable = _any_mutable(value) if is_rows else _is_mutable(value)
    except _Unfit:
        return None
    copy = (_copy_rows if is_rows else _copy) if is_mutable else None
    return Kept(value, expires, tables, copy)


def _is_mutable(value: Any) -> bool:
    kind = type(value)
    if kind in _IMMUTABLE:
        return False
    if kind is asyncpg.Record:
        if _IMMUTABLE.issuperset(map(type, value.values())):
            return False
        if not _any_mutable(value.values()):
            return False
        if _create_record is None or len(set(value.keys())) < len(value):
            raise _Unfit
        return True
    if kind is tuple:
        return _any_mutable(value)
    if kind is list:
        _any_mutable(value)
        return True
    if kind is dict:
        _any_mutable(value.values())
        return True
    raise _Unfit


def _any_mutable(values: Iterable[Any]) -> bool:
    return True in list(map(_is_mutable, values))  # all are looked at: one may be unfit


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return [_copy(item) for item in value]
    if kind is dict:
        return {name: _copy(item) for name, item in value.items()}
    if kind is tuple:
        return tuple([_copy(item) for item in value])
    return _copy_rows([value])[0]


def _copy_rows(rows: list[Any]) -> list[Any]:
    names = {name: position for position, name in enumerate(rows[0].keys())}
    return [_create_record(names, tuple([_copy(cell) for cell in row.values()])) for row in rows]

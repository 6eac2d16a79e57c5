"""Cached results: their keys, and how readers get copies that they may modify."""

from __future__ import annotations

import datetime
import ipaddress
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from decimal import Decimal
from enum import Enum
from typing import Any

import asyncpg

try:
    # asyncpg has no public way to create or copy a Record. A test fails when this one is removed.
    from asyncpg.protocol.protocol import _create_record  # type: ignore[attr-defined]
except ImportError:
    _create_record = None

Key = tuple[Hashable, ...]

#: Larger results are not cached: checking 5,000 rows of ten cells takes about 3 ms.
MAX_ROWS = 5_000

#: Types whose equal values are encoded to equal bytes.
_PLAIN = frozenset({int, str, bool, bytes, type(None), uuid.UUID, datetime.date, datetime.timedelta,
                    ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network,
                    ipaddress.IPv4Interface, ipaddress.IPv6Interface})  # fmt: skip
_IMMUTABLE = _PLAIN | {float, Decimal, datetime.datetime, datetime.time, asyncpg.Range, asyncpg.BitString,
                       asyncpg.Point, asyncpg.Box, asyncpg.Line, asyncpg.LineSegment, asyncpg.Circle}  # fmt: skip


class _NotCacheable(Exception):
    """A value of a type that may be neither comparable nor copyable."""


def cache_key(verb: str, sql: str, args: tuple[Any, ...], reads: Sequence[str] | None = None) -> Key | None:
    """Return the key of a result, or None when an argument has an unknown type.

    Arguments that are equal in Python but not for the server (1, True and 1.0) give different keys, and so do different
    `reads`.
    """
    if reads is not None:
        key = cache_key(verb, sql, args)
        return None if key is None else (*key, tuple(reads))
    if not args:
        return verb, sql
    types = tuple(map(type, args))
    if _PLAIN.issuperset(types):
        return verb, sql, args, types
    try:
        return verb, sql, tuple(map(_frozen, args)), types
    except _NotCacheable:
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
    raise _NotCacheable


class CachedResult:
    """A cached result. `expires` is a time of the cache's clock, `tables` are those that it was read from."""

    __slots__ = ("_copy", "_value", "expires", "tables")

    def __init__(self, value: Any, expires: float, tables: frozenset[str], copy: Callable[[Any], Any] | None) -> None:
        self._value: Any = value
        self.expires: float = expires
        self.tables: frozenset[str] = tables
        #: Copies the result for each reader; None: no cell is a list or dict.
        self._copy: Callable[[Any], Any] | None = copy

    def value(self) -> Any:
        """Return the result for one reader, which may modify it."""
        value = self._value
        if self._copy is not None:
            return self._copy(value)
        return value.copy() if type(value) is list else value


def make_cacheable(value: Any, expires: float, tables: frozenset[str]) -> CachedResult | None:
    """Return a result to be cached; None when it is too large or contains a value that cannot be copied."""
    if type(value) is list and len(value) > MAX_ROWS:
        return None
    is_rows = type(value) is list and all(type(row) is asyncpg.Record for row in value)
    try:
        is_mutable = _any_mutable(value) if is_rows else _is_mutable(value)
    except _NotCacheable:
        return None
    copy = (_copy_rows if is_rows else _copy) if is_mutable else None
    return CachedResult(value, expires, tables, copy)


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
            raise _NotCacheable
        return True
    if kind is tuple:
        return _any_mutable(value)
    if kind is list:
        _any_mutable(value)
        return True
    if kind is dict:
        _any_mutable(value.values())
        return True
    raise _NotCacheable


def _any_mutable(values: Iterable[Any]) -> bool:
    return True in list(map(_is_mutable, values))  # no any(): every value must be checked, one may not be cacheable


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

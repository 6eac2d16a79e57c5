"""Rows that cogs add to batches: encoded when they are added, decoded and combined when they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from utils.exceptions import ValidationError
from utils.text import scrub_payload

#: What orjson does not do by itself: a time without a zone is one of UTC, as everywhere in the database.
_OPTIONS = orjson.OPT_NAIVE_UTC
#: The first byte of an encoded row; events of the mirror are arrays.
_FIRST_BYTE = b"{"
#: NUL in a text, as orjson writes it; PostgreSQL cannot store it.
_NUL = b"\\u0000"
#: A greater integer is a float once it is decoded, and cannot be encoded.
_MAX_INTEGER = 2**63 - 1
_NUMBERS = (int, float, Decimal)


class BatchTarget(NamedTuple):
    """Where rows go, and how rows of the same key are combined."""

    table: str
    #: The columns of the primary key.
    keys: tuple[str, ...]
    #: Columns whose values are added up; of all others the last value wins.
    increments: tuple[str, ...]
    #: The cog's name, for dead letters.
    cog: str


class BatchRow(NamedTuple):
    """A row of a batch as the queue and the journal have it: encoded, with its place in the queue."""

    stamp: int
    payload: bytes


class DecodedRow(NamedTuple):
    """A row of a batch as it is written."""

    stamp: int
    target: BatchTarget
    values: dict[str, Any]


@dataclass(slots=True)
class RowGroup:
    """Rows of one target that one statement writes: each key once, all with the same columns."""

    target: BatchTarget
    #: The columns beside the key, in the order of their names.
    columns: tuple[str, ...]
    #: What is written.
    combined: list[dict[str, Any]] = field(default_factory=list)
    #: What it was combined from, oldest first.
    rows: list[DecodedRow] = field(default_factory=list)


def encode_head(target: BatchTarget) -> bytes:
    """Return what every encoded row of a target begins with."""
    return orjson.dumps({"target": tuple(target)})[:-1] + b',"row":'


def encode_row(head: bytes, values: dict[str, Any], increments: Sequence[str]) -> bytes:
    """Encode a row for the queue and the journal. NUL and lone surrogates in texts are replaced.

    Raises `ValidationError` for a value that cannot be stored.
    """
    for name in increments:
        number = values.get(name, 0)
        if type(number) not in _NUMBERS:
            raise ValidationError(f"{name}: {number!r:.40} cannot be added up: expected a number")
    for name, value in values.items():
        if type(value) is float and not math.isfinite(value):
            raise ValidationError(f"{name}: {value!r} is not a finite number")
    try:
        encoded = orjson.dumps(values, _encode_other, _OPTIONS)
        if _NUL in encoded:
            encoded = orjson.dumps(scrub_payload(values), _encode_other, _OPTIONS)
    except TypeError:
        try:  # lone surrogates
            encoded = orjson.dumps(scrub_payload(values), _encode_other, _OPTIONS)
        except TypeError as error:
            raise ValidationError(f"the row {values!r:.200} cannot be stored: {error}") from error
    return head + encoded + b"}"


def _encode_other(value: object) -> str:
    """Return what PostgreSQL reads for a value that JSON has no form for."""
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, timedelta):
        return f"{value.days} days {value.seconds} seconds {value.microseconds} microseconds"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"\\x{bytes(value).hex()}"
    raise TypeError(f"no column takes a {type(value).__name__}")


def is_batch_row(payload: bytes) -> bool:
    """Return whether a journal's record is a row of a batch, not an event of the mirror."""
    return payload[:1] == _FIRST_BYTE


def payload_of(row: BatchRow) -> bytes:
    """Return the payload of the journal's record."""
    return row.payload


def decode_row(row: BatchRow) -> DecodedRow:
    """Decode a row. Raises `ValidationError` for anything that `encode_row` did not write."""
    try:
        record = orjson.loads(row.payload)
        table, keys, increments, cog = record["target"]
        return DecodedRow(row.stamp, _target(table, tuple(keys), tuple(increments), cog), record["row"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValidationError(f"invalid row of a batch in the journal: {row.payload[:80]!r}: {error!r}") from error


@lru_cache(1_000)
def _target(table: str, keys: tuple[str, ...], increments: tuple[str, ...], cog: str) -> BatchTarget:
    return BatchTarget(table, keys, increments, cog)


def group_rows(rows: Iterable[DecodedRow]) -> Iterator[RowGroup]:
    """Combine rows of the same key, and group what results by columns.

    Rows of different targets are never combined, and their groups come in the order of the rows.
    """
    part: list[DecodedRow] = []
    for row in rows:
        if part and part[-1].target != row.target:
            yield from _group_of_one_target(part)
            part = []
        part.append(row)
    if part:
        yield from _group_of_one_target(part)


def _group_of_one_target(rows: list[DecodedRow]) -> Iterator[RowGroup]:
    target = rows[0].target
    combined: dict[tuple[Any, ...], dict[str, Any]] = {}
    sources: dict[tuple[Any, ...], list[DecodedRow]] = {}
    for row in rows:
        key = tuple(str(row.values[name]) for name in target.keys)
        earlier = combined.get(key)
        if earlier is None:
            combined[key], sources[key] = dict(row.values), [row]
            continue
        sums = {
            name: _sum(earlier[name], row.values[name])
            for name in target.increments
            if name in earlier and name in row.values
        }
        combined[key] = earlier | row.values | sums
        sources[key].append(row)
    groups: dict[tuple[str, ...], RowGroup] = {}
    for key, values in combined.items():
        columns = tuple(sorted(values.keys() - set(target.keys)))
        group = groups.get(columns)
        if group is None:
            group = groups[columns] = RowGroup(target, columns)
        group.combined.append(values)
        group.rows += sources[key]
    for group in groups.values():
        group.rows.sort(key=lambda row: row.stamp)
        yield group


def _sum(first: Any, second: Any) -> Any:
    """Add two decoded numbers; a Decimal, and what is too large for JSON, is text."""
    if isinstance(first, str) or isinstance(second, str):
        return str(Decimal(str(first)) + Decimal(str(second)))
    total = first + second
    is_exact = abs(total) <= _MAX_INTEGER if isinstance(total, int) else math.isfinite(total)
    return total if is_exact else str(total)

"""Validation accepts exactly the values that PostgreSQL stores unchanged."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import asyncpg
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sqlalchemy import ARRAY, BigInteger, Boolean, DateTime, Integer, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB

from models import mirrored_tables
from tests.conftest import examples
from tests.mirror.tables import GUILD, empty, rows, write_groups
from utils.database import Pool
from utils.exceptions import DatabaseError, ValidationError
from utils.mirror.records.rows import Group, Mode, key_columns, value_columns
from utils.mirror.records.validation import all_valid, filter_valid, validate_record

COLUMNS = [(table, column) for table in sorted(mirrored_tables()) for column in value_columns(table)]

GOOD: dict[type, list[Any]] = {
    SmallInteger: [0, -1, 32767, -32768],
    Integer: [0, 2**31 - 1, -(2**31)],
    BigInteger: [0, 2**63 - 1, -(2**63)],
    Boolean: [True, False],
    Text: ["", "text", "漢字 🦀"],
    DateTime: [datetime(2024, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)],
    JSONB: ["{}", "[]", '{"a": [1, null]}', '"x"'],
}
BAD: dict[type, list[Any]] = {
    SmallInteger: [32768, -32769, True, "1", 1.0, [1]],
    Integer: [2**31, -(2**31) - 1, True, "1", 1.5],
    BigInteger: [2**63, -(2**63) - 1, False, "1", 1.0],
    Boolean: [0, 1, "true", []],
    Text: [1, True, b"x", ["x"], {}],
    DateTime: ["2024-01-01T00:00:00+00:00", 0, datetime(2024, 1, 1, tzinfo=UTC).date()],
    JSONB: [1, {"a": 1}, []],
}


def record(table: str, value: Any) -> tuple[Any, ...]:
    return (*range(1, len(key_columns(table)) + 1), value, 5)


def kind(table: str, column: str) -> type:
    return type(mirrored_tables()[table].columns[column].type)


@pytest.mark.parametrize(("table", "column"), COLUMNS)
def test_columns_accept_their_type_only(table: str, column: str) -> None:
    described = mirrored_tables()[table].columns[column]
    if isinstance(described.type, ARRAY):
        item = type(described.type.item_type)
        good: list[Any] = [[], *([value] for value in GOOD[item]), GOOD[item]]
        bad: list[Any] = [*([value] for value in BAD[item]), [None], [[GOOD[item][0]]], (GOOD[item][0],), "{}"]
    else:
        good, bad = GOOD[type(described.type)], BAD[type(described.type)]
    for value in good:
        assert all_valid(table, (column,), [record(table, value)]), value
    for value in bad:
        assert not all_valid(table, (column,), [record(table, value)]), value
        with pytest.raises(ValidationError, match=f"{table}.{column} cannot hold"):
            validate_record(table, (column,), record(table, value))
    assert all_valid(table, (column,), [record(table, None)]) is bool(described.nullable)


@pytest.mark.parametrize("key", [None, "1", 2**63, True, 1.0])
def test_rejects_invalid_keys(key: Any) -> None:
    assert not all_valid("members", ("nick",), [(GUILD, key, "n", 5)])
    assert not all_valid("members", ("nick",), [(key, 1, "n", 5)])


def test_filters_single_records() -> None:
    records = [(GUILD, number, number, 5) for number in (1, 2**31, 3)]
    refused: list[tuple[Any, ...]] = []
    bad = [(GUILD, 2, 2**31, 5)]
    kept = filter_valid("members", ("flags",), [records[0], *bad, records[2]], lambda row, _: refused.append(row))
    assert (list(kept), refused) == ([records[0], records[2]], bad)


def test_truncates_long_values_in_messages() -> None:
    with pytest.raises(ValidationError) as caught:
        validate_record("members", ("nick",), (GUILD, 1, ["x" * 10_000]))
    assert len(str(caught.value)) < 300


NUMBERS = st.integers(-(2**70), 2**70) | st.sampled_from(
    [edge + step for bits in (15, 31, 63) for edge in (2**bits, -(2**bits)) for step in (-2, -1, 0, 1)]
)
ZONES = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
STORABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8)
VALUES: dict[type, st.SearchStrategy[Any]] = {
    SmallInteger: NUMBERS,
    Integer: NUMBERS,
    BigInteger: NUMBERS,
    Boolean: st.booleans(),
    Text: STORABLE,
    DateTime: st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=ZONES),  # noqa: DTZ001 - given one
    JSONB: st.just('{"a": 1}'),
}
ANYTHING: st.SearchStrategy[Any] = st.none() | st.booleans() | NUMBERS | st.floats() | STORABLE | st.lists(NUMBERS)


@st.composite
def cells(draw: st.DrawFn) -> tuple[str, str, Any]:
    table, column = draw(st.sampled_from([(table, name) for table, name in COLUMNS if kind(table, name) is not JSONB]))
    type_ = mirrored_tables()[table].columns[column].type
    if isinstance(type_, ARRAY):
        own: st.SearchStrategy[Any] = st.lists(VALUES[type(type_.item_type)] | st.none(), max_size=4)
    else:
        own = VALUES[type(type_)]
    return table, column, draw(own | own | ANYTHING)


@pytest.mark.timeout(400)
@examples(60)
@given(cell=cells())
async def test_valid_values_are_stored_unchanged(database: Pool, cell: tuple[str, str, Any]) -> None:
    table, column, value = cell
    assume(all_valid(table, (column,), [record(table, value)]))  # Hypothesis fails if hardly any value is valid
    await check_round_trip(database, table, column, value)


@pytest.mark.parametrize(
    ("timestamp", "is_valid"),
    [
        (datetime(1, 1, 1, tzinfo=UTC), False),
        (datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=1))), False),
        (datetime(2, 1, 1, tzinfo=timezone(timedelta(hours=1))), True),
        (datetime(9998, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-1))), True),
        (datetime(9999, 12, 31, 23, 59, tzinfo=timezone(timedelta(hours=-1))), False),
    ],
)
async def test_timestamps_at_the_ends_of_the_calendar(database: Pool, timestamp: datetime, is_valid: bool) -> None:
    assert all_valid("members", ("joined_at",), [record("members", timestamp)]) is is_valid
    if is_valid:
        await check_round_trip(database, "members", "joined_at", timestamp)


async def check_round_trip(database: Pool, table: str, column: str, value: Any) -> None:
    """Check that the merge and COPY both store a value unchanged."""
    await empty(database)
    key = record(table, value)[:-2]
    await write_groups(database, Group(table, (column,), Mode.MERGE, [record(table, value)]))
    stored = (await rows(database, table))[key][column]
    assert (type(stored), stored) == (type(value), value)
    await empty(database)
    async with database.acquire() as connection:
        columns = (*key_columns(table), column, "stamp")
        await connection.copy_records_to_table(table, records=[record(table, value)], columns=columns)
    assert (await rows(database, table))[key][column] == value


@examples(100)
@given(cell=cells())
async def test_invalid_values_are_rejected_or_altered_by_copy(database: Pool, cell: tuple[str, str, Any]) -> None:
    table, column, value = cell
    assume(not all_valid(table, (column,), [record(table, value)]))
    await empty(database)
    try:
        async with database.acquire() as connection:
            columns = (*key_columns(table), column, "stamp")
            await connection.copy_records_to_table(table, records=[record(table, value)], columns=columns)
    except (DatabaseError, asyncpg.PostgresError, TypeError, ValueError, OverflowError):
        return
    stored = (await rows(database, table))[record(table, value)[:-2]][column]
    assert (
        type(stored) is not type(value)
        or stored != value
        or (isinstance(value, list) and set(map(type, value)) - {int, str})
    )

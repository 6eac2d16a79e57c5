"""Cache keys, and independent copies for readers."""

from __future__ import annotations

import datetime
import enum
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from utils.database import Pool
from utils.database.cache.results import MAX_ROWS, cache_key, make_cacheable

UTC = datetime.UTC
ELSEWHERE = datetime.timezone(datetime.timedelta(hours=2))


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True), (1, 1.0), (0.0, -0.0), (Decimal("1.0"), Decimal("1.00")), (1, Decimal(1)), (1, Colour.RED),
        ([1], [True]), ([1], (1,)), ([[1]], [[1.0]]), ({"a": 1}, {"a": True}), ("1", 1), (b"a", "a"), (None, 0),
        (datetime.datetime(2024, 1, 1, 2, tzinfo=ELSEWHERE), datetime.datetime(2024, 1, 1, tzinfo=UTC)),
    ],
)  # fmt: skip
def test_equal_values_of_different_types_have_different_keys(one: Any, other: Any) -> None:
    assert cache_key("fetch", "q", (one,)) != cache_key("fetch", "q", (other,))
    assert cache_key("fetch", "q", (one,)) == cache_key("fetch", "q", (one,))


def test_key_includes_verb_sql_arguments_and_tags() -> None:
    keys = [
        cache_key("fetch", "q", ()),
        cache_key("fetchrow", "q", ()),
        cache_key("fetch", "p", ()),
        cache_key("fetch", "q", (1,)),
    ]
    assert len({*keys, cache_key("fetch", "q", (1, 1))}) == 5


def test_an_argument_of_an_unknown_type_has_no_key() -> None:
    assert cache_key("fetch", "q", (object(),)) is None
    assert cache_key("fetch", "q", ([object()],)) is None


def test_a_key_does_not_change_with_its_arguments() -> None:
    given = [1, 2]
    key = cache_key("fetch", "q", (given,))
    given.append(3)
    assert key == cache_key("fetch", "q", ([1, 2],))


async def test_readers_get_independent_copies(database: Pool) -> None:
    rows = await database.fetch(
        "SELECT n, jsonb_build_object('a', jsonb_build_array(n)) AS j, ARRAY[n, 2] AS l, ROW(n, ARRAY[3]) AS r,"
        " NULL AS nothing FROM generate_series(1, 3) n"
    )
    cached = make_cacheable(rows, 0, frozenset())
    assert cached is not None
    first = cached.value()
    assert first == rows
    assert [list(row.items()) for row in first] == [list(row.items()) for row in rows]
    first[0]["j"]["a"].append("spoilt")
    first[0]["l"].clear()
    first[0]["r"][1].clear()
    first.clear()
    second = cached.value()
    assert [type(row) for row in second] == [asyncpg.Record] * 3
    assert [row["j"] for row in second] == [{"a": [n]} for n in (1, 2, 3)]
    assert second[0]["l"] == [1, 2]
    assert second[0]["r"][1] == [3]
    assert second[0].get("nothing", "missing") is None


async def test_immutable_rows_are_shared(database: Pool) -> None:
    rows = await database.fetch(
        "SELECT n, n::text AS t, now() AS at, 1.5 AS x, int4range(1, 2) FROM generate_series(1, 2) n"
    )
    cached = make_cacheable(rows, 0, frozenset())
    assert cached is not None
    taken = cached.value()
    assert taken is not rows
    assert taken[0] is rows[0]


async def test_caches_arrays_of_composites_with_nulls(database: Pool) -> None:
    await database.execute("CREATE TYPE pair AS (a int, b int[])")
    array = await database.fetchval("SELECT ARRAY[ROW(1, ARRAY[2])::pair, NULL]")
    cached = make_cacheable(array, 0, frozenset())
    assert cached is not None
    cached.value()[0]["b"].clear()
    assert cached.value() == array
    assert array[0]["b"] == [2]


@pytest.mark.parametrize("value", [None, 1, "x", 1.5, [1, [2]], {"a": {"b": []}}, [], (1, [2])])
def test_copies_containers(value: Any) -> None:
    cached = make_cacheable(value, 0, frozenset())
    assert cached is not None
    assert cached.value() == value
    if isinstance(value, (list, dict)):
        assert cached.value() is not cached.value()


async def test_rejects_what_cannot_be_copied(database: Pool) -> None:
    twice = await database.fetchrow("SELECT 1 AS a, ARRAY[1] AS a")
    assert make_cacheable(twice, 0, frozenset()) is None
    assert make_cacheable(object(), 0, frozenset()) is None
    assert make_cacheable([1] * (MAX_ROWS + 1), 0, frozenset()) is None

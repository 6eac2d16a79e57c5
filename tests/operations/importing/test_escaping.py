"""Escaping of JSON text that jsonb cannot store."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.importing.test_reader import values
from utils.database import Pool
from utils.operations.importing.escaping import (
    MARK,
    UnstorableValue,
    original_json,
    original_key,
    storable_json,
    storable_key,
)

#: Any text, including characters that PostgreSQL cannot store, with a bias towards escaped ones.
texts = st.text(st.characters(categories=None) | st.sampled_from(["\x00", "\ud83d", "\udc00", MARK, "0", "d", "\\"]))
any_json = st.recursive(
    values | texts | st.sampled_from([1e23, 1.5e300, 5e-324, 10**40, -1e16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=10,
)  # fmt: skip
numbers = st.from_regex(r"\A-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?\Z")


@given(st.lists(any_json, max_size=8))
async def test_escaped_json_round_trips_through_jsonb(database: Pool, whole: list[Any]) -> None:
    text = json.dumps(whole)
    stored: str = await database.fetchval("SELECT $1::text::jsonb::text", storable_json(text))
    assert json.loads(original_json(stored)) == whole


@given(st.lists(numbers, max_size=20))
async def test_numbers_keep_every_digit(database: Pool, whole: list[str]) -> None:
    text = f"[{', '.join(whole)}]"
    stored: str = await database.fetchval("SELECT $1::text::jsonb::text", storable_json(text))
    assert json.loads(stored, parse_float=Decimal, parse_int=Decimal) == [Decimal(number) for number in whole]
    assert json.loads(stored) == json.loads(text)


@given(texts)
async def test_escaped_keys_round_trip(database: Pool, key: str) -> None:
    assert original_key(await database.fetchval("SELECT $1::text", storable_key(key))) == key


@pytest.mark.parametrize(
    "text", ["[1e16001]", "[1e-16001]", "[0.1e-99999999999]", "[1e99999999999]", "[" + "9" * 16_001 + "]"]
)
def test_rejects_numbers_too_long_for_numeric(text: str) -> None:
    with pytest.raises(UnstorableValue, match="16,000 digits"):
        storable_json(text)


@pytest.mark.parametrize("text", ["[1e15999]", "[1e-16000]", "[0e99999999]", "[" + "9" * 16_000 + "]"])
async def test_accepts_longest_numbers(database: Pool, text: str) -> None:
    assert await database.fetchval("SELECT $1::text::jsonb IS NOT NULL", storable_json(text))


def test_keeps_surrogate_pairs_and_escaped_backslashes() -> None:
    for text in (r'["\ud83d\ude00"]', r'["\\u0000"]', r'["\\\\ud800"]'):
        assert storable_json(text) == text
    assert storable_json(r'["\\\u0000 \uDBFF\uDFFD \uD83D"]') == rf'["\\{MARK}0000 {MARK}{MARK} {MARK}d83d"]'


@pytest.mark.parametrize("text", [MARK, f"{MARK}0000", f"{MARK}{MARK}d800", f"x{MARK}"])
def test_mark_itself_round_trips(text: str) -> None:
    for is_ascii in (True, False):
        assert json.loads(original_json(storable_json(json.dumps([text], ensure_ascii=is_ascii)))) == [text]

"""Storable text and formatted sizes."""

from __future__ import annotations

import pytest

from utils.text import format_bytes, format_count, scrub_payload, storable


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain", "plain"), ("a\x00b", "a\ufffdb"), ("\ud83d", "\ufffd"), ("😀", "😀"), ("", "")],
)
def test_replaces_nul_and_lone_surrogates(text: str, expected: str) -> None:
    assert storable(text) == expected


def test_scrubs_keys_and_nested_strings() -> None:
    payload = {"a\x00": ["\udfff", {"b": "\x00"}, 1, None, True]}
    assert scrub_payload(payload) == {"a\ufffd": ["\ufffd", {"b": "\ufffd"}, 1, None, True]}


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (1_500, "1.5 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (15_000_000, "15.0 MB"),
        (2.5e12, "2.5 TB"),
        (5e15, "5000.0 TB"),
        (-1_500, "-1.5 kB"),
    ],
)
def test_formats_sizes_in_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "guild", "0 guilds"),
        (1, "guild", "1 guild"),
        (2_500, "guild", "2,500 guilds"),
        (1, "entry", "1 entry"),
        (2, "entry", "2 entries"),
        (2, "day", "2 days"),
        (2, "index", "2 indexes"),
        (2, "match", "2 matches"),
    ],
)
def test_counts_in_singular_and_plural(count: int, noun: str, text: str) -> None:
    assert format_count(count, noun) == text


def test_counts_with_an_irregular_plural() -> None:
    assert [format_count(count, "person", "people") for count in (1, 3)] == ["1 person", "3 people"]

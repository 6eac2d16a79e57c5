"""Reading files entry by entry, with any window size."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.exceptions import ValidationError
from utils.operations.importing.reader import INVALID_BYTES, NOT_JSON, TOO_DEEP, TOO_LONG, Entry, Reader

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
windows = st.integers(1, 40)


def read(text: str | bytes, window: int = 7, *, lines: bool = False) -> list[Entry]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return list(Reader(io.BytesIO(data), lines=lines, window=window))


@given(st.dictionaries(st.text(), values, max_size=6), windows, st.sampled_from([None, 1]), st.booleans())
def test_reads_entries_of_an_object_in_order(
    whole: dict[str, Any], window: int, indent: int | None, is_ascii: bool
) -> None:
    text = json.dumps(whole, indent=indent, ensure_ascii=is_ascii)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(whole, indent=indent)
    entries = read(text, window)
    assert [(entry.key, entry.value) for entry in entries] == list(whole.items())
    assert [json.loads(entry.text) for entry in entries] == list(whole.values())
    rows = text.split("\n")
    assert all(rows[entry.line - 1][entry.column - 1 :].startswith(entry.text.split("\n")[0]) for entry in entries)


@given(st.lists(values, max_size=6), windows)
def test_reads_entries_of_arrays_and_lines(whole: list[Any], window: int) -> None:
    assert [entry.value for entry in read(json.dumps(whole), window)] == whole
    lines = "\r\n\n".join(json.dumps(item) for item in whole)
    assert [entry.value for entry in read(lines, window, lines=True)] == whole


@given(st.dictionaries(st.text(max_size=5), values, min_size=1, max_size=3), st.data(), windows)
def test_rejects_truncated_file(whole: dict[str, Any], data: st.DataObject, window: int) -> None:
    text = json.dumps(whole)
    with pytest.raises(ValidationError, match=r"^line 1, column \d+: "):
        read(text[: data.draw(st.integers(0, len(text) - 1))], window)


@given(st.text(alphabet='{}[]",:\\ue-0123456789.tnl \n', max_size=30), windows)
def test_rejects_what_json_loads_rejects(text: str, window: int) -> None:
    try:
        expected = json.loads(text)
        assert isinstance(expected, dict | list)
    except (ValueError, AssertionError):
        with pytest.raises(ValidationError):
            read(text, window)
    else:
        read(text, window)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1, column 1: expected an object {…} or an array […] of entries, the file is empty"),
        ('{"a": 1,\n "b": 2,\n}', "line 2, column 8: remove the comma before the closing }"),
        ('{"a": 1,\n "b": tru}', "line 2, column 7: expected a value"),
        ('{"a": 1}\n{"b": 2}', "line 2, column 1: there is more text after the end"),
        ('{"a": {"b": 1 "c": 2}}' + " " * 50, "line 1, column 15: expected a comma or a closing bracket"),
        ("{'a': 1}", 'line 1, column 2: expected a key in "…"'),
    ],
)
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_errors_have_line_and_column(text: str, message: str, window: int) -> None:
    with pytest.raises(ValidationError) as caught:
        read(text, window)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_skips_byte_order_mark(encoding: str) -> None:
    reader = Reader(io.BytesIO('{"ä": "ß𝄞"}'.encode(encoding)), window=1)
    assert [(entry.key, entry.value) for entry in reader] == [("ä", "ß𝄞")]
    assert reader.has_bom


def test_nan_and_invalid_utf8_affect_only_their_entry() -> None:
    entries = read(b'{"a": NaN, "b": "\xff", "c\xff": 1, "d": 1}')
    assert [entry.problem for entry in entries] == [NOT_JSON, INVALID_BYTES, INVALID_BYTES, None]


def test_invalid_line_affects_only_itself() -> None:
    entries = read('{"a": 1}\n{"a": \n{"a": 1} 2\n{"a": 2}\n', lines=True)
    assert [entry.problem is None for entry in entries] == [True, False, False, True]
    assert [entry.line for entry in entries] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("long", "problem"),
    [
        ("[" * 100_000 + "]" * 100_000, TOO_DEEP),
        ("[" * 5_000 + '"]\\"["' + "]" * 5_000, TOO_DEEP),
        (json.dumps(['x\\"}' * 10] * 100_000), TOO_LONG),
        (json.dumps("\\" * 2_000_000), TOO_LONG),
        ('{"a": {"b": [' + "1, " * 1_200_000 + "1]}}", TOO_LONG),
    ],
    ids=range(5),
)
@pytest.mark.parametrize("window", [1_000, 1_000_000])
def test_skips_entries_too_long_or_too_deep(long: str, problem: str, window: int) -> None:
    entries = read(f'{{"a": 1, "b": {long},\n"c": 2}}', window)
    assert [(entry.key, entry.problem, entry.line) for entry in entries] == [
        ("a", None, 1), ("b", problem, 1), ("c", None, 2)
    ]  # fmt: skip
    assert long.startswith(entries[1].text.removesuffix("…"))
    assert 900 < len(entries[1].text) <= 1_001
    with pytest.raises(ValidationError):
        read(f'{{"a": 1, "b": {long[:-1]}', window)
    lines = read(f'{{"a": 1}}\n{long}\n{{"c": 2}}', window, lines=True)
    assert [(entry.problem, entry.line) for entry in lines] == [(None, 1), (problem, 2), (None, 3)]


@given(values, windows)
def test_skip_value_ends_at_the_end_of_the_value(value: Any, window: int) -> None:
    text = json.dumps([value])
    reader = Reader(io.BytesIO(f"{text} ,".encode()), window=window)
    reader._peek()
    reader._skip_value("")
    assert reader._peek() == ","
    assert reader._position(reader._pos) == (1, len(text) + 2)


def test_reads_numbers_longer_than_int_limit() -> None:
    assert read(f'{{"a": {"9" * 5000}}}', 1000)[0].text == "9" * 5000


def test_holds_only_a_window_in_memory() -> None:
    text = json.dumps({str(number): {"n": "x" * 50} for number in range(5_000)})
    reader = Reader(io.BytesIO(text.encode()), window=1_000)
    assert max(len(reader._text) for _ in reader) < 2_200

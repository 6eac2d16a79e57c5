"""Files are split into their entries, whatever the window, and what is wrong has its place."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.exceptions import ValidationError
from utils.operations.importing.reader import NO_JSON, NO_UTF8, TOO_DEEP, TOO_LONG, Entry, Reader

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
windows = st.integers(1, 40)


def read(text: str | bytes, window: int = 7, *, lines: bool = False) -> list[Entry]:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return list(Reader(io.BytesIO(data), lines=lines, window=window))


@given(st.dictionaries(st.text(), values, max_size=6), windows, st.sampled_from([None, 1]), st.booleans())
def test_an_object_gives_its_entries_in_order(
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
def test_an_array_and_lines_give_theirs(whole: list[Any], window: int) -> None:
    assert [entry.value for entry in read(json.dumps(whole), window)] == whole
    lines = "\r\n\n".join(json.dumps(item) for item in whole)
    assert [entry.value for entry in read(lines, window, lines=True)] == whole


@given(st.dictionaries(st.text(max_size=5), values, min_size=1, max_size=3), st.data(), windows)
def test_a_file_that_was_cut_off_is_refused(whole: dict[str, Any], data: st.DataObject, window: int) -> None:
    text = json.dumps(whole)
    with pytest.raises(ValidationError, match=r"^line 1, column \d+: "):
        read(text[: data.draw(st.integers(0, len(text) - 1))], window)


@given(st.text(alphabet='{}[]",:\\ue-0123456789.tnl \n', max_size=30), windows)
def test_what_python_refuses_is_refused(text: str, window: int) -> None:
    try:
        expected = json.loads(text)
        assert isinstance(expected, dict | list)
    except (ValueError, AssertionError):
        with pytest.raises(ValidationError):
            read(text, window)
    else:
        read(text, window)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1, column 1: an object {…} or an array […] of entries was expected, it is empty"),
        ('{"a": 1,\n "b": 2,\n}', "line 2, column 8: a comma stands in front of the closing }: take it out"),
        ('{"a": 1,\n "b": tru}', "line 2, column 7: a value was expected"),
        ('{"a": 1}\n{"b": 2}', "line 2, column 1: there is more behind the end"),
        ('{"a": {"b": 1 "c": 2}}' + " " * 50, "line 1, column 15: a comma or a closing bracket was expected"),
        ("{'a': 1}", 'line 1, column 2: a key in "…" was expected'),
    ],
)
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_what_is_wrong_has_its_place(text: str, told: str, window: int) -> None:
    with pytest.raises(ValidationError) as caught:
        read(text, window)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_read_over(encoding: str) -> None:
    reader = Reader(io.BytesIO('{"ä": "ß𝄞"}'.encode(encoding)), window=1)
    assert [(entry.key, entry.value) for entry in reader] == [("ä", "ß𝄞")]
    assert reader.marked


def test_what_is_no_json_or_no_utf_8_spoils_its_own_entry_only() -> None:
    entries = read(b'{"a": NaN, "b": "\xff", "c\xff": 1, "d": 1}')
    assert [entry.problem for entry in entries] == [NO_JSON, NO_UTF8, NO_UTF8, None]


def test_a_wrong_line_spoils_itself_only() -> None:
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
def test_what_is_too_long_or_too_deep_is_passed_over(long: str, problem: str, window: int) -> None:
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
def test_passing_over_ends_where_the_value_does(value: Any, window: int) -> None:
    text = json.dumps([value])
    reader = Reader(io.BytesIO(f"{text} ,".encode()), window=window)
    reader._peek()
    reader._passed_over("")
    assert reader._peek() == ","
    assert reader._place(reader._pos) == (1, len(text) + 2)


def test_numbers_of_any_length_do_no_harm() -> None:
    assert read(f'{{"a": {"9" * 5000}}}', 1000)[0].text == "9" * 5000


def test_memory_holds_a_window_only() -> None:
    text = json.dumps({str(number): {"n": "x" * 50} for number in range(5_000)})
    reader = Reader(io.BytesIO(text.encode()), window=1_000)
    assert max(len(reader._text) for _ in reader) < 2_200

"""Benchmarks judge medians, and say so when the spread is too wide."""

from __future__ import annotations

import pytest

from benchmarks.figures import Figure, Verdict, interval_of_median, ratio, table
from benchmarks.versions import compare, parse_table


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 1.1, 1.2, 1.1, 1.05), Verdict.KEPT),
        ((0.7, 0.6, 0.75, 0.7, 0.72), Verdict.MISSED),
        ((0.68, 0.85, 0.98, 0.9, 0.7), Verdict.UNCLEAR),
        ((0.81,), Verdict.KEPT),
        ((0.79,), Verdict.MISSED),
    ],
)
def test_the_median_is_judged(values: tuple[float, ...], verdict: Verdict) -> None:
    assert Figure("speed", values, "≥", 0.8).verdict is verdict


def test_an_upper_bound_is_kept_from_below() -> None:
    assert Figure("time", (1.0, 1.0, 1.0), "≤", 1.1).verdict is Verdict.KEPT
    assert Figure("time", (1.2, 1.2, 1.2), "≤", 1.1).verdict is Verdict.MISSED


def test_a_figure_without_bound_has_no_verdict() -> None:
    assert Figure("size", (3.0,)).verdict is Verdict.UNBOUNDED


@pytest.mark.parametrize(("count", "cut"), [(3, 0), (5, 0), (7, 0), (8, 1), (11, 2), (20, 5)])
def test_more_rounds_narrow_the_interval(count: int, cut: int) -> None:
    values = [float(n) for n in range(count)]
    assert interval_of_median(values) == (values[cut], values[-1 - cut])


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio("speed", [1.0, 10.0], [2.0, 20.0]).values == [0.5, 0.5]


def test_tables_of_both_formats_are_read_back() -> None:
    figures = [Figure("speed, a", (1.0, 1.5, 2.5), "≥", 0.8), Figure("rows", (0,), "≤", 0)]
    assert parse_table(table(figures)) == {"speed, a": (1.5, "≥"), "rows": (0.0, "≤")}
    older = "| what | figure | bound | kept |\n| --- | ---: | ---: | --- |\n| memory | 1,026.24 MB | ≤ 60 MB | yes |"
    assert parse_table(older) == {"memory": (1026.24, "≤")}


def test_versions_are_compared_run_by_run() -> None:
    before = [{"speed": (1.0, "≥"), "time": (1.0, "≤"), "gone": (1.0, "≥")}] * 5
    after = [{"speed": (0.5, "≥"), "time": (0.5, "≤"), "new": (1.0, "≥")}] * 5
    verdicts = {figure.what: figure.verdict for figure in compare(before, after)}
    assert verdicts == {"speed": Verdict.MISSED, "time": Verdict.KEPT}

"""The picture of the statistics: readable at every span, without a sample, and as small as Discord shows it."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from docs import pictures
from utils.exceptions import GuildbookError
from utils.operations.upkeep import picture
from utils.operations.upkeep.picture import TICKS, build, draw, figures_of, time_ticks
from utils.operations.upkeep.statistics import Sample, Statistics, TableSize

NOW = datetime(2026, 1, 31, 18, 20, tzinfo=UTC)
#: How wide Discord shows it, and the smallest text that is legible there, in pixels.
SHOWN_WIDTH, LEGIBLE = 400, 9
SPANS = {
    "20 minutes": timedelta(minutes=20),
    "2 hours": timedelta(hours=2),
    "6 hours": timedelta(hours=6),
    "30 hours": timedelta(hours=30),
    "3 days": timedelta(days=3),
    "a week": timedelta(days=7),
    "4 weeks": timedelta(days=28),
    "3 months": timedelta(days=92),
    "a year": timedelta(days=365),
    "400 days": timedelta(days=400),
    "12 years": timedelta(days=4_400),
}


def statistics(tables: list[TableSize], samples: list[Sample]) -> Statistics:
    return Statistics(NOW, {}, {}, tables, samples, syncs=[], backups=[], problems=[], bot=None)


def tables(number: int = 12, scale: int = 1_000_000_000) -> list[TableSize]:
    names = ["w" * 63, "hourly_activity", *(f"table_{n}" for n in range(number))]
    return [TableSize(name, scale // (n + 1), scale // (n + 1), 0) for n, name in enumerate(names[:number])]


def samples(span: timedelta, number: int = 40) -> list[Sample]:
    return [Sample(NOW - span * (number - n) / number, 10**8 + 10**6 * n, 0) for n in range(number + 1)]


def texts(figure: Any) -> list[tuple[str, Any]]:
    """Return every text that is drawn, with its place in pixels."""
    figure.draw_without_rendering()
    found = []
    for part in figure.subfigs:
        titles = [part._suptitle, *part.texts]
        found += [(text.get_text(), text.get_window_extent()) for text in set(titles) if text.get_text()]
    for axes in figure.axes:
        shown = list(axes.texts)
        shown += axes.get_xticklabels() if axes.xaxis.get_visible() else []
        shown += axes.get_yticklabels() if axes.yaxis.get_visible() else []
        low, high = axes.get_ylim()
        shown = [it for it in shown if not (it in axes.get_yticklabels() and not low <= it.get_position()[1] <= high)]
        found += [(text.get_text(), text.get_window_extent()) for text in shown if text.get_text()]
    return found


def check(figure: Any) -> None:
    """Raise `AssertionError` for texts that overlap, are cut off, or are too small to read in Discord."""
    drawn = texts(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for number, (text, box) in enumerate(drawn):
        assert box.x0 >= 0, f"{text} is cut off"
        assert box.y0 >= 0, f"{text} is cut off"
        assert box.x1 <= width, f"{text} is cut off"
        assert box.y1 <= height, f"{text} is cut off"
        lines = text.count("\n") + 1
        assert box.height / lines * SHOWN_WIDTH / width >= LEGIBLE, f"{text} is too small"
        for other, place in drawn[number + 1 :]:
            assert not box.overlaps(place), f"{text} and {other} overlap"


@pytest.mark.parametrize("span", SPANS)
def test_texts_are_legible_at_every_span(span: str) -> None:
    figure = build(figures_of(statistics(tables(), samples(SPANS[span]))))
    assert len(figure.axes) == 2
    check(figure)
    assert len([text for text in figure.axes[1].get_xticklabels() if text.get_text()]) >= 2


@pytest.mark.parametrize("number", [0, 1, 3, 40])
@pytest.mark.parametrize("scale", [0, 1, 12_345, 99_999_999_999_999])
def test_tables_are_legible_at_every_size(number: int, scale: int) -> None:
    check(build(figures_of(statistics(tables(number, scale), []))))


@pytest.mark.parametrize("number", [0, 1])
def test_without_growth_the_tables_are_alone(number: int) -> None:
    figure = build(figures_of(statistics(tables(), samples(timedelta(hours=6))[:number])))
    assert len(figure.axes) == 1
    check(figure)


def test_a_database_without_tables_says_so() -> None:
    figure = build(figures_of(statistics([], [])))
    assert [text for text, _ in texts(figure)] == ["No tables yet"]


@pytest.mark.parametrize("span", SPANS)
def test_time_axis_has_a_few_round_times(span: str) -> None:
    ticks = time_ticks(NOW - SPANS[span], NOW)
    assert 2 <= len(ticks) <= TICKS
    assert all(NOW - SPANS[span] <= at <= NOW for at, _ in ticks)
    assert all(at.second == at.microsecond == 0 for at, _ in ticks)


@pytest.mark.parametrize(
    ("span", "labels"),
    [
        ("2 hours", ["16:30\n31 Jan", "17:00", "17:30", "18:00"]),
        ("30 hours", ["18:00\n30 Jan", "00:00\n31 Jan", "06:00", "12:00", "18:00"]),
        ("a week", ["26 Jan\n2026", "28 Jan", "30 Jan"]),
        ("4 weeks", ["5 Jan\n2026", "12 Jan", "19 Jan", "26 Jan"]),
        ("3 months", ["10 Nov\n2025", "24 Nov", "8 Dec", "22 Dec", "5 Jan\n2026", "19 Jan"]),
        ("a year", ["Mar\n2025", "May", "Jul", "Sep", "Nov", "Jan\n2026"]),
    ],
)
def test_labels_name_the_larger_unit_where_it_changes(span: str, labels: list[str]) -> None:
    assert [label for _, label in time_ticks(NOW - SPANS[span], NOW)] == labels


def test_size_of_now_is_the_last_sample() -> None:
    taken = samples(timedelta(days=10))[:20]
    figures = figures_of(statistics(tables(), taken))
    assert figures["growth"][-1] == (NOW.timestamp(), sum(table.bytes for table in tables()))
    assert len(figures_of(statistics(tables(), samples(timedelta(days=10))))["growth"]) == 41, "one was just taken"


async def test_is_drawn_by_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = statistics(tables(), samples(timedelta(days=10)))
    png = await draw(shown)
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        assert image.width == 960
        assert image.height < 1.3 * image.width
    monkeypatch.setattr(picture, "figures_of", lambda statistics: {})
    with pytest.raises(GuildbookError, match="the picture could not be drawn: KeyError"):
        await draw(shown)


@pytest.mark.parametrize("name", [name for name, _, _ in pictures.PICTURES])
def test_picture_of_the_documentation_is_up_to_date(name: str) -> None:
    (shown,) = [shown for other, _, shown in pictures.PICTURES if other == name]
    written = (pictures.DIRECTORY / name).read_bytes()
    assert pictures.read_digest(written) == pictures.digest(shown), "the code has changed: run `make docs`"


def test_no_picture_of_the_documentation_is_left_over() -> None:
    assert {path.name for path in pictures.DIRECTORY.glob("*.png")} == {name for name, _, _ in pictures.PICTURES}

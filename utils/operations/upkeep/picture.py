"""A picture of the statistics: the largest tables and, from the second sample on, how all of them grew.

Drawn by a separate process (`python -m utils.operations.upkeep.picture`, JSON in, PNG out): matplotlib takes 60 MB of
memory, and holds the interpreter for longer than the event loop may stall.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from utils.exceptions import GuildbookError
from utils.operations.upkeep.statistics import Statistics
from utils.text import format_bytes, format_count, format_duration

#: Seconds for drawing; the first start of matplotlib builds its font cache.
DRAW_SECONDS = 60.0
#: The largest tables are drawn, this many.
TABLES = 8
#: Most characters of a table's name.
NAME_LENGTH = 18
#: Most labels of the time axis.
TICKS = 6
#: Which part of the time drawn is too short to draw another sample.
_JUST = 0.02
ROOT = Path(__file__).resolve().parents[3]
#: Inches and pixels per inch. Discord shows the picture about 400 pixels wide, where its text is as large as Discord's.
_WIDTH, _ROW, _GROWTH, _DPI, _TEXT = 8.0, 0.5, 3.6, 120, 15
#: Discord's dark embed, its text, and its accent ("blurple", Discord's brand guidelines).
_GROUND, _INK, _FAINT, _GRID, _ACCENT, _SECOND = "#2b2d31", "#dbdee1", "#949ba4", "#4e5058", "#5865f2", "#57f287"


async def draw(statistics: Statistics, *, timeout: float = DRAW_SECONDS) -> bytes:
    """Return the picture as PNG. Raises `GuildbookError` when it cannot be drawn within `timeout` seconds."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            picture, errors = await process.communicate(json.dumps(figures_of(statistics)).encode())
    except TimeoutError:
        raise GuildbookError(f"the picture was not drawn within {timeout:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise GuildbookError(f"the picture could not be drawn: {' '.join(last) or f'exit code {process.returncode}'}")
    return picture


def figures_of(statistics: Statistics) -> dict[str, Any]:
    """Return what the picture shows, as JSON: tables, how many more there are, and samples of all tables together.

    The sizes of now are the last sample, unless one was just taken.
    """
    now = (statistics.at.timestamp(), sum(table.bytes for table in statistics.tables))
    samples = [(sample.at.timestamp(), sample.bytes) for sample in statistics.growth]
    if samples and now[0] - samples[-1][0] > _JUST * (now[0] - samples[0][0]):
        samples.append(now)
    return {
        "tables": [(table.name, table.bytes, table.rows) for table in statistics.tables[:TABLES]],
        "more": max(0, len(statistics.tables) - TABLES),
        "bytes": now[1],
        "growth": samples if len(statistics.growth) > 1 else [],
    }


def render(figures: dict[str, Any], out: Any, *, description: str | None = None) -> None:
    """Write the picture of figures as PNG to a binary file. `description` is stored in it."""
    metadata = {"Software": None, "Description": description}
    build(figures).savefig(out, format="png", facecolor=_GROUND, metadata=metadata)


def build(figures: dict[str, Any]) -> Any:
    """Return the picture of figures as a figure of matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    growth = figures["growth"] if len({at for at, _ in figures["growth"]}) > 1 else []
    heights = [_ROW * max(1, len(figures["tables"])) + 0.8, *([_GROWTH] if growth else [])]
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    figure = Figure(figsize=(_WIDTH, sum(heights)), dpi=_DPI, layout=layout)
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    _draw_tables(parts[0], figures)
    if growth:
        _draw_growth(parts[1], growth)
    return figure


def _add_axes(part: Any, height: float, title: str, note: str) -> Any:
    """Return axes below a title, in a part of the picture that is so many inches high."""
    part.set_facecolor(_GROUND)
    top = 1 - 0.18 / height
    part.suptitle(title, x=0.02, y=top, ha="left", va="top", color=_INK, size=_TEXT + 4, weight="bold")
    part.text(0.98, top, note, ha="right", va="top", color=_FAINT, size=_TEXT)
    axes = part.subplots()
    axes.set_title(" ", size=_TEXT + 4, pad=14)  # keeps the place of the texts above, which are not laid out
    axes.set_facecolor(_GROUND)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=_TEXT, length=0, pad=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _draw_tables(part: Any, figures: dict[str, Any]) -> None:
    tables = list(reversed(figures["tables"]))
    title = f"{format_bytes(figures['bytes'])} in {format_count(len(tables) + figures['more'], 'table')}"
    axes = _add_axes(
        part,
        _ROW * max(1, len(tables)) + 0.8,
        title if tables else "No tables yet",
        f"the {len(tables)} largest" if figures["more"] else "",
    )
    axes.xaxis.set_visible(False)
    if not tables:
        axes.yaxis.set_visible(False)
        return
    largest = max(size for _, size, _ in tables) or 1
    bars = axes.barh([_shorten(name) for name, _, _ in tables], [size for _, size, _ in tables], height=0.62)
    for bar in bars:
        bar.set_color(_ACCENT)
    labels = [f"{format_bytes(size)}, {_format_rows(rows)}" for _, size, rows in tables]
    axes.bar_label(bars, labels, color=_INK, padding=8, size=_TEXT)
    # The longest label is as wide as the longest bar.
    axes.set_xlim(0, largest * 2.1)
    axes.set_ylim(-0.6, len(tables) - 0.4)


def _draw_growth(part: Any, growth: list[tuple[float, int]]) -> None:
    times = [datetime.fromtimestamp(at, UTC) for at, _ in growth]
    sizes = [size for _, size in growth]
    change = sizes[-1] - sizes[0]
    sign = "+" if change >= 0 else "-"
    ticks = time_ticks(times[0], times[-1])
    note = "all tables, UTC" if any(":" in label for _, label in ticks) else "all tables"
    title = f"{sign}{format_bytes(abs(change))} in {format_duration(times[-1] - times[0])}"
    axes = _add_axes(part, _GROWTH, title, note)
    axes.plot(times, sizes, color=_SECOND, linewidth=2.5, marker="o" if len(sizes) <= 12 else None, markersize=7)
    axes.fill_between(times, sizes, color=_SECOND, alpha=0.15, linewidth=0)
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(0, max(*sizes, 1) * 1.12)
    axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    _set_size_axis(axes, max(sizes))
    axes.tick_params(axis="x", length=6, width=1.5, color=_GRID, labelcolor=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=1)


def _set_size_axis(axes: Any, largest: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit, power = next(
        (unit, 1000**power) for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB"), (0, "B"))
        if largest >= 1000**power or not power
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / power:g} {unit}" if value else "0"))


def _shorten(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def _format_rows(rows: int) -> str:
    """Format a number of rows in at most nine characters: `999 rows`, `1.2k rows`, `35M rows`."""
    for limit, suffix in ((10**12, "T"), (1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if rows >= limit:
            number = rows / limit
            return f"{number:.1f}{suffix} rows" if number < 9.95 else f"{number:,.0f}{suffix} rows"
    return format_count(rows, "row")


# --- the time axis

#: The first line of a label, and the second, which is only shown where it changes.
_CLOCK, _DAY, _MONTH, _YEAR = ("%H:%M", "%-d %b"), ("%-d %b", "%Y"), ("%b", "%Y"), ("%Y", "")


def time_ticks(first: datetime, last: datetime, limit: int = TICKS) -> list[tuple[datetime, str]]:
    """Return the times to mark on an axis, with labels of one or two lines, at most `limit` of them.

    They are round in the unit that suits the span: minutes, hours, days, Mondays, months or years.
    """
    chosen: list[datetime] = []
    formats = _DAY
    for ticks, formats in _candidates(first):  # noqa: B007 - those of the last one are used
        chosen = []
        for at in ticks():
            if at > last or len(chosen) > limit:
                break
            if at >= first:
                chosen.append(at)
        if len(chosen) <= limit:
            break
    labels: list[tuple[datetime, str]] = []
    shown = None
    for at in chosen:
        above, below = (at.strftime(line) for line in formats)
        labels.append((at, above if not below or below == shown else f"{above}\n{below}"))
        shown = below
    return labels


def _candidates(first: datetime) -> Iterator[tuple[Callable[[], Iterator[datetime]], tuple[str, str]]]:
    """Yield ways to mark a time axis, from the finest to the coarsest: its times from before `first` on, and labels."""
    midnight = first.replace(hour=0, minute=0, second=0, microsecond=0)
    monday, year = midnight - timedelta(days=midnight.weekday()), midnight.replace(month=1, day=1)
    for minutes in (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720):
        yield _every(midnight, timedelta(minutes=minutes)), _CLOCK
    for days in (1, 2):
        yield _every(midnight, timedelta(days=days)), _DAY
    for weeks in (1, 2):
        yield _every(monday, timedelta(weeks=weeks)), _DAY
    for months in (1, 2, 3, 6):
        yield _months(year, months), _MONTH
    for years in (1, 2, 5, 10, 50):
        yield _months(year, 12 * years), _YEAR


def _every(start: datetime, step: timedelta) -> Callable[[], Iterator[datetime]]:
    def ticks() -> Iterator[datetime]:
        at = start
        while True:
            yield at
            at += step

    return ticks


def _months(start: datetime, step: int) -> Callable[[], Iterator[datetime]]:
    def ticks() -> Iterator[datetime]:
        month = 0
        while True:
            yield start.replace(year=start.year + month // 12, month=month % 12 + 1)
            month += step

    return ticks


if __name__ == "__main__":
    render(json.load(sys.stdin), sys.stdout.buffer)

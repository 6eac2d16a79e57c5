"""A chart of the statistics: the largest tables, and how all of them grew.

Drawn by a separate process (`python -m utils.operations.upkeep.picture`, JSON in, PNG out): matplotlib takes 60 MB of
memory, and holds the interpreter for longer than the event loop may stall.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.exceptions import GuildbookError
from utils.operations.upkeep.statistics import Statistics
from utils.text import format_bytes

#: Seconds for drawing; the first start of matplotlib builds its font cache.
DRAW_SECONDS = 60.0
#: The largest tables are drawn, this many.
TABLES = 10
ROOT = Path(__file__).resolve().parents[3]
#: Discord's dark embed, its text, and its accent ("blurple", Discord's brand guidelines).
_GROUND, _INK, _FAINT, _ACCENT, _SECOND = "#2b2d31", "#dbdee1", "#4e5058", "#5865f2", "#57f287"


async def draw(statistics: Statistics, *, timeout: float = DRAW_SECONDS) -> bytes:
    """Return the chart as PNG. Raises `GuildbookError` when it cannot be drawn within `timeout` seconds."""
    figures = {
        "tables": [(table.name, table.bytes, table.rows) for table in statistics.tables[:TABLES]],
        "growth": [(sample.at.timestamp(), sample.bytes) for sample in statistics.growth],
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            picture, errors = await process.communicate(json.dumps(figures).encode())
    except TimeoutError:
        raise GuildbookError(f"the chart was not drawn within {timeout:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise GuildbookError(f"the chart could not be drawn: {' '.join(last) or f'exit code {process.returncode}'}")
    return picture


def render(figures: dict[str, Any], out: Any) -> None:
    """Write the chart of figures as PNG to a binary file."""
    import matplotlib.dates
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    size_format = FuncFormatter(lambda value, _: format_bytes(value))
    figure = Figure(figsize=(9, 4), dpi=120, facecolor=_GROUND, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    tables = list(reversed(figures["tables"]))
    bars = left.barh([name for name, _, _ in tables], [size for _, size, _ in tables], color=_ACCENT, height=0.7)
    left.bar_label(
        bars, [f"{format_bytes(size)}, {rows:,} rows" for _, size, rows in tables], color=_INK, padding=4, size=8
    )
    left.set_title("Largest tables", color=_INK, loc="left", size=11)
    left.margins(x=0.45)
    left.xaxis.set_visible(False)
    right.set_title("All tables together", color=_INK, loc="left", size=11)
    if len(figures["growth"]) > 1:
        times = [datetime.fromtimestamp(at).astimezone() for at, _ in figures["growth"]]
        right.plot(times, [size for _, size in figures["growth"]], color=_SECOND, linewidth=2)
        dates: Any = matplotlib.dates  # it has no type annotations
        locator = dates.AutoDateLocator(maxticks=6)
        right.xaxis.set_major_locator(locator)
        right.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        right.yaxis.set_major_formatter(size_format)
        right.set_ylim(bottom=0)
    else:
        right.text(0.5, 0.5, "no samples yet", color=_FAINT, ha="center", transform=right.transAxes)
        right.set_axis_off()
    for axes in (left, right):
        axes.set_facecolor(_GROUND)
        axes.tick_params(colors=_INK, labelsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.grid(axis="y" if axes is right else "x", color=_FAINT, linewidth=0.5, alpha=0.6)
        axes.set_axisbelow(True)
    figure.savefig(out, format="png", facecolor=_GROUND)


if __name__ == "__main__":
    render(json.load(sys.stdin), sys.stdout.buffer)

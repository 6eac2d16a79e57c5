"""Draws the pictures in docs/images/ from made-up statistics, which are the same each time."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import math
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from utils import text
from utils.operations.upkeep import picture
from utils.operations.upkeep.statistics import Sample, Statistics, TableSize

DIRECTORY = Path(__file__).parent / "images"
NOW = datetime(2026, 1, 31, 18, tzinfo=UTC)
#: Tables of a bot in some 250 guilds: name, rows and bytes.
_TABLES = [
    ("messages", 1_312_400, 248_200_000),
    ("members", 204_118, 51_700_000),
    ("changes", 160_220, 42_400_000),
    ("users", 181_004, 38_900_000),
    ("hourly_activity", 181_400, 29_300_000),
    ("member_events", 90_200, 16_100_000),
    ("reactions", 61_020, 9_400_000),
    ("member_stats", 58_102, 7_800_000),
    ("documents", 11_204, 3_200_000),
    *((f"table_{number}", 500, 90_000) for number in range(29)),
]
_BYTES = sum(size for _, _, size in _TABLES)


def _statistics(scale: float, growth: Iterable[tuple[timedelta, float]]) -> Statistics:
    """Return statistics. `growth`: how long before now each sample was taken, and which part of today's size it had."""
    tables = [TableSize(name, round(rows * scale), round(size * scale), 0) for name, rows, size in _TABLES]
    samples = [Sample(NOW - age, round(_BYTES * scale * part), 0) for age, part in growth]
    return Statistics(
        at=NOW, server={}, activity={}, tables=tables, growth=samples, syncs=[], backups=[], problems=[], bot=None
    )


def _year() -> Iterable[tuple[timedelta, float]]:
    """Yield a sample a day, as they are kept: slow growth, a busy summer, and old messages deleted in November."""
    grown = [0.15 + 0.7 / (1 + math.exp((day - 190) / 30)) + 0.0006 * (365 - day) for day in range(366)]
    for day in range(365, 0, -1):
        yield timedelta(days=day), grown[day] / grown[0] * (1.0 if day < 75 else 1.12)


#: The file, what it shows, and the statistics.
PICTURES: list[tuple[str, str, Statistics]] = [
    ("statistics-none.png", "Before the first sample", _statistics(0.02, [])),
    ("statistics-one.png", "With one sample", _statistics(0.3, [(timedelta(hours=2), 0.99)])),
    (
        "statistics-six-hours.png",
        "After six hours",
        _statistics(0.5, [(timedelta(hours=6), 0.86), (timedelta(minutes=1), 1.0)]),
    ),
    ("statistics-year.png", "After a year", _statistics(1.0, _year())),
]


def digest(statistics: Statistics) -> str:
    """Return a digest of what a picture is drawn from: the figures and the code. It is stored in the picture."""
    figures = json.dumps(picture.figures_of(statistics))
    return hashlib.sha256((inspect.getsource(picture) + inspect.getsource(text) + figures).encode()).hexdigest()


def read_digest(png: bytes) -> str | None:
    """Return the digest that is stored in a picture."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        found = image.info.get("Description")
    return None if found is None else str(found)


def write() -> None:
    """Draw the pictures that are not up to date, and remove those that are no longer drawn."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, _, statistics in PICTURES:
        path = DIRECTORY / name
        if not path.exists() or read_digest(path.read_bytes()) != digest(statistics):
            with path.open("wb") as file:
                picture.render(picture.figures_of(statistics), file, description=digest(statistics))
    for path in DIRECTORY.glob("*.png"):
        if path.name not in {name for name, _, _ in PICTURES}:
            path.unlink()

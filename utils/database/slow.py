"""Statements that took long, with who asked for them."""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

#: Slow statements that are kept for `Database.get_stats`.
KEPT = 50
#: Characters of a statement that are shown.
SHOWN = 1_000
_ROOT = Path(__file__).resolve().parents[2]
_HERE = str(Path(__file__).resolve().parent)
_REPOSITORIES = str(Path(__file__).resolve().parents[1] / "repositories")


class SlowLog:
    """Logs what takes longer than `threshold_ms` milliseconds; with `log_all` also everything else."""

    def __init__(self, threshold_ms: int, *, log_all: bool = False) -> None:
        self.threshold: float = threshold_ms / 1000
        self.log_all: bool = log_all
        #: Statements that were slow, since the start.
        self.count: int = 0
        self._latest: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def note(self, sql: str, started: float, frame: FrameType | None) -> None:
        """Note a statement that began at `started` (`time.perf_counter`); arguments are never shown.

        `frame`: where it was asked for. None: it is not known.
        """
        seconds = time.perf_counter() - started
        if seconds < self.threshold and not self.log_all:
            return
        about = {"sql": " ".join(sql.split())[:SHOWN], "ms": round(seconds * 1000, 1), "caller": caller(frame)}
        if seconds < self.threshold:
            _log.info("statement", extra=about)
            return
        self.count += 1
        self._latest.append(about | {"at": time.time()})
        _log.warning("slow statement (db.explain shows its plan)", extra=about)

    def latest(self) -> list[dict[str, Any]]:
        """Return the latest slow statements, oldest first: `sql`, `ms`, `caller`, `at` (Unix time in seconds)."""
        return list(self._latest)


def caller(frame: FrameType | None) -> str:
    """Return file, line and function of the first frame that is no part of the data layer."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not (file.startswith((_HERE, _REPOSITORIES)) or "/sqlalchemy/" in file or file.endswith("contextlib.py")):
            path = Path(file)
            shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
            return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"

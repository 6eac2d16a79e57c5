"""Which code runs a statement or holds a connection: for the slow log, and for the error when no connection is free."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

#: Holders that an error names.
HOLDERS_SHOWN = 5
_ROOT = Path(__file__).resolve().parents[2]
_DATA_LAYER = tuple(str(_ROOT / "utils" / name) for name in ("database", "repositories"))
_EVENT_LOOP = str(Path(asyncio.__file__).parent)
_LIBRARIES = ("/sqlalchemy/", "/asyncpg/", "/contextlib.py", "/greenlet/")


#: Where code is: in the data layer or its libraries, in the event loop, or outside.
_INSIDE, _LOOP, _OUTSIDE = 1, 2, 3
#: Found once for each piece of code, because every statement asks for some of them.
_places: dict[CodeType, int] = {}
PLACES_KEPT = 2_000


class Caller(NamedTuple):
    """A line of code outside the data layer."""

    code: CodeType
    line: int

    def __str__(self) -> str:
        path = Path(self.code.co_filename)
        shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
        return f"{shown}:{self.line} {self.code.co_name}"


def find_caller(frame: FrameType | None) -> Caller | None:
    """Return the innermost caller outside the data layer and its libraries; None when a task began inside them."""
    while frame is not None:
        code = frame.f_code
        place = _places.get(code) or _place_of(code)
        if place == _OUTSIDE:
            return Caller(code, frame.f_lineno)
        if place == _LOOP:
            return None
        frame = frame.f_back
    return None


def _place_of(code: CodeType) -> int:
    file = code.co_filename
    is_inside = file.startswith(_DATA_LAYER) or any(part in file for part in _LIBRARIES)
    place = _LOOP if file.startswith(_EVENT_LOOP) else _INSIDE if is_inside else _OUTSIDE
    if len(_places) < PLACES_KEPT:
        _places[code] = place
    return place


class Holder(NamedTuple):
    """Who holds a connection, and since when on the monotonic clock."""

    who: Caller | str | None
    task: str
    since: float

    def __str__(self) -> str:
        return f"{self.who or f'task {self.task}'} for {time.monotonic() - self.since:.1f} s"


class Holders:
    """The connections in use, with the code that holds each."""

    def __init__(self) -> None:
        self._held: dict[int, Holder] = {}
        self._keys = itertools.count()

    def add(self, who: Caller | str | None) -> int:
        """Record a holder and return its key for `remove`. None: the current task."""
        name = ""
        if who is None:
            task = asyncio.current_task()
            name = "?" if task is None else task.get_name()
        key = next(self._keys)
        self._held[key] = Holder(who, name, time.monotonic())
        return key

    def remove(self, key: int | None) -> None:
        """Forget a holder; unknown keys are ignored."""
        if key is not None:
            self._held.pop(key, None)

    def list(self) -> list[dict[str, object]]:
        """Return `who` and `seconds` of every holder, the longest first."""
        now = time.monotonic()
        return [
            {"who": str(holder.who or f"task {holder.task}"), "seconds": round(now - holder.since, 3)}
            for holder in sorted(self._held.values(), key=lambda holder: holder.since)
        ]

    def __str__(self) -> str:
        """Name the longest holders, such as `held by cogs/shop.py:12 buy for 31.2 s`."""
        oldest = sorted(self._held.values(), key=lambda holder: holder.since)
        if not oldest:
            return "held by nobody known"
        shown = ", ".join(map(str, oldest[:HOLDERS_SHOWN]))
        more = f" and {len(oldest) - HOLDERS_SHOWN} more" if len(oldest) > HOLDERS_SHOWN else ""
        return f"held by {shown}{more}"


class Timing:
    """How long a statement waited for its connection, in seconds."""

    __slots__ = ("waited",)

    def __init__(self) -> None:
        self.waited: float = 0.0

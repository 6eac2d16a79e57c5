"""Which code runs a statement or holds a connection: for the slow log, and for the error when no connection is free."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

#: Holders that an error names.
HOLDERS_SHOWN = 5
_ROOT = Path(__file__).resolve().parents[2]
_DATA_LAYER = tuple(str(_ROOT / "utils" / name) for name in ("database", "repositories"))
_EVENT_LOOP = str(Path(asyncio.__file__).parent)
_LIBRARIES = ("/sqlalchemy/", "<sqlalchemy generated ", "/asyncpg/", "/contextlib.py", "/greenlet/")


#: Where code is: in the data layer or its libraries, in the event loop, or outside.
_INSIDE, _LOOP, _OUTSIDE = 1, 2, 3
#: By file, found once for each, because every statement asks. Not by code object: those hash their whole content.
_places: dict[str, int] = {}
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
        place = _places.get(code.co_filename) or _place_of(code.co_filename)
        if place == _OUTSIDE:
            return Caller(code, frame.f_lineno)
        if place == _LOOP:
            return None
        frame = frame.f_back
    return None


def _place_of(file: str) -> int:
    is_inside = file.startswith(_DATA_LAYER) or any(part in file for part in _LIBRARIES)
    place = _LOOP if file.startswith(_EVENT_LOOP) else _INSIDE if is_inside else _OUTSIDE
    if len(_places) < PLACES_KEPT:
        _places[file] = place
    return place


class Use:
    """One use of a connection: who asked for it, when, and since when it is theirs, by `time.perf_counter`.

    Code outside the data layer is kept as its frame: every statement makes a `Use`, and only an error or a slow
    statement needs the line, which is then the one where that code waits.
    """

    __slots__ = ("asked", "since", "who")
    who: Caller | FrameType | str
    asked: float
    since: float

    def __init__(self, frame: FrameType, name: str | None = None) -> None:
        """`frame`: of the code that asks. `name`: shown instead of it; None: the line of code."""
        who: Caller | FrameType | str = frame
        if name is not None:
            who = name
        elif _places.get(frame.f_code.co_filename) != _OUTSIDE:
            who = find_caller(frame) or _current_task()
        self.who = who
        self.asked = self.since = time.perf_counter()

    def begin(self) -> None:
        """Record that the connection was acquired."""
        self.since = time.perf_counter()

    @property
    def waited(self) -> float:
        """Seconds from the request to the connection."""
        return self.since - self.asked

    def __str__(self) -> str:
        return str(Caller(self.who.f_code, self.who.f_lineno) if isinstance(self.who, FrameType) else self.who)


def _current_task() -> str:
    task = asyncio.current_task()
    return f"task {'?' if task is None else task.get_name()}"


class Holders(set[Use]):
    """The connections in use."""

    def longest(self) -> list[dict[str, object]]:
        """Return `who` and `seconds` of every holder, the longest first."""
        now = time.perf_counter()
        return [
            {"who": str(use), "seconds": round(now - use.since, 3)} for use in sorted(self, key=lambda use: use.since)
        ]

    def __str__(self) -> str:
        """Name the longest holders, such as `held by cogs/shop.py:12 buy for 31.2 s`."""
        longest = self.longest()
        if not longest:
            return "held by nobody known"
        shown = ", ".join(f"{held['who']} for {held['seconds']:.1f} s" for held in longest[:HOLDERS_SHOWN])
        more = f" and {len(longest) - HOLDERS_SHOWN} more" if len(longest) > HOLDERS_SHOWN else ""
        return f"held by {shown}{more}"

"""Where code is: of a task that waits, and of a thread that works."""

from __future__ import annotations

import asyncio
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def describe_position(task: asyncio.Task[Any]) -> str:
    """Return the innermost place in a task that is no library's and not ours, as "path:line in function"."""
    frames = list(waiting_frames(task.get_coro()))
    found = innermost(frames, is_foreign_code) or innermost(frames, lambda _: True)
    return "an unknown place" if found is None else describe_frame(found)


def waiting_frames(coroutine: Any) -> Iterator[FrameType]:
    """Yield the frames of a coroutine and of what it awaits, outermost first."""
    seen: set[int] = set()
    while coroutine is not None and id(coroutine) not in seen:
        seen.add(id(coroutine))
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if isinstance(frame, FrameType):
            yield frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)


def running_frames(frame: FrameType | None) -> list[FrameType]:
    """Return a thread's frames, outermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames[::-1]


def innermost(frames: Iterable[FrameType], matches: Callable[[FrameType], bool]) -> FrameType | None:
    """Return the last frame, of those given outermost first, that matches; None if none does."""
    return next((frame for frame in reversed(list(frames)) if matches(frame)), None)


def is_foreign_code(frame: FrameType) -> bool:
    """Return whether a frame runs code of a cog or of whatever it imports, and not of a library or of the framework."""
    name, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__", ""))
    if name.startswith(("<", *_LIBRARIES)):
        return False
    return module.split(".")[0] not in ("utils", "models") or not name.startswith(str(_ROOT))


def describe_frame(frame: FrameType) -> str:
    """Return "path:line in function"; a path below the working directory is shown from there."""
    path = Path(frame.f_code.co_filename)
    for base in (Path.cwd(), _ROOT):
        if path.is_relative_to(base):
            path = path.relative_to(base)
            break
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"

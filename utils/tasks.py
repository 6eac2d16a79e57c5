"""Ends background tasks, and runs blocking calls that may hang."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

#: Seconds after which a task that has not ended is cancelled again.
AGAIN_SECONDS = 0.5


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]], timeout: float | None = None) -> set[asyncio.Task[Any]]:
    """Cancel tasks, wait until they have ended, and return those that still run after `timeout` seconds (None: no end).

    What they return or raise stays with them.

    One cancellation may be lost: a task group that is cancelled while one of its tasks fails raises that task's error
    instead, as clean-up may, and a loop that retries after errors goes on. It is therefore repeated.
    """
    ends_at = math.inf if timeout is None else time.monotonic() + timeout
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        left = max(0.0, ends_at - time.monotonic())
        _, running = await asyncio.wait(running, timeout=min(AGAIN_SECONDS, left))
        if time.monotonic() >= ends_at:
            break
    return running


async def run_in_daemon_thread(function: Callable[[], ResultT]) -> ResultT:
    """Return what `function` returns, run in a daemon thread: one that hangs on a dead disk must not block the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: ResultT | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: ResultT | None = None
        error: BaseException | None = None
        try:
            result = function()
        except Exception as exc:
            error = exc
        except BaseException as exc:  # a panic of code in Rust
            error = RuntimeError(f"{type(exc).__name__}: {exc}")
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="may hang", daemon=True).start()
    return await future

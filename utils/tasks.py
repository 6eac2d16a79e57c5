"""Ends background tasks."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from typing import Any

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

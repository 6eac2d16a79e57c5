"""Ends background tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

#: Seconds after which a task that has not ended is cancelled again.
AGAIN_SECONDS = 0.5


async def cancel_and_wait(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait until all have ended. What they return or raise stays with them.

    One cancellation may be lost: a task group that is cancelled while one of its tasks fails raises that task's error
    instead, as clean-up may, and a loop that retries after errors goes on. It is therefore repeated.
    """
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN_SECONDS)

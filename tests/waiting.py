"""Wait in a test until a condition holds, for a bounded time, with an error that names the condition."""

from __future__ import annotations

import asyncio
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

#: Seconds that a test waits by default. Generous, because it costs nothing unless the test fails.
TIMEOUT = 40.0


async def until(condition: Callable[[], Any], timeout: float = TIMEOUT, *, interval: float = 0.005) -> Any:
    """Evaluate a condition, which may be a coroutine function, until it returns something true, and return that.

    Raises `AssertionError` with the condition's source and its last value if it does not hold within `timeout` seconds.

        await until(lambda: bot.is_ready())
        row = await until(lambda: pool.fetchrow("SELECT * FROM members WHERE user_id = $1", user_id))
    """
    value: Any = None
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            while True:
                value = condition()
                if inspect.isawaitable(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(interval)
    except TimeoutError:
        if not scope.expired():
            raise
    raise AssertionError(f"not true after {timeout:g} s: {_describe(condition)}; last value: {value!r}")


def _describe(condition: Callable[[], Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(condition)).strip()
    except (OSError, TypeError):
        return repr(condition)

"""The retry policy for calls that may succeed later, used by cogs and by the bot itself."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import stamina

from utils.database.transactions import joined
from utils.exceptions import is_transient

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds before the second attempt, and the longest delay.
FIRST_SECONDS, MAX_SECONDS = 0.1, 5.0


def retrying(
    attempts: int = 5, seconds: float = 30.0, *, first_seconds: float = FIRST_SECONDS
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
    """Return a decorator that retries a coroutine function after transient errors (`utils.exceptions.is_transient`).

    attempts, seconds: whichever is reached first ends the retries, and the last error is raised.
    first_seconds: the delay before the second attempt; it doubles up to 5 s, and jitter adds up to as much again.

    Permanent errors are raised at once. Inside an open transaction there is one attempt, because a failed transaction
    can only be repeated as a whole: decorate the function that opens it.
    """

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if joined() is not None:
                return await function(*args, **kwargs)
            async for attempt in stamina.retry_context(
                on=_is_transient, attempts=attempts, timeout=seconds,
                wait_initial=first_seconds, wait_max=MAX_SECONDS, wait_jitter=first_seconds,
            ):  # fmt: skip
                with attempt:
                    if attempt.num > 1:
                        _log.info("retrying %s", function.__qualname__, extra={"attempt": attempt.num})
                    return await function(*args, **kwargs)
            raise AssertionError("unreachable: the last attempt returns or raises")

        return wrapper

    return decorate


def _is_transient(error: Exception) -> bool:
    return is_transient(error)


def backoff_seconds(failures: int, *, first: float, longest: float) -> float:
    """Return the delay before the next attempt after `failures` consecutive failures, in seconds.

    It starts at `first`, doubles up to `longest`, and varies by 20 % at random. For work that is queued again and not
    retried in place, where stamina applies.
    """
    return min(first * 2.0 ** min(failures - 1, 63), longest) * random.uniform(0.8, 1.2)

"""`retrying`: a decorator for coroutines of cogs that may succeed later. The bot itself uses stamina at each place."""

from __future__ import annotations

import functools
import random
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from utils.database.retries import RetryDefaults, RetryPolicy, defaults, describe, retry

__all__ = ["RetryDefaults", "backoff_seconds", "defaults", "retrying"]

P = ParamSpec("P")
R = TypeVar("R")


def retrying(
    attempts: int | None = None,
    seconds: float = 30.0,
    *,
    first_seconds: float | None = None,
    max_seconds: float | None = None,
    factor: float = 2.0,
    errors: tuple[type[Exception], ...] = (),
    context: str | None = None,
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
    """Return a decorator that retries a coroutine function after transient errors (`utils.exceptions.is_transient`).

    attempts, seconds: whichever is reached first ends the retries. Then the last error is raised, and a line such as
        "sync of shops failed after 5 attempts" is logged. attempts None: DB_RETRY_ATTEMPTS.
    first_seconds: the delay before the second attempt; each is `factor` times as long as the one before, up to
        `max_seconds`, and jitter adds up to `first_seconds`. None: DB_RETRY_SECONDS and DB_RETRY_MAX_SECONDS.
    errors: exceptions that are transient besides those of the database.
    context: what the log lines call the work; None: the name of the function.

    Permanent errors are raised at once. Inside an open transaction there is one attempt, because a failed transaction
    can only be repeated as a whole: decorate the function that opens it, or use `db.run`.
    """
    policy = RetryPolicy(
        attempts=attempts, seconds=seconds, first_seconds=first_seconds, max_seconds=max_seconds, factor=factor,
        errors=errors,
    )  # fmt: skip

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            return await retry(lambda: function(*args, **kwargs), policy, context or describe(function))

        return wrapper

    return decorate


def backoff_seconds(failures: int, *, first: float, longest: float) -> float:
    """Return the delay before the next attempt after `failures` consecutive failures, in seconds.

    It starts at `first`, doubles up to `longest`, and varies by 20 % at random. For work that is queued again and not
    retried in place, where stamina applies.
    """
    return min(first * 2.0 ** min(failures - 1, 63), longest) * random.uniform(0.8, 1.2)

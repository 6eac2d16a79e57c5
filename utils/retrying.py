"""`retrying`: a decorator for coroutines of cogs that may succeed later. The bot itself uses stamina at each place."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import stamina

from utils.database.transactions import joined
from utils.exceptions import is_transient

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True)
class RetryDefaults:
    """What `retrying` uses where a decorator says nothing: DB_RETRY_ATTEMPTS, DB_RETRY_SECONDS, DB_RETRY_MAX_SECONDS.

    Decorators are evaluated at import, before the settings are read, so they look here at each call.
    """

    attempts: int = 5
    #: The delays before the second attempt and between later ones at most, in seconds.
    first_seconds: float = 0.1
    max_seconds: float = 5.0


defaults = RetryDefaults()


def retrying(
    attempts: int | None = None, seconds: float = 30.0, *, first_seconds: float | None = None
) -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]:
    """Return a decorator that retries a coroutine function after transient errors (`utils.exceptions.is_transient`).

    attempts, seconds: whichever is reached first ends the retries, and the last error is raised. attempts None:
        DB_RETRY_ATTEMPTS.
    first_seconds: the delay before the second attempt; it doubles up to DB_RETRY_MAX_SECONDS, and jitter adds up to as
        much again. None: DB_RETRY_SECONDS.

    Permanent errors are raised at once. Inside an open transaction there is one attempt, because a failed transaction
    can only be repeated as a whole: decorate the function that opens it.
    """

    def decorate(function: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
        @functools.wraps(function)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            if joined() is not None:
                return await function(*args, **kwargs)
            first = defaults.first_seconds if first_seconds is None else first_seconds
            async for attempt in stamina.retry_context(
                on=_is_transient, attempts=defaults.attempts if attempts is None else attempts, timeout=seconds,
                wait_initial=first, wait_max=defaults.max_seconds, wait_jitter=first,
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

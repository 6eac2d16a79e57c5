"""Retries with growing delays: the one policy behind `retrying`, `db.execute_with_retry` and `db.run`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import stamina

from utils.database.transactions import joined
from utils.exceptions import is_transient

_log = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass(slots=True)
class RetryDefaults:
    """What is used where a caller says nothing: DB_RETRY_ATTEMPTS, DB_RETRY_SECONDS, DB_RETRY_MAX_SECONDS.

    Decorators are evaluated at import, before the settings are read, so they look here at each call.
    """

    attempts: int = 5
    #: The delays before the second attempt and between later ones at most, in seconds.
    first_seconds: float = 0.1
    max_seconds: float = 5.0


defaults = RetryDefaults()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to try again, and for how long. None: the default of the settings."""

    #: Whichever of the two is reached first ends the retries.
    attempts: int | None = None
    seconds: float = 30.0
    #: The delay before the second attempt, and the longest.
    first_seconds: float | None = None
    max_seconds: float | None = None
    #: How much longer each delay is than the one before.
    factor: float = 2.0
    #: Tried again besides what `is_worth_retrying` says.
    errors: tuple[type[Exception], ...] = ()
    is_worth_retrying: Callable[[Exception], bool] = is_transient

    def __post_init__(self) -> None:
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, not {self.attempts}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, not {self.factor}: delays do not get shorter")

    def admits(self, error: Exception) -> bool:
        """Return whether to try again after this error."""
        return isinstance(error, self.errors) or self.is_worth_retrying(error)


async def retry(function: Callable[[], Awaitable[R]], policy: RetryPolicy, what: str) -> R:
    """Await `function` until it succeeds, and return its result; raise its last error when the policy says so.

    `what` names the work in log lines. Errors that the policy does not admit are raised at once. Inside an open
    transaction there is one attempt, because a failed transaction can only be repeated as a whole.
    """
    if joined() is not None:
        return await function()
    first = defaults.first_seconds if policy.first_seconds is None else policy.first_seconds
    number = 0
    try:
        async for attempt in stamina.retry_context(
            on=policy.admits,
            attempts=defaults.attempts if policy.attempts is None else policy.attempts,
            timeout=policy.seconds,
            wait_initial=first,
            wait_max=max(first, defaults.max_seconds if policy.max_seconds is None else policy.max_seconds),
            wait_jitter=first,
            wait_exp_base=policy.factor,
        ):
            with attempt:
                number = attempt.num
                if number > 1:
                    _log.info("retrying %s", what, extra={"attempt": number})
                return await function()
    except Exception as exc:
        if number > 1 or policy.admits(exc):
            counted = f"{what} failed after {number} attempt{'' if number == 1 else 's'}"
            exc.add_note(counted)
            _log.warning("%s: %s", counted, exc, extra={"attempts": number})
        raise
    raise AssertionError("unreachable: the last attempt returns or raises")


def describe(function: Callable[..., object]) -> str:
    """Return what log lines call a function."""
    return str(getattr(function, "__qualname__", None) or repr(function))

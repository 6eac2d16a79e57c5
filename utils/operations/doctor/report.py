"""What a check finds, and running one check: neither a crash nor a hang affects the others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from utils.exceptions import GuildbookError

if TYPE_CHECKING:
    from utils.operations.doctor.context import DoctorContext

State = Literal["ok", "warn", "fail"]

#: Most characters of an error's message in a finding.
ERROR_LENGTH = 300


class CheckSkipped(Exception):
    """A check cannot run, because something it needs is missing, which another check reports."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check."""

    state: State
    name: str
    #: What was found; no secrets.
    seen: str
    #: What to do about it; empty if there is nothing to do.
    todo: str = ""
    #: Whether the check still ran when its time was up.
    hangs: bool = False

    @property
    def line(self) -> str:
        """The finding as a line of text."""
        return f"{self.state:<4}  {self.name}: {self.seen}" + (f"; {self.todo}" if self.todo else "")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to check."""

    name: str
    #: Returns the findings. May raise `CheckSkipped`; anything else it raises becomes a failure.
    function: Callable[[DoctorContext], Awaitable[Sequence[Finding]]]
    #: Seconds after which the check is abandoned.
    timeout: float


async def run_check(context: DoctorContext, check: Check) -> Sequence[Finding]:
    """Run one check within its timeout and return its findings. Raises nothing."""
    task = asyncio.ensure_future(check.function(context))
    try:
        await asyncio.wait({task}, timeout=check.timeout)
    finally:
        was_running = not task.done()
        task.cancel()  # not awaited: a task that hangs may ignore it
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    if was_running:
        seen = f"no answer within {check.timeout:g} s"
        return [Finding("fail", check.name, seen, "what it asks does not respond: check that first", hangs=True)]
    if task.cancelled():
        return [Finding("fail", check.name, "the check was cancelled", "run it again")]
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, CheckSkipped):
        return [Finding("warn", check.name, f"not checked: {error}")]
    if isinstance(error, GuildbookError):
        return [Finding("fail", check.name, shorten(error))]
    seen = f"the check itself failed: {type(error).__name__}: {shorten(error)}"
    return [Finding("fail", check.name, seen, "please report this line")]


def shorten(error: BaseException) -> str:
    """Return an error's message on one line, cut to `ERROR_LENGTH`."""
    return " ".join(str(error).split())[:ERROR_LENGTH]

"""What a check finds, and running one check: neither a crash nor a hang affects the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from utils.exceptions import GuildbookError

if TYPE_CHECKING:
    from utils.operations.doctor.context import DoctorContext

State = Literal["ok", "warn", "fail"]
ResultT = TypeVar("ResultT")

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
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    return await future

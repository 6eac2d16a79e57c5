"""What a check finds, and running them all: one that crashes or hangs costs itself alone."""

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

#: Letters that are kept of what an error says.
TOLD = 300


class CheckSkipped(Exception):
    """A check cannot look: what it needs is missing, which another check reports."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check has found out."""

    state: State
    name: str
    #: What was seen; never a secret.
    seen: str
    #: What to do about it; "" where nothing is to be done.
    todo: str = ""
    #: Whether the check was given up while it still ran.
    hangs: bool = False

    @property
    def line(self) -> str:
        """It in a line for people."""
        return f"{self.state:<4}  {self.name}: {self.seen}" + (f"; {self.todo}" if self.todo else "")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at."""

    name: str
    #: Returns what it found; raises `CheckSkipped`, or anything, which is reported as it is.
    look: Callable[[DoctorContext], Awaitable[Sequence[Finding]]]
    #: Seconds after which it is given up.
    seconds: float


async def examined(patient: DoctorContext, checks: Sequence[Check]) -> list[Finding]:
    """Run the checks side by side and return what they found, in their order; each within its seconds."""
    found = await asyncio.gather(*(_looked(patient, check) for check in checks))
    return [finding for findings in found for finding in findings]


async def _looked(patient: DoctorContext, check: Check) -> Sequence[Finding]:
    task = asyncio.ensure_future(check.look(patient))
    try:
        await asyncio.wait({task}, timeout=check.seconds)
    finally:
        was_running = not task.done()
        task.cancel()  # not awaited: whoever hangs may not heed it
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    if was_running:
        seen = f"no answer within {check.seconds:g} s"
        return [Finding("fail", check.name, seen, "something it asks hangs: look at what it is about", hangs=True)]
    if task.cancelled():
        return [Finding("fail", check.name, "the check was cancelled", "run it again")]
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, CheckSkipped):
        return [Finding("warn", check.name, f"not looked at: {error}")]
    if isinstance(error, GuildbookError):
        return [Finding("fail", check.name, _line(error))]
    return [Finding("fail", check.name, f"the check itself failed: {type(error).__name__}: {_line(error)}",
                    "report it, with this line")]  # fmt: skip


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:TOLD]


async def in_thread(work: Callable[[], ResultT]) -> ResultT:
    """Return what `work` returns, from a thread that nobody waits for at the end: a dead disk never answers."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[ResultT] = loop.create_future()

    def settle(result: ResultT | None, error: BaseException | None) -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result: ResultT | None = None
        error: BaseException | None = None
        try:
            result = work()
        except Exception as exc:
            error = exc
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="doctor", daemon=True).start()
    return await answer

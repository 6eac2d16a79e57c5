"""How long a command may use the database: what it has not committed by then is never committed.

The context of a command's task carries its `Deadline`. Statements, transactions and sessions register with it while
they run, and ask it before they commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import asyncpg

from utils.exceptions import DRIVER_ERRORS, CommandTimedOut, CommitUnknown, GuildbookError, translate, was_rejected

#: Seconds for a rollback.
ROLLBACK_SECONDS = 5.0
#: Statements that may run in a transaction and end none: the others, such as VACUUM, CALL and DO, run on their own.
_MAY_BE_WRAPPED = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(?:insert|update|delete|merge|with|select|values|truncate)\b",
    re.IGNORECASE | re.DOTALL,
)


class Deadline:
    """The database's side of one run of a command."""

    __slots__ = ("_committing", "_numbers", "_working", "is_active", "is_over", "task")

    def __init__(self) -> None:
        #: The command's own task. Tasks that it started in the background are not held to the deadline.
        self.task: asyncio.Task[Any] | None = None
        #: False once the command has ended, or if it may take as long as it wants.
        self.is_active: bool = True
        #: Whether the command was given up: it commits nothing more.
        self.is_over: bool = False
        self._working: dict[int, float] = {}
        self._committing: set[int] = set()
        self._numbers = itertools.count()

    @property
    def is_committing(self) -> bool:
        """Whether something is being committed: until the server answers, nobody knows the outcome."""
        return bool(self._committing)

    @property
    def busy_seconds(self) -> float:
        """How long the oldest of its statements and transactions has been running; 0 if there is none."""
        return time.monotonic() - min(self._working.values()) if self._working else 0.0

    def check(self) -> None:
        """Raise `CommandTimedOut` in the task of a command that was given up."""
        if self.is_over and asyncio.current_task() is self.task:
            raise CommandTimedOut("the command was given up, so nothing more of it is sent to the database")

    def work(self) -> Callable[[], None]:
        """Register a statement or transaction; the function that is returned ends it. Raises like `check`."""
        self.check()
        number = next(self._numbers)
        self._working[number] = time.monotonic()
        return lambda: self._end_work(number)

    def _end_work(self, number: int) -> None:
        self._working.pop(number, None)

    def commit(self) -> Callable[[], None]:
        """Register a commit; the function that is returned ends it. Raises like `check`, before anything is sent."""
        self.check()
        number = next(self._numbers)
        self._committing.add(number)
        return lambda: self._committing.discard(number)


#: The deadline of the command that this context belongs to; None: of no command.
current: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def active() -> Deadline | None:
    """Return the deadline of the command that runs in this context; None if there is none."""
    deadline = current.get()
    return deadline if deadline is not None and deadline.is_active else None


def begin_work() -> Callable[[], None]:
    """Register a statement or transaction with the deadline of this context, if any; see `Deadline.work`."""
    deadline = active()
    return do_nothing if deadline is None else deadline.work()


def begin_commit() -> Callable[[], None]:
    """Register a commit with the deadline of this context, if any; see `Deadline.commit`."""
    deadline = active()
    return do_nothing if deadline is None else deadline.commit()


@contextlib.contextmanager
def committing() -> Iterator[None]:
    """Register a commit with the deadline of this context for the block."""
    end = begin_commit()
    try:
        yield
    finally:
        end()


def lift() -> None:
    """Let the command that runs in this context take as long as it wants."""
    if (deadline := active()) is not None:
        deadline.is_active = False


async def run_statement(
    connection: Any, verb: str, query: str, *args: Any, timeout: float | None, **kwargs: Any
) -> Any:
    """Run one statement with a method of `asyncpg.Connection`; for a command, so that it is not committed too late.

    A statement that is sent alone is committed whenever the server gets to it. If the server was suspended meanwhile,
    that is long after the user was told of a failure. A command's statement therefore has a transaction of its own,
    whose commit is sent once the statement was answered.
    """
    deadline = active()
    run = getattr(connection, verb)
    if deadline is None:
        return await run(query, *args, timeout=timeout, **kwargs)
    if verb != "copy_records_to_table" and _MAY_BE_WRAPPED.match(query) is None:
        with committing():
            return await run(query, *args, timeout=timeout, **kwargs)
    await connection.execute("BEGIN", timeout=timeout)
    try:
        result = await run(query, *args, timeout=timeout, **kwargs)
        deadline.check()
    except BaseException:
        await _roll_back(connection)
        raise
    await commit(connection, timeout=timeout)
    return result


async def commit(connection: Any, *, timeout: float | None = None) -> str:
    """Commit the open transaction of an asyncpg connection and return the server's command tag.

    Raises `CommandTimedOut` if its command was given up, and `CommitUnknown` if the server did not say how it ended.
    """
    with committing():
        try:
            tag: str = await connection.execute("COMMIT", timeout=timeout)
        except DRIVER_ERRORS as exc:
            if was_rejected(exc):
                raise
            raise unknown_commit(exc) from exc
        return tag


def unknown_commit(exc: Exception) -> Exception:
    """Return what to raise for an error of the driver while committing; any other error unchanged."""
    error = translate(exc)
    if error is None or isinstance(exc, GuildbookError):
        return exc
    return CommitUnknown(
        f"the server did not confirm the commit, so it may or may not have happened: {error}",
        sqlstate=getattr(error, "sqlstate", None),
    )


async def _roll_back(connection: Any) -> None:
    try:
        async with asyncio.timeout(ROLLBACK_SECONDS):
            await connection.execute("ROLLBACK")
    except (*DRIVER_ERRORS, asyncio.CancelledError):  # the server rolls back when the connection is closed
        with contextlib.suppress(asyncpg.InterfaceError):
            connection.terminate()


def do_nothing() -> None:
    """End nothing."""

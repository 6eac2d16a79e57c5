"""The queue for the connections of transactions and sessions: first come, first served, with a bound on the wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

from greenlet import getcurrent  # type: ignore[import-untyped]
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry
from sqlalchemy.util import await_only

from utils.database.callers import Caller, Holders, Use, find_caller
from utils.exceptions import DatabaseUnavailable, translate_errors
from utils.logs import RateLimit

_log = logging.getLogger(__name__)

#: Warnings about a full queue within ten seconds.
WARNINGS, WARNING_SECONDS = 1, 10.0

#: Who asks for a connection in this context, and for how many seconds; None: the calling code, the queue's timeout.
_asking: ContextVar[tuple[str | None, float | None]] = ContextVar("asking", default=(None, None))


class ConnectionQueue:
    """Gives each of `connections` to one holder at a time, in the order in which they asked."""

    def __init__(self, connections: int, timeout: float) -> None:
        """`timeout`: seconds to wait."""
        self.connections: int = connections
        self.timeout: float = timeout
        #: Who has a connection.
        self.holders: Holders = Holders()
        #: How many tasks wait for one.
        self.waiting: int = 0
        self._free: asyncio.Semaphore = asyncio.Semaphore(connections)  # which is fair
        self._uses: dict[ConnectionPoolEntry, Use] = {}
        self._warnings: RateLimit = RateLimit(WARNINGS, WARNING_SECONDS)

    @contextlib.contextmanager
    def asking(self, holder: str | None, timeout: float | None) -> Iterator[None]:
        """Name who asks in this block, and the seconds they wait; None: the calling code, and `timeout`."""
        token = _asking.set((holder, timeout))
        try:
            yield
        finally:
            _asking.reset(token)

    async def wait(self, timeout: float) -> None:
        """Wait for a connection to be free. Raises `DatabaseUnavailable` after `timeout` seconds."""
        if not self._free.locked():
            await self._free.acquire()
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout):
                await self._free.acquire()
        except TimeoutError:
            message = (
                f"no connection for a transaction or session was free within {timeout:g} s: there are"
                f" {self.connections} (DB_TRANSACTION_CONNECTIONS), {self.holders}"
            )
            if self._warnings.admits():
                _log.warning("%s", message, extra={"waiting": self.waiting})
            raise DatabaseUnavailable(message) from None
        finally:
            self.waiting -= 1

    def enter(self) -> Use:
        """Wait for a connection, in SQLAlchemy's greenlet, and return who asked."""
        holder, timeout = _asking.get()
        use = Use(sys._getframe(), holder or "")
        if holder is None:
            use.who = find_session_caller() or "unknown"
        await_only(self.wait(self.timeout if timeout is None else timeout))
        use.begin()
        return use

    def hold(self, record: ConnectionPoolEntry, use: Use) -> None:
        """Record who has a connection."""
        self._uses[record] = use
        self.holders.add(use)

    def cancel(self) -> None:
        """Take back an `enter` that got no connection."""
        self._free.release()

    def leave(self, record: ConnectionPoolEntry) -> None:
        """Give a connection to the next in the queue."""
        use = self._uses.pop(record, None)
        if use is not None:
            self.holders.discard(use)
            self._free.release()


class _TranslatingCreator:
    """Makes connections for SQLAlchemy and raises our errors."""

    def __init__(self, creator: Callable[[Any], Any]) -> None:
        self._creator = creator

    def __call__(self, record: Any) -> Any:
        with translate_errors(was_connected=True):
            return self._creator(record)


class QueuedPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool, whose own queue lets late-comers pass, behind a `ConnectionQueue`.

    A connection that cannot be made raises a `DatabaseError`, also to sessions that are held by hand.
    """

    queue: ConnectionQueue

    def __init__(self, creator: Any, **kwargs: Any) -> None:
        # `recreate` passes the creator of the old pool.
        wrapped: Any = creator if isinstance(creator, _TranslatingCreator) else _TranslatingCreator(creator)
        super().__init__(wrapped, **kwargs)

    def recreate(self) -> Any:
        """Return a new pool behind the same queue: connections of the old one that are in use count until the end."""
        pool: Any = super().recreate()
        pool.queue = self.queue
        return pool

    def _do_get(self) -> ConnectionPoolEntry:
        use = self.queue.enter()
        try:
            record = super()._do_get()
        except BaseException:
            self.queue.cancel()
            raise
        self.queue.hold(record, use)
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        try:
            super()._do_return_conn(record)
        finally:
            self.queue.leave(record)


def find_session_caller() -> Caller | None:
    """Return who called the session: SQLAlchemy runs statements in a greenlet, whose parent is the caller's."""
    current: Any = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    while current is not None:
        if (found := find_caller(frame)) is not None:
            return found
        current = current.parent
        frame = None if current is None else current.gr_frame
    return None

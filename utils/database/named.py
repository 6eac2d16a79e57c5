"""Transactions by name: begun, used, and committed or rolled back from wherever the name is known."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from cachetools import LRUCache

from utils.database.transactions import Isolation, Root, Transaction, bound_to
from utils.exceptions import DatabaseError
from utils.tasks import cancel_and_wait

if TYPE_CHECKING:
    from utils.database.access import Database

_log = logging.getLogger(__name__)

#: Seconds after which an open one is rolled back, unless its `begin_transaction` says otherwise.
LIMIT_SECONDS = 60.0
#: How many that were rolled back for their age are remembered, to say so when they are used.
EXPIRED_KEPT = 200


class TransactionSummary(TypedDict):
    """What a named transaction did."""

    #: Statements that it ran.
    operations: int
    #: Seconds from its begin to its end.
    duration: float


@dataclass(frozen=True, slots=True)
class _Open:
    transaction: Transaction
    root: Root
    timer: asyncio.TimerHandle


class NamedTransactions:
    """The open transactions that have a name. Each belongs to no context and holds a connection."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._open: dict[str, _Open | None] = {}
        self._expired: LRUCache[str, str] = LRUCache(EXPIRED_KEPT)
        self._ending: set[asyncio.Task[None]] = set()

    async def begin(
        self, name: str, *, isolation: Isolation | None, readonly: bool, limit: float | None, timeout: float | None
    ) -> str:
        """Begin one and return its name."""
        if name in self._open:
            raise DatabaseError(f"there is an open transaction {name!r}: commit it, roll it back, or use another name")
        limit = LIMIT_SECONDS if limit is None else limit
        transaction = Transaction(self._db, name, isolation, readonly=readonly, timeout=timeout)
        self._open[name] = None
        try:
            root = await transaction.begin()
        except BaseException:
            del self._open[name]
            raise
        timer = asyncio.get_running_loop().call_later(limit, self._expire, name, limit)
        self._open[name] = _Open(transaction, root, timer)
        self._expired.pop(name, None)
        return name

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run the statements of the block in the transaction."""
        with bound_to(self._find(name).root):
            yield

    async def end(self, name: str, *, is_failed: bool) -> TransactionSummary:
        """Commit or roll back."""
        found = self._find(name)
        del self._open[name]
        found.timer.cancel()
        operations, duration = found.root.statements, time.monotonic() - found.root.began
        await found.transaction.end(is_failed=is_failed)
        return {"operations": operations, "duration": duration}

    async def close(self, timeout: float) -> None:
        """Return the connections of those that are open, which were rolled back, within `timeout` seconds."""
        for name, found in list(self._open.items()):
            if found is not None:
                self._start_ending(name, found)
        if self._ending:
            await asyncio.wait(self._ending, timeout=timeout)
            await cancel_and_wait(self._ending, timeout)

    def _find(self, name: str) -> _Open:
        found = self._open.get(name)
        if found is not None:
            return found
        reason = self._expired.get(name)
        raise DatabaseError(
            reason or f"there is no open transaction {name!r}: begin it with db.begin_transaction({name!r})"
        )

    def _expire(self, name: str, limit: float) -> None:
        found = self._open.get(name)
        if found is None:
            return
        reason = (
            f"transaction {name} was rolled back: it was open for more than {limit:g} s (limit= of begin_transaction)"
        )
        self._expired[name] = found.root.ended_because = reason
        _log.warning("%s", reason, extra={"statements": found.root.statements})
        self._start_ending(name, found)

    def _start_ending(self, name: str, found: _Open) -> None:
        del self._open[name]
        found.timer.cancel()
        task = asyncio.get_running_loop().create_task(found.transaction.end(is_failed=True), name=f"roll back {name}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

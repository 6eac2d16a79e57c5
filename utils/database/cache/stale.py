"""The last known results of queries whose authors prefer an old answer to none: `fetch(sql, stale_if_error=3600)`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from cachetools import LRUCache

from utils.database.cache.results import CachedResult, Key, make_cacheable
from utils.exceptions import DatabaseUnavailable, TransactionConflict
from utils.logs import RateLimit
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: Results that are kept.
MAX_RESULTS = 2_000
#: Seconds for the database to answer before an old result is returned.
PATIENCE_SECONDS = 1.5
#: Warnings within ten seconds.
WARNINGS, WARNING_SECONDS = 1, 10.0


class StaleResults:
    """Results beyond their time in the query cache, also those of tables that were written since."""

    def __init__(self, *, patience: float = PATIENCE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        """patience: seconds for the database to answer before an old result is returned."""
        self.patience: float = patience
        self.clock: Callable[[], float] = clock
        #: How often an old result was returned.
        self.served: int = 0
        self._results: LRUCache[Key, CachedResult] = LRUCache(MAX_RESULTS)
        self._reads: dict[Key, asyncio.Task[Any]] = {}
        self._forgotten: int = 0
        self._warnings: RateLimit = RateLimit(WARNINGS, WARNING_SECONDS)

    async def read(self, key: Key, max_age: float, sql: str, read: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Await `read` and remember its result; in an outage, return the remembered one of the last `max_age` seconds.

        Without one, the error is raised. If the database does not answer within `patience`, `read` goes on in the
        background for the next caller.
        """
        kept, forgotten = self._results.get(key), self._forgotten
        if kept is None or self.clock() - kept.expires > max_age:
            value = await read()
            result = self._remember(key, value, forgotten)
            return value if result is None else result.value()
        task = self._reads.get(key)
        is_mine = task is None
        if task is None:
            task = self._reads[key] = asyncio.get_running_loop().create_task(read())
            task.add_done_callback(lambda done: self._end(key, done, forgotten))
        await asyncio.wait((task,), timeout=self.patience)
        reason = "no answer in time"
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is None:
                value = task.result()
                result = make_cacheable(value, 0.0, frozenset())
                if result is None:  # it cannot be copied: for one reader
                    return value if is_mine else await read()
                return result.value()
            if not isinstance(error, DatabaseUnavailable) or isinstance(error, TransactionConflict):
                raise error
            reason = str(error)
        self.served += 1
        if self._warnings.admits():
            age = round(self.clock() - kept.expires, 1)
            _log.warning("served old results of queries: %s", reason, extra={"sql": sql[:200], "age": age})
        return kept.value()

    def forget(self, key: Key) -> None:
        """Drop a result: this process has replaced it. What is being read now is not remembered."""
        self._forgotten += 1
        self._results.pop(key, None)
        self._reads.pop(key, None)

    async def close(self, timeout: float) -> None:
        """End the reads in the background within `timeout` seconds."""
        await cancel_and_wait([*self._reads.values()], timeout)

    def _remember(self, key: Key, value: Any, forgotten: int) -> CachedResult | None:
        """Return the result, remembered unless something was forgotten since the read began; None: not copyable."""
        result = make_cacheable(value, self.clock(), frozenset())  # `expires` is when it was read
        if result is not None and forgotten == self._forgotten:
            self._results[key] = result
        return result

    def _end(self, key: Key, task: asyncio.Task[Any], forgotten: int) -> None:
        if self._reads.get(key) is task:
            del self._reads[key]
        if not task.cancelled() and task.exception() is None:
            self._remember(key, task.result(), forgotten)

"""The results that are kept, and who may still have them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar, cast

from cachetools import LRUCache

from utils.database.cache.catalog import Catalog, load_catalog
from utils.database.cache.results import Kept, Key, keep, key_of
from utils.database.cache.statements import UNKNOWN, Statement, analyse, parser
from utils.database.pool import Pool
from utils.exceptions import DatabaseError

_log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds that tables bypass the cache after a write whose end is not known: the server gives up on it by then.
DISTRUST_SECONDS = 5.0
#: Readers of one question that go on in the same turn of the event loop.
_WOKEN_AT_ONCE = 500
#: Texts that are remembered.
_MOST_TEXTS = 2_000
#: Seconds between two attempts to read the catalogue again.
_RELOAD_SECONDS = 0.2, 5.0


class QueryCache:
    """Results of SELECTs, until a table that they were read from is written.

    A result is kept for `ttl` seconds at most, and only when nothing wrote its tables since its question went out.
    Results of more than 5,000 rows, with two equally named columns beside a list or dict, or with cells of types that
    are not known to be immutable are not kept. Nothing is kept before `load`, and nothing after a write that could not
    be told until the catalogue has been read again.
    """

    def __init__(
        self, *, max_results: int = 2000, ttl: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`ttl` is in seconds of `clock`."""
        self.ttl: float = ttl
        self.clock: Callable[[], float] = clock
        #: Tells the other processes: (tables or None for all, whether they are to be distrusted). None: there are none.
        self.announce: Callable[[frozenset[str] | None, bool], None] | None = None
        self._results: _Results = _Results(max_results)
        self._flights: dict[Key, _Flight] = {}
        self._texts: LRUCache[str, Statement] = LRUCache(_MOST_TEXTS)
        self._catalogue: Catalog | None = None
        self._database: Pool | None = None
        self._reload: asyncio.Task[None] | None = None
        self._is_outdated: bool = False
        self._schema_changes: int = 0
        self._trusted_until: float = math.inf
        self._writes: dict[str, int] = {}
        self._floods: int = 0
        self._distrusted: dict[str, float] = {}
        self._all_distrusted: float = -math.inf
        self._requests: int = 0
        self._hits: int = 0
        self._shared: int = 0
        self._bypassed: int = 0
        self._uncacheable: int = 0
        self._invalidations: int = 0

    def __repr__(self) -> str:
        return f"<QueryCache {self.stats()}>"

    async def load(self, database: Pool) -> None:
        """Read the catalogue and empty the cache: at the start and after every migration.

        Raises `DatabaseError` when the database does not answer; nothing is kept then until it has been read.
        """
        self._database = database
        self._is_outdated = True
        await asyncio.to_thread(parser)
        changes = self._schema_changes
        catalogue = await load_catalog(database)
        if catalogue != self._catalogue:
            self._catalogue = catalogue
            self._texts.clear()
        self._is_outdated = changes != self._schema_changes  # then it is being read again
        self._drop(None)

    async def close(self) -> None:
        """Keep nothing any more."""
        self._trusted_until = -math.inf
        task, self._reload = self._reload, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._drop(None)

    def statement(self, sql: str) -> Statement:
        """Return what a text reads and writes; nothing can be told before `load`."""
        try:
            return self._texts[sql]
        except KeyError:
            if self._catalogue is None:
                return UNKNOWN
            told = self._texts[sql] = analyse(sql, self._catalogue)
            return told

    def copied(self, table: str) -> frozenset[str] | None:
        """Return what COPY into "schema.table" writes; None, as in a `Statement`: cannot be told."""
        if self._catalogue is None:
            return None
        schema, _, name = table.rpartition(".")
        oid = self._catalogue.find(schema or None, name)
        return None if oid is None else self._catalogue.written([oid], "INSERT")

    async def fetch(self, verb: str, sql: str, args: tuple[Any, ...], run: Callable[[], Awaitable[T]]) -> T:
        """Return what is kept of this question, or what `run` returns; who asks the same meanwhile waits for it.

        An error of `run` goes to all who wait and is not kept. Once the last of them is cancelled, `run` is as well.
        """
        self._requests += 1
        key = key_of(verb, sql, args)
        now = self.clock()
        if key is not None and now < self._trusted_until and not self._is_outdated:
            kept = self._results.get(key)
            if kept is not None:
                if now < kept.expires:
                    self._hits += 1
                    return cast(T, kept.take())
                self._results.pop(key)
            told = self.statement(sql)
            if told.is_cacheable and told.reads is not None and not self._is_distrusted(told.reads, now):
                return await self._share(key, told.reads, run)
        self._bypassed += 1
        return await run()

    def held(self, verb: str, sql: str, args: tuple[Any, ...]) -> Kept | None:
        """Return what is kept of this question, None when nothing is: what `fetch` begins with, without a coroutine."""
        key = key_of(verb, sql, args)
        if key is None or self._is_outdated:
            return None
        now = self.clock()
        kept = self._results.get(key)
        if kept is None or now >= self._trusted_until or now >= kept.expires:
            return None
        self._requests += 1
        self._hits += 1
        return kept

    def forget(self, sql: str, args: tuple[Any, ...]) -> None:
        """Drop what is kept of this very question; a question under way is not kept either."""
        for verb in ("fetch", "fetchrow", "fetchval"):
            key = key_of(verb, sql, args)
            if key is not None:
                self._flights.pop(key, None)
                self._results.pop(key, None)

    def invalidate(self, tables: Iterable[str] | None) -> None:
        """Drop what was read from tables that were written, here and in the other processes.

        `tables` are "schema.table"; None, or a name that the catalogue does not know: everything, and the catalogue
        is read again.
        """
        names = self._named(tables)
        self.heard(names, is_distrusted=False)
        if self.announce is not None and names != frozenset():
            self.announce(names, False)

    def distrust(self, tables: Iterable[str] | None) -> None:
        """Bypass the cache for tables for `DISTRUST_SECONDS`: a write to them may still come to its end (None: all)."""
        names = self._named(tables)
        self.heard(names, is_distrusted=True)
        if self.announce is not None and names != frozenset():
            self.announce(names, True)

    def heard(self, tables: frozenset[str] | None, *, is_distrusted: bool) -> None:
        """Invalidate or distrust tables because another process says so; None: all, by a write that cannot be told."""
        if is_distrusted:
            until = self.clock() + DISTRUST_SECONDS
            if tables is None:
                self._all_distrusted = until
            else:
                self._distrusted.update(dict.fromkeys(tables, until))
        self._drop(tables)
        if tables is None and self._database is not None:
            self._is_outdated = True
            self._schema_changes += 1
            if self._reload is None or self._reload.done():
                self._reload = asyncio.get_running_loop().create_task(self._load_again(), name="query cache: catalogue")

    def flush(self, *, distrust: bool = False) -> None:
        """Drop everything because writes may have gone unheard; the catalogue is taken to be as it was."""
        if distrust:
            self._all_distrusted = self.clock() + DISTRUST_SECONDS
        self._drop(None)

    def trust(self, until: float) -> None:
        """Set the moment of the clock from which everything is bypassed: what others wrote may be unheard by then."""
        self._trusted_until = until

    @property
    def is_trusted(self) -> bool:
        """Whether results are given out at the moment."""
        return self.clock() < self._trusted_until and not self._is_outdated and self._catalogue is not None

    def stats(self) -> dict[str, float]:
        """Return the counters since the start.

        A request is a hit or a miss; of the misses, `shared` waited for somebody else's question, `bypassed` were
        asked as if there was no cache, and `uncacheable` results could not be kept. `evictions` made room for others,
        `invalidations` were dropped because of writes. `hit_rate` is 0 to 1.
        """
        return {
            "hits": self._hits,
            "misses": self._requests - self._hits,
            "hit_rate": self._hits / self._requests if self._requests else 0.0,
            "evictions": self._results.evictions,
            "invalidations": self._invalidations,
            "total_requests": self._requests,
            "size": len(self._results),
            "shared": self._shared,
            "bypassed": self._bypassed,
            "uncacheable": self._uncacheable,
        }

    def _named(self, tables: Iterable[str] | None) -> frozenset[str] | None:
        if tables is None or self._catalogue is None:
            return None
        return self._catalogue.names(tables)

    def _is_distrusted(self, tables: frozenset[str], now: float) -> bool:
        if now < self._all_distrusted:
            return True
        return bool(self._distrusted) and any(now < self._distrusted.get(table, now) for table in tables)

    def _drop(self, tables: frozenset[str] | None) -> None:
        if tables is None:
            self._floods += 1
            self._invalidations += len(self._results)
            self._results.clear()
            return
        for table in tables:
            self._writes[table] = self._writes.get(table, 0) + 1
            self._invalidations += self._results.drop(table)

    def _stamp(self, tables: frozenset[str]) -> tuple[int, ...]:
        return self._floods, *(self._writes.get(table, 0) for table in tables)

    async def _share(self, key: Key, tables: frozenset[str], run: Callable[[], Awaitable[T]]) -> T:
        stamp = self._stamp(tables)
        flight = self._flights.get(key)
        if flight is None or flight.stamp != stamp:
            flight = self._flights[key] = _Flight(stamp)
            flight.task = asyncio.create_task(self._fly(flight, key, tables, run))
        else:
            self._shared += 1
        kept = await flight.wait(lambda: self._land(key, flight))
        if kept is None:
            return await run() if flight.is_taken else cast(T, flight.take())
        return cast(T, kept.take())

    async def _fly(
        self, flight: _Flight, key: Key, tables: frozenset[str], run: Callable[[], Awaitable[Any]]
    ) -> Kept | None:
        expires = self.clock() + self.ttl
        try:
            value = await run()
            kept = keep(value, expires, tables)
            if kept is None:
                self._uncacheable += 1
                flight.value = value
            elif flight.stamp == self._stamp(tables) and self._flights.get(key) is flight:
                self._results[key] = kept
            return kept
        finally:
            self._land(key, flight)

    def _land(self, key: Key, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _load_again(self) -> None:
        delay, most = _RELOAD_SECONDS
        database = self._database
        while database is not None and self._is_outdated:
            await asyncio.sleep(delay)
            delay = min(delay * 2, most)
            if not database.is_connected:
                continue
            try:
                await self.load(database)
            except DatabaseError as exc:
                _log.warning("nothing is cached until the database's catalogue can be read: %s", exc)


class _Flight:
    """A question under way, and those who wait for its answer."""

    __slots__ = ("_unwoken", "is_taken", "stamp", "task", "traceback", "value", "waiters")

    def __init__(self, stamp: tuple[int, ...]) -> None:
        self.stamp: tuple[int, ...] = stamp
        self.task: asyncio.Task[Kept | None] | None = None
        self.waiters: int = 0
        self._unwoken: deque[asyncio.Future[None]] = deque()
        self.traceback: TracebackType | None = None
        #: A result that is not kept: for one reader, the others ask for themselves.
        self.value: Any = None
        self.is_taken: bool = False

    async def wait(self, abandon: Callable[[], None]) -> Kept | None:
        """Wait for the answer; the last to be cancelled cancels the question, and `abandon` is called at once."""
        task = self.task
        assert task is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self.waiters:
            task.add_done_callback(self._wake)
        self._unwoken.append(done)
        self.waiters += 1
        try:
            await done
        except asyncio.CancelledError:
            if self.waiters == 1 and not task.done():
                abandon()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            if task.done() and not task.cancelled():
                task.exception()  # nobody may be left to hear of it
            raise
        finally:
            self.waiters -= 1
        if task.cancelled():
            raise asyncio.CancelledError
        error = task.exception()
        if error is not None:
            # All raise the same one: each would add its own frames to what the others have added.
            if self.traceback is None:
                self.traceback = error.__traceback__
            raise error.with_traceback(self.traceback)
        return task.result()

    def _wake(self, _task: object = None) -> None:
        for _ in range(min(_WOKEN_AT_ONCE, len(self._unwoken))):
            done = self._unwoken.popleft()
            if not done.done():
                done.set_result(None)
        if self._unwoken:
            asyncio.get_running_loop().call_soon(self._wake)

    def take(self) -> Any:
        """Return the result that is not kept, once."""
        self.is_taken = True
        value, self.value = self.value, None
        return value


class _Results(LRUCache[Key, Kept]):
    """The results, found by their tables as well."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.evictions: int = 0
        self._by_table: dict[str, set[Key]] = {}

    def __setitem__(self, key: Key, value: Kept) -> None:
        super().__setitem__(key, value)
        for table in value.tables:
            self._by_table.setdefault(table, set()).add(key)

    def __delitem__(self, key: Key) -> None:
        for table in super().__getitem__(key).tables:
            self._by_table[table].discard(key)
        super().__delitem__(key)

    def popitem(self) -> tuple[Key, Kept]:
        self.evictions += 1
        return super().popitem()

    def drop(self, table: str) -> int:
        """Drop what was read from a table, and return how many results that were."""
        keys = list(self._by_table.get(table, ()))
        for key in keys:
            del self[key]
        return len(keys)

    def clear(self) -> None:
        """Drop all: no eviction."""
        evictions = self.evictions
        super().clear()
        self._by_table.clear()
        self.evictions = evictions

"""A TTL cache for cogs, and the single-flight that it shares with the query cache."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Hashable
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

import cachetools

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MISSING = object()
#: Callers of one load that resume in the same turn of the event loop.
_WOKEN_AT_ONCE = 500


class CacheStats(dict[str, float]):
    """Counters of a cache since the start, by name. Awaiting them returns them."""

    def __init__(
        self,
        *,
        hits: int = 0,
        total_requests: int = 0,
        evictions: int = 0,
        invalidations: int = 0,
        size: int = 0,
        **others: float,
    ) -> None:
        """`misses` and `hit_rate`, in percent with two decimals, follow from `hits` and `total_requests`."""
        super().__init__(
            hits=hits,
            misses=total_requests - hits,
            hit_rate=round(100 * hits / total_requests, 2) if total_requests else 0.0,
            evictions=evictions,
            invalidations=invalidations,
            total_requests=total_requests,
            size=size,
            **others,
        )

    def __await__(self) -> Generator[Any, None, CacheStats]:
        yield from ()
        return self


class TTLCache(Generic[K, V]):
    """Keeps at most `max_size` values, each for its own time or for `ttl` seconds, and evicts the least recently used.

    Callers share the value itself, not a copy. `clock` returns seconds.
    """

    def __init__(
        self, max_size: int = 1000, ttl: float = 300.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_size: int = max_size
        self.ttl: float = ttl
        self._values: _Values[K, V] = _Values(max_size, ttu=lambda _, entry, now: now + entry[1], timer=clock)
        self._loads: SingleFlight[K, V] = SingleFlight()
        self._requests: int = 0
        self._hits: int = 0
        self._invalidations: int = 0

    def __repr__(self) -> str:
        return f"<TTLCache {self.stats()}>"

    def __len__(self) -> int:
        self._values.expire()
        return len(self._values)

    def get(self, key: K, default: V | None = None) -> V | None:
        """Return the cached value, or `default`; a cached None is a value like any other."""
        value = self._find(key)
        return default if value is _MISSING else cast(V, value)

    def set(self, key: K, value: V, ttl: float | None = None) -> None:
        """Cache a value for `ttl` seconds (None: as long as the others); `max_size` holds for all of them.

        The result of a load of this key in progress will not be cached. Raises `ValueError` unless `ttl` is positive.
        """
        self._check(ttl)
        self._loads.forget(key)
        self._values[key] = value, self.ttl if ttl is None else ttl

    def delete(self, key: K) -> bool:
        """Drop a value and return whether there was one. The result of a load in progress will not be cached."""
        self._loads.forget(key)
        try:
            del self._values[key]
        except KeyError:
            return False
        self._invalidations += 1
        return True

    def clear(self) -> None:
        """Drop every value. The results of loads in progress will not be cached."""
        self._loads.clear()
        self._invalidations += len(self)
        self._values.clear()

    async def get_or_load(self, key: K, load: Callable[[], Awaitable[V]], ttl: float | None = None) -> V:
        """Return the cached value, or await `load`, cache its result for `ttl` seconds, as in `set`, and return it.

        Concurrent callers share one load. Its error is raised to all of them and is not cached; when the last of them
        is cancelled, so is the load. A caller after `set`, `delete` or `clear` never gets an older result. The load
        runs outside the transaction of the caller and does not see what that has written.
        """
        self._check(ttl)
        value = self._find(key)
        if value is not _MISSING:
            return cast(V, value)

        def store(loaded: V) -> None:
            self._values[key] = loaded, self.ttl if ttl is None else ttl

        # A shared load belongs to no caller's transaction, which may still be rolled back: hence the empty context.
        return await self._loads.run(key, load, store, context=contextvars.Context())

    def stats(self) -> CacheStats:
        """Return the counters since the start, named as in `Database.get_cache_stats`.

        `evictions` made room for other values, `invalidations` were deleted or cleared; expired values count as
        neither. `hit_rate` is in percent.
        """
        return CacheStats(
            hits=self._hits,
            total_requests=self._requests,
            evictions=self._values.evictions,
            invalidations=self._invalidations,
            size=len(self),
        )

    @staticmethod
    def _check(ttl: float | None) -> None:
        if ttl is not None and not ttl > 0:
            raise ValueError(f"ttl is in seconds and must be more than 0, not {ttl!r}: delete() drops a value")

    def _find(self, key: K) -> object:
        self._requests += 1
        try:  # not `in`: the value may expire in between
            value, _ = self._values[key]
        except KeyError:
            return _MISSING
        self._hits += 1
        return value


class _Values(cachetools.TLRUCache[K, tuple[V, float]]):
    """Values with their times to live, and a counter of evictions."""

    evictions: int = 0

    def popitem(self) -> tuple[K, tuple[V, float]]:
        self.evictions += 1
        return super().popitem()


class SingleFlight(Generic[K, V]):
    """Runs one load per key at a time, for all callers that ask for it meanwhile."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}

    def is_running(self, key: K, version: Hashable = None) -> bool:
        """Return whether `run` with these arguments would join a load in progress."""
        flight = self._flights.get(key)
        return flight is not None and flight.version == version

    async def run(
        self,
        key: K,
        load: Callable[[], Awaitable[V]],
        store: Callable[[V], None],
        *,
        version: Hashable = None,
        context: contextvars.Context | None = None,
    ) -> V:
        """Return the result of the load of `key` in progress, or start `load`.

        load: awaited once in a task, in `context` (None: a copy of the caller's).
        store: called with the result, unless the key was forgotten or loaded anew meanwhile.
        version: joins only a load of the same version; a load of another one is superseded.
        """
        flight = self._flights.get(key)
        if flight is None or flight.version != version:
            flight = self._flights[key] = _Flight(version)
            flight.start(self._load(flight, key, load, store), context)
        return await flight.wait(lambda: self._remove(key, flight))

    def forget(self, key: K) -> None:
        """Let the next caller start a new load; the result of the one in progress goes to its present callers only."""
        self._flights.pop(key, None)

    def clear(self) -> None:
        """Forget every key."""
        self._flights.clear()

    async def _load(
        self, flight: _Flight[V], key: K, load: Callable[[], Awaitable[V]], store: Callable[[V], None]
    ) -> V:
        try:
            value = await load()
            if self._flights.get(key) is flight:
                store(value)
            return value
        finally:
            self._remove(key, flight)

    def _remove(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Flight(Generic[V]):
    """One load and its callers."""

    __slots__ = ("_callers", "_task", "_traceback", "_waiting", "version")

    def __init__(self, version: Hashable) -> None:
        self.version: Hashable = version
        self._callers: int = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._traceback: TracebackType | None = None

    def start(self, load: Awaitable[V], context: contextvars.Context | None) -> None:
        """Start the load in a task."""
        self._task: asyncio.Task[V] = asyncio.create_task(load, context=context)  # type: ignore[arg-type]
        self._task.add_done_callback(self._wake)

    async def wait(self, on_abandoned: Callable[[], None]) -> V:
        """Wait for the result. The last caller to be cancelled cancels the load, after calling `on_abandoned`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._callers += 1
        try:
            await done
        except asyncio.CancelledError:
            if self._callers == 1 and not self._task.done():
                on_abandoned()
                self._task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([self._task])
            if self._task.done() and not self._task.cancelled():
                self._task.exception()  # mark it as retrieved: nobody else may be left to do so
            raise
        finally:
            self._callers -= 1
        if self._task.cancelled():
            raise asyncio.CancelledError
        error = self._task.exception()
        if error is not None:
            # All callers raise the same exception; each would append its frames to those of the others.
            if self._traceback is None:
                self._traceback = error.__traceback__
            raise error.with_traceback(self._traceback)
        return self._task.result()

    def _wake(self, _task: object = None) -> None:
        for _ in range(min(_WOKEN_AT_ONCE, len(self._waiting))):
            done = self._waiting.popleft()
            if not done.done():
                done.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._wake)

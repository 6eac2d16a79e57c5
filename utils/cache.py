"""A cache for cogs: bounded in number and in time, and one load however many ask at once."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar, cast

import cachetools

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MISSING = object()


class TTLCache(Generic[K, V]):
    """Keeps at most `max_size` values, each for `ttl` seconds; the least recently used makes room.

    A value is handed out as it was given: who changes it changes it for all. `clock` counts seconds.
    """

    def __init__(
        self, max_size: int = 1000, ttl: float = 300.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_size: int = max_size
        self.ttl: float = ttl
        self._values: _Values[K, V] = _Values(max_size, ttl, timer=clock)
        self._flights: dict[K, _Flight[V]] = {}
        self._requests: int = 0
        self._hits: int = 0
        self._invalidations: int = 0

    def __repr__(self) -> str:
        return f"<TTLCache {self.stats()}>"

    def __len__(self) -> int:
        self._values.expire()
        return len(self._values)

    def get(self, key: K, default: V | None = None) -> V | None:
        """Return what is kept, or `default`; a None that was set is a value like any other."""
        value = self._look(key)
        return default if value is _MISSING else cast(V, value)

    def set(self, key: K, value: V) -> None:
        """Keep a value; a load of this key under way is not kept any more."""
        self._flights.pop(key, None)
        self._values[key] = value

    def delete(self, key: K) -> bool:
        """Drop a value, and tell whether there was one; a load of this key under way is not kept any more."""
        self._flights.pop(key, None)
        try:
            del self._values[key]
        except KeyError:
            return False
        self._invalidations += 1
        return True

    def clear(self) -> None:
        """Drop everything; loads under way are not kept any more."""
        self._flights.clear()
        self._invalidations += len(self)
        self._values.clear()

    async def get_or_load(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """Return what is kept, or what `load` returns, which is kept then.

        Who asks the same meanwhile waits for the same load. Its error goes to all of them and is not kept; once the
        last of them is cancelled, the load is as well. Who asks after a `set`, `delete` or `clear` gets nothing older.
        The load is outside of the transaction of who asks, and sees nothing of what that has written so far.
        """
        value = self._look(key)
        if value is not _MISSING:
            return cast(V, value)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight()
            # Who loads for all is in nobody's transaction: what it wrote may still be rolled back.
            flight.task = asyncio.create_task(self._fly(flight, key, load), context=contextvars.Context())
        return await flight.wait(lambda: self._land(key, flight))

    def stats(self) -> dict[str, float]:
        """Return the counters since the start, in the words of the query cache.

        `evictions` made room for others, `invalidations` were deleted or cleared, what expired is neither.
        `hit_rate` is 0 to 1.
        """
        return {
            "hits": self._hits,
            "misses": self._requests - self._hits,
            "hit_rate": self._hits / self._requests if self._requests else 0.0,
            "evictions": self._values.evictions,
            "invalidations": self._invalidations,
            "total_requests": self._requests,
            "size": len(self),
        }

    def _look(self, key: K) -> object:
        self._requests += 1
        try:  # not `in`: it may expire in between
            value = self._values[key]
        except KeyError:
            return _MISSING
        self._hits += 1
        return value

    async def _fly(self, flight: _Flight[V], key: K, load: Callable[[], Awaitable[V]]) -> V:
        try:
            value = await load()
            if self._flights.get(key) is flight:
                self._values[key] = value
            return value
        finally:
            self._land(key, flight)

    def _land(self, key: K, flight: _Flight[V]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]


class _Flight(Generic[V]):
    """A load under way, and how many wait for it."""

    __slots__ = ("task", "waiters")

    def __init__(self) -> None:
        self.task: asyncio.Task[V] | None = None
        self.waiters: int = 0

    async def wait(self, abandon: Callable[[], None]) -> V:
        """Wait for the value; the last to be cancelled cancels the load, and `abandon` is called at once."""
        task = self.task
        assert task is not None
        self.waiters += 1
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if self.waiters == 1 and not task.done():
                abandon()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            if task.done() and not task.cancelled():
                task.exception()  # nobody is left to hear of it
            raise
        finally:
            self.waiters -= 1
        if task.cancelled():
            raise asyncio.CancelledError
        error = task.exception()
        if error is not None:
            raise error.with_traceback(None)
        return task.result()


class _Values(cachetools.TTLCache[K, V]):
    """The values, and how many had to make room."""

    evictions: int = 0

    def popitem(self) -> tuple[K, V]:
        self.evictions += 1
        return super().popitem()

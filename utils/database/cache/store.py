"""The query cache of one process: what is cached, and what a write invalidates."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import stamina
from cachetools import LRUCache

from utils.cache import CacheStats, SingleFlight
from utils.database.cache.analysis import UNKNOWN, Statement, analyse, is_query, parser
from utils.database.cache.catalog import Catalog, load_catalog
from utils.database.cache.results import CachedResult, Key, cache_key, make_cacheable
from utils.database.pool import Pool
from utils.database.statements import WriteLog
from utils.exceptions import DatabaseError, ValidationError
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds that tables bypass the cache after a write whose outcome is unknown: the server has given up on it by then.
DISTRUST_SECONDS = 5.0
#: Statements whose analysis is remembered.
MAX_STATEMENTS = 2_000
#: Seconds before the first and longest between later attempts to load the catalog again.
RELOAD_SECONDS = 0.2, 5.0


class QueryCache:
    """Results of queries, cached until a table that they read is written.

    A result is cached for at most `ttl` seconds, and only if none of its tables was written since the query was sent.
    Results are not cached when they have more than 5,000 rows, two equally named columns beside a list or dict, or
    cells of types that are not known to be immutable. Nothing is cached before `load`, nor after a write of unknown
    tables until the catalog has been loaded again.
    """

    def __init__(
        self, *, max_results: int = 2000, ttl: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`ttl` is in seconds of `clock`."""
        self.ttl: float = ttl
        self.clock: Callable[[], float] = clock
        #: Announces writes to other processes: (tables, None for all; whether they are to be distrusted).
        self.on_write: Callable[[frozenset[str] | None, bool], None] | None = None
        self._results: _Results = _Results(max_results)
        self._loads: SingleFlight[Key, CachedResult | _Uncacheable] = SingleFlight()
        self._statements: LRUCache[str, Statement] = LRUCache(MAX_STATEMENTS)
        self._tagged: LRUCache[tuple[str, tuple[str, ...]], Statement] = LRUCache(MAX_STATEMENTS)
        self._catalog: Catalog | None = None
        self._pool: Pool | None = None
        self._reload: asyncio.Task[None] | None = None
        self._is_outdated: bool = False
        self._schema_changes: int = 0
        self._trusted_until: float = math.inf
        #: How often each table, and everything, was invalidated.
        self._writes: dict[str, int] = {}
        self._flushes: int = 0
        #: Until when tables, and everything, bypass the cache.
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

    async def load(self, pool: Pool) -> None:
        """Load the catalog and empty the cache: at the start and after every migration.

        Raises `DatabaseError` when the database does not answer; then nothing is cached until a later `load`.
        """
        self._pool = pool
        self._is_outdated = True
        await asyncio.to_thread(parser)
        changes = self._schema_changes
        catalog = await load_catalog(pool)
        if catalog != self._catalog:
            self._catalog = catalog
            self._statements.clear()
        self._tagged.clear()
        self._is_outdated = changes != self._schema_changes  # then it is being loaded again
        self._drop(None)

    async def close(self) -> None:
        """Empty the cache and cache nothing more."""
        self._trusted_until = -math.inf
        task, self._reload = self._reload, None
        if task is not None:
            await cancel_and_wait((task,))
        self._drop(None)

    # --- reading

    async def fetch(
        self,
        verb: str,
        sql: str,
        args: tuple[Any, ...],
        run: Callable[[], Awaitable[T]],
        *,
        reads: Sequence[str] | None = None,
    ) -> T:
        """Return the cached result of a query, or await `run` and cache what it returns.

        reads: the tables that the query reads; None: found out from its text.

        Concurrent callers share one `run`. Its error is raised to all of them and is not cached; when the last of them
        is cancelled, so is `run`. Raises `ValidationError` for `reads` that cannot be right.
        """
        self._requests += 1
        now = self.clock()
        key = cache_key(verb, sql, args, reads)
        statement = None
        if now < self._trusted_until and not self._is_outdated:
            cached = None if key is None else self._results.get(key)
            if key is not None and cached is not None:
                if now < cached.expires:
                    self._hits += 1
                    return cast(T, cached.value())
                self._results.pop(key)
            statement = self.statement(sql) if reads is None else self._tagged_statement(sql, reads)
        if (
            key is None
            or statement is None
            or not statement.is_cacheable
            or statement.reads is None
            or self._is_distrusted(statement.reads, now)
        ):
            self._bypassed += 1
            return await run()
        return await self._load(key, statement.reads, run)

    def cached(
        self, verb: str, sql: str, args: tuple[Any, ...], reads: Sequence[str] | None = None
    ) -> CachedResult | None:
        """Return the cached result of a query, None when there is none: the first step of `fetch`, without awaiting."""
        key = cache_key(verb, sql, args, reads)
        if key is None or self._is_outdated:
            return None
        now = self.clock()
        cached = self._results.get(key)
        if cached is None or now >= self._trusted_until or now >= cached.expires:
            return None
        self._requests += 1
        self._hits += 1
        return cached

    def forget(self, sql: str, args: tuple[Any, ...], reads: Sequence[str] | None = None) -> None:
        """Drop the cached results of one query. One that is running will not be cached."""
        for verb in ("fetch", "fetchrow", "fetchval"):
            key = cache_key(verb, sql, args, reads)
            if key is not None:
                self._loads.forget(key)
                self._results.pop(key, None)

    async def _load(self, key: Key, tables: frozenset[str], run: Callable[[], Awaitable[T]]) -> T:
        version = self._version(tables)
        if self._loads.is_running(key, version):
            self._shared += 1

        async def load() -> CachedResult | _Uncacheable:
            expires = self.clock() + self.ttl
            value = await run()
            result = make_cacheable(value, expires, tables)
            if result is not None:
                return result
            self._uncacheable += 1
            return _Uncacheable(value)

        def store(result: CachedResult | _Uncacheable) -> None:
            if isinstance(result, CachedResult) and version == self._version(tables):
                self._results[key] = result

        result = await self._loads.run(key, load, store, version=version)
        if isinstance(result, _Uncacheable) and result.is_taken:
            return await run()
        return cast(T, result.value())

    def _version(self, tables: frozenset[str]) -> tuple[int, ...]:
        return self._flushes, *(self._writes.get(table, 0) for table in tables)

    # --- what statements read and write

    def statement(self, sql: str) -> Statement:
        """Return what a text reads and writes; `UNKNOWN` before `load`."""
        try:
            return self._statements[sql]
        except KeyError:
            if self._catalog is None:
                return UNKNOWN
            statement = self._statements[sql] = analyse(sql, self._catalog)
            return statement

    def tables_of(self, log: WriteLog) -> frozenset[str] | None:
        """Return the tables that the statements in the log wrote; None: unknown."""
        found: set[str] = set()
        for text in log.texts:
            writes = self.statement(text).writes
            if writes is None:
                return None
            found |= writes
        for name, action in log.tables:
            if self._catalog is None:
                return None
            if action is None:
                written = self._catalog.canonical_names((name,))
            else:
                schema, _, bare = name.rpartition(".")
                oid = self._catalog.find(schema or None, bare)
                written = None if oid is None else self._catalog.tables_written([oid], action)
            if written is None:
                return None
            found |= written
        return frozenset(found)

    def check_names(self, tables: Sequence[str], argument: str) -> None:
        """Raise `ValidationError` unless every table or view exists, as far as the catalog is known at the moment."""
        if isinstance(tables, str):
            raise ValidationError(f"{argument}: expected a sequence of names such as ({tables!r},), got a string")
        catalog = self._catalog
        if catalog is None or self._is_outdated:
            return
        for table in tables:
            if catalog.canonical_names((table,)) is None:
                raise ValidationError(f"{argument}: there is no table or view {table!r}")

    def _tagged_statement(self, sql: str, reads: Sequence[str]) -> Statement:
        """Return the statement that `reads` describes. Tables whose writes go unseen make it uncacheable."""
        key = sql, tuple(reads)
        statement = self._tagged.get(key)
        if statement is None:
            self.check_names(reads, "reads")
            if not is_query(sql):
                raise ValidationError("reads: only for a single SELECT, WITH, VALUES or TABLE that changes no rows")
            assert self._catalog is not None, "checked by the caller"
            ids = []
            for table in reads:
                schema, _, name = table.rpartition(".")
                ids.append(self._catalog.find(schema or None, name))
            tables = self._catalog.tables_read(oid for oid in ids if oid is not None)
            statement = Statement(tables, frozenset(), tables is not None)
            self._tagged[key] = statement
        return statement

    # --- writes

    def invalidate(self, tables: Iterable[str] | None) -> None:
        """Drop the results of tables that were written, here and in other processes.

        `tables` are "schema.table". None, or a name that the catalog does not contain: everything, and the catalog is
        loaded again.
        """
        names = self._canonical(tables)
        self.apply(names, is_distrusted=False)
        if self.on_write is not None and names != frozenset():
            self.on_write(names, False)

    def distrust(self, tables: Iterable[str] | None) -> None:
        """Bypass the cache for tables for `DISTRUST_SECONDS`, because a write may still be committed. None: all."""
        names = self._canonical(tables)
        self.apply(names, is_distrusted=True)
        if self.on_write is not None and names != frozenset():
            self.on_write(names, True)

    def apply(self, tables: frozenset[str] | None, *, is_distrusted: bool) -> None:
        """Apply a write of this or another process to this cache. None: unknown tables, perhaps the schema."""
        if is_distrusted:
            until = self.clock() + DISTRUST_SECONDS
            if tables is None:
                self._all_distrusted = until
            else:
                self._distrusted.update(dict.fromkeys(tables, until))
        self._drop(tables)
        if tables is None and self._pool is not None:
            self._is_outdated = True
            self._schema_changes += 1
            if self._reload is None or self._reload.done():
                self._reload = asyncio.get_running_loop().create_task(self._load_again(), name="query cache: catalog")

    def flush(self, *, distrust: bool = False) -> None:
        """Drop everything because writes may have been missed; the catalog is assumed to be unchanged."""
        if distrust:
            self._all_distrusted = self.clock() + DISTRUST_SECONDS
        self._drop(None)

    def trust_until(self, moment: float) -> None:
        """Bypass the cache from this moment of `clock`: writes of other processes may be missed by then."""
        self._trusted_until = moment

    @property
    def is_trusted(self) -> bool:
        """Whether cached results are returned at the moment."""
        return self.clock() < self._trusted_until and not self._is_outdated and self._catalog is not None

    def stats(self) -> CacheStats:
        """Return the counters since the start.

        A request is a hit or a miss. Of the misses, `shared` joined a running query, `bypassed` went past the cache and
        `uncacheable` had results that cannot be cached. `evictions` made room for other results, `invalidations` were
        dropped because of writes. `hit_rate` is in percent.
        """
        return CacheStats(
            hits=self._hits,
            total_requests=self._requests,
            evictions=self._results.evictions,
            invalidations=self._invalidations,
            size=len(self._results),
            shared=self._shared,
            bypassed=self._bypassed,
            uncacheable=self._uncacheable,
        )

    def _canonical(self, tables: Iterable[str] | None) -> frozenset[str] | None:
        return None if tables is None or self._catalog is None else self._catalog.canonical_names(tables)

    def _is_distrusted(self, tables: frozenset[str], now: float) -> bool:
        if now < self._all_distrusted:
            return True
        return bool(self._distrusted) and any(now < self._distrusted.get(table, now) for table in tables)

    def _drop(self, tables: frozenset[str] | None) -> None:
        if tables is None:
            self._flushes += 1
            self._invalidations += len(self._results)
            self._results.clear()
            return
        for table in tables:
            self._writes[table] = self._writes.get(table, 0) + 1
            self._invalidations += self._results.drop(table)

    async def _load_again(self) -> None:
        first, longest = RELOAD_SECONDS
        while self._pool is not None and self._is_outdated:  # the schema may change again meanwhile
            await asyncio.sleep(first)
            async for attempt in stamina.retry_context(
                on=DatabaseError, attempts=None, timeout=None, wait_initial=first, wait_max=longest, wait_jitter=first
            ):
                with attempt:
                    try:
                        await self.load(self._pool)
                    except DatabaseError as exc:
                        _log.warning("nothing is cached until the catalog can be loaded: %s", exc)
                        raise


class _Uncacheable:
    """A result that cannot be copied: for one reader. The others run the query themselves."""

    __slots__ = ("_value", "is_taken")

    def __init__(self, value: Any) -> None:
        self._value: Any = value
        self.is_taken: bool = False

    def value(self) -> Any:
        """Return the result, once."""
        self.is_taken = True
        value, self._value = self._value, None
        return value


class _Results(LRUCache[Key, CachedResult]):
    """Results by key and by table."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize)
        self.evictions: int = 0
        self._by_table: dict[str, set[Key]] = {}

    def __setitem__(self, key: Key, value: CachedResult) -> None:
        super().__setitem__(key, value)
        for table in value.tables:
            self._by_table.setdefault(table, set()).add(key)

    def __delitem__(self, key: Key) -> None:
        for table in super().__getitem__(key).tables:
            self._by_table[table].discard(key)
        super().__delitem__(key)

    def popitem(self) -> tuple[Key, CachedResult]:
        self.evictions += 1
        return super().popitem()

    def drop(self, table: str) -> int:
        """Drop the results of a table and return their number."""
        keys = list(self._by_table.get(table, ()))
        for key in keys:
            del self[key]
        return len(keys)

    def clear(self) -> None:
        """Drop all results, without counting evictions."""
        evictions = self.evictions
        super().clear()
        self._by_table.clear()
        self.evictions = evictions

"""`bot.db`: asyncpg's verbs over the pool, the query cache and the open transaction."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from utils.cache import CacheStats
from utils.database import deadline, materialized_views
from utils.database.cache.results import cache_key
from utils.database.cache.stale import StaleResults
from utils.database.callers import Use
from utils.database.named import NamedTransactions
from utils.database.orm import Orm
from utils.database.pool import Pool, Record
from utils.database.rows import typed_row, typed_value
from utils.database.scopes import Scopes
from utils.database.statements import PreparedStatement, SlowLog, WriteLog, qualified
from utils.database.transactions import Root, current, end_all, joined
from utils.exceptions import DatabaseError, ValidationError, was_rejected

if TYPE_CHECKING:
    from utils.database.cache import QueryCache
    from utils.database.cache.results import CachedResult, Key

T = TypeVar("T")

#: Seconds for an answer in `check_connection_health`.
HEALTH_SECONDS = 5.0


class ConnectionHealth(dict[str, Any]):
    """What `check_connection_health` found out. It is false while the database does not answer."""

    def __bool__(self) -> bool:
        return bool(self["healthy"])


class Database(Scopes):
    """The database as cogs see it.

    A statement runs in the open transaction of its context, otherwise on a connection of the pool. Results of SELECTs
    outside transactions are cached until a table that they read is written. Every method raises `DatabaseError`.

    Beside the connections of the pool it holds up to `orm_connections` for transactions and sessions.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        cache: QueryCache | None = None,
        slow_ms: int = 500,
        log_queries: bool = False,
        orm_connections: int = 3,
        transaction_timeout: float | None = None,
    ) -> None:
        """
        cache: None: nothing is cached.
        slow_ms: milliseconds from which a statement is logged as slow.
        orm_connections: connections for transactions and sessions.
        transaction_timeout: seconds that they wait for one; None: as long as statements do.
        """
        self.pool: Pool = pool
        self.cache: QueryCache | None = cache
        self.slow: SlowLog = SlowLog(slow_ms, log_all=log_queries)
        self.stale: StaleResults = StaleResults()
        self.open_transactions: set[Root] = set()
        self._named: NamedTransactions = NamedTransactions(self)
        self.orm: Orm = Orm(
            lambda: pool.target,  # `connect` finds out about poolers
            connections=orm_connections,
            queue_timeout=pool.acquire_timeout if transaction_timeout is None else transaction_timeout,
            idle_seconds=pool.idle_seconds,
            slow=self.slow,
            on_committed=self.committed,
            on_doubt=self.in_doubt,
        )
        self._prepared: dict[str, PreparedStatement] = {}

    def __repr__(self) -> str:
        return f"<Database {self.pool!r}>"

    async def connect(self) -> None:
        """Connect the pool, unless it is connected."""
        await self.pool.connect()

    async def close(self, timeout: float = 5.0) -> None:
        """Roll back open transactions within `timeout` seconds and close SQLAlchemy's connections, not the pool."""
        await end_all(self.open_transactions, timeout)
        await self._named.close(timeout)
        await self.stale.close(timeout)
        await self.orm.close()

    async def renew(self) -> None:
        """Replace every connection and load the catalog again: after a change of the schema."""
        await self.pool.renew()
        await self.orm.close()
        if self.cache is not None:
            await self.cache.load(self.pool)

    # --- statements

    @overload
    async def fetch(
        self, sql: str, *args: Any, as_: type[T], timeout: float | None = ..., use_cache: bool = ...,
        invalidate_cache: bool = ..., reads: Sequence[str] | None = ..., stale_if_error: float | None = ...,
    ) -> list[T]: ...  # fmt: skip

    @overload
    async def fetch(
        self, sql: str, *args: Any, as_: None = ..., timeout: float | None = ..., use_cache: bool = ...,
        invalidate_cache: bool = ..., reads: Sequence[str] | None = ..., stale_if_error: float | None = ...,
    ) -> list[Record]: ...  # fmt: skip

    async def fetch(
        self,
        sql: str,
        *args: Any,
        timeout: float | None = None,
        use_cache: bool = True,
        invalidate_cache: bool = False,
        reads: Sequence[str] | None = None,
        stale_if_error: float | None = None,
        as_: type[Any] | None = None,
    ) -> list[Any]:
        """Return all rows.

        timeout: seconds for the statement; None: DB_COMMAND_TIMEOUT.
        use_cache: False asks the database and leaves the cache alone.
        invalidate_cache: True drops the cached result first.
        reads: the tables and views that the query reads, such as `("members",)`. The result is cached until one of
            them is written, and the text is not analysed. None: found out from the text. Raises `ValidationError`
            for an unknown name, and for a text that is not a query.
        stale_if_error: while the database is unavailable, or does not answer within 1.5 s, return the last result that
            this process read with `stale_if_error`, if it is at most so many seconds old. It may have been overwritten
            since. Never in a transaction. None: the error is raised.
        as_: return each row as this pydantic model, dataclass or NamedTuple, validated. None: as asyncpg's `Record`.
            Raises `ValidationError` for rows that do not fit.

        The other verbs take the same arguments.
        """
        if stale_if_error is not None:
            rows: list[Any] = await self._read_or_stale(
                "fetch", sql, args, timeout, use_cache, invalidate_cache, reads, sys._getframe(1), stale_if_error
            )
        elif use_cache and not invalidate_cache and (hit := self._cached("fetch", sql, args, reads)) is not None:
            rows = hit.value()
        else:
            rows = await self._read("fetch", sql, args, timeout, use_cache, invalidate_cache, reads, sys._getframe(1))
        return rows if as_ is None else [typed_row(as_, row) for row in rows]

    @overload
    async def fetchrow(
        self, sql: str, *args: Any, as_: type[T], timeout: float | None = ..., use_cache: bool = ...,
        invalidate_cache: bool = ..., reads: Sequence[str] | None = ..., stale_if_error: float | None = ...,
    ) -> T | None: ...  # fmt: skip

    @overload
    async def fetchrow(
        self, sql: str, *args: Any, as_: None = ..., timeout: float | None = ..., use_cache: bool = ...,
        invalidate_cache: bool = ..., reads: Sequence[str] | None = ..., stale_if_error: float | None = ...,
    ) -> Record | None: ...  # fmt: skip

    async def fetchrow(
        self,
        sql: str,
        *args: Any,
        timeout: float | None = None,
        use_cache: bool = True,
        invalidate_cache: bool = False,
        reads: Sequence[str] | None = None,
        stale_if_error: float | None = None,
        as_: type[Any] | None = None,
    ) -> Any:
        """Return the first row, or None when there is none. The arguments are those of `fetch`."""
        if stale_if_error is not None:
            row = await self._read_or_stale(
                "fetchrow", sql, args, timeout, use_cache, invalidate_cache, reads, sys._getframe(1), stale_if_error
            )
        elif use_cache and not invalidate_cache and (hit := self._cached("fetchrow", sql, args, reads)) is not None:
            row = hit.value()
        else:
            row = await self._read("fetchrow", sql, args, timeout, use_cache, invalidate_cache, reads, sys._getframe(1))
        return row if as_ is None or row is None else typed_row(as_, row)

    @overload
    async def fetchval(
        self, sql: str, *args: Any, as_: type[T], column: int | str = ..., timeout: float | None = ...,
        use_cache: bool = ..., invalidate_cache: bool = ..., reads: Sequence[str] | None = ...,
        stale_if_error: float | None = ...,
    ) -> T | None: ...  # fmt: skip

    @overload
    async def fetchval(
        self, sql: str, *args: Any, as_: None = ..., column: int | str = ..., timeout: float | None = ...,
        use_cache: bool = ..., invalidate_cache: bool = ..., reads: Sequence[str] | None = ...,
        stale_if_error: float | None = ...,
    ) -> Any: ...  # fmt: skip

    async def fetchval(
        self,
        sql: str,
        *args: Any,
        column: int | str = 0,
        timeout: float | None = None,
        use_cache: bool = True,
        invalidate_cache: bool = False,
        reads: Sequence[str] | None = None,
        stale_if_error: float | None = None,
        as_: type[Any] | None = None,
    ) -> Any:
        """Return one column of the first row, or None when there is no row.

        column: its position from 0, or its name; raises `ValidationError` when there is none.
        as_: the type of the value, such as `int`; None is returned as None.

        The other arguments are those of `fetch`.
        """
        if stale_if_error is None and column == 0 and as_ is None:
            if use_cache and not invalidate_cache and (hit := self._cached("fetchval", sql, args, reads)) is not None:
                return hit.value()
            return await self._read(
                "fetchval", sql, args, timeout, use_cache, invalidate_cache, reads, sys._getframe(1)
            )
        row = await self.fetchrow(
            sql, *args, timeout=timeout, use_cache=use_cache, invalidate_cache=invalidate_cache, reads=reads,
            stale_if_error=stale_if_error,
        )  # fmt: skip
        if row is None:
            return None
        try:
            value = row[column]
        except (IndexError, KeyError):
            raise ValidationError(f"column={column!r}: the query returns {', '.join(row.keys())}") from None
        return value if as_ is None or value is None else typed_value(as_, value)

    async def execute(
        self,
        sql: str,
        *args: Any,
        timeout: float | None = None,
        invalidate_cache: bool = True,
        writes: Sequence[str] | None = None,
    ) -> str:
        """Run a statement and return the server's command tag, such as `UPDATE 3`.

        invalidate_cache: False keeps cached results of the tables that it writes, here and in other processes: they may
            be outdated for up to CACHE_TTL_SECONDS.
        writes: all tables that the statement writes, also by cascades, triggers and functions; their cached results
            are dropped and the text is not analysed. `()`: none. None: found out from the text. Raises
            `ValidationError` for an unknown name.
        """
        tag: str = await self._run("execute", sql, args, timeout, writes if invalidate_cache else (), sys._getframe(1))
        return tag

    async def execute_many(
        self,
        sql: str,
        rows: Iterable[Sequence[Any]],
        timeout: float | None = None,
        *,
        invalidate_cache: bool = True,
        writes: Sequence[str] | None = None,
    ) -> None:
        """Run a statement once for each row of arguments: all of them or none. The arguments are those of `execute`."""
        writes = writes if invalidate_cache else ()
        await self._run("executemany", sql, (rows,), timeout, writes, sys._getframe(1))

    #: asyncpg's name for the same.
    executemany = execute_many

    async def copy_records_to_table(
        self,
        table: str,
        *,
        records: Any,
        columns: Sequence[str],
        schema_name: str | None = None,
        timeout: float | None = None,
        invalidate_cache: bool = True,
    ) -> str:
        """COPY records, an iterable or asynchronous iterable of tuples, into a table and return `COPY n`.

        `invalidate_cache` is that of `execute`.
        """
        written = WriteLog(tables={(qualified(table, schema_name), "INSERT")} if invalidate_cache else set())
        kwargs = {"records": records, "columns": columns, "schema_name": schema_name, "timeout": timeout}
        root = joined()
        if root is not None:
            tag: str = await root.run("copy_records_to_table", table, log=written, **kwargs)
            return tag
        tables = self._tables_of(written)
        end_work = deadline.begin_work()
        try:
            async with self.pool.acquire() as connection:
                tag = await deadline.run_statement(connection, "copy_records_to_table", table, **kwargs)
        except BaseException as exc:
            self._failed(tables, exc)
            raise
        finally:
            end_work()
        self._invalidate(tables)
        return tag

    # --- prepared statements and plans

    def prepare_statement(self, name: str, sql: str) -> PreparedStatement:
        """Return a named statement with `.fetch`, `.fetchrow`, `.fetchval` and `.execute`. It may be awaited.

        Each connection, new ones included, prepares it when it first runs it. Raises `DatabaseError` when the name
        belongs to another statement; when awaited, also for SQL that the server refuses.
        """
        known = self._prepared.get(name)
        if known is None:
            known = self._prepared[name] = PreparedStatement(self, name, sql)
        elif known.sql != sql:
            raise DatabaseError(f"prepared statement {name!r} exists with different SQL: choose another name")
        return known

    async def explain(self, sql: str, *args: Any, analyze: bool = False) -> str:
        """Return PostgreSQL's plan. `analyze` runs the statement and rolls it back."""
        options = "ANALYZE, BUFFERS" if analyze else "VERBOSE"
        async with self.pool.acquire() as connection:
            attempt = connection.transaction()
            await attempt.start()
            try:
                lines = await connection.fetch(f"EXPLAIN ({options}) {sql}", *args)
            finally:
                await attempt.rollback()
        return "\n".join(line[0] for line in lines)

    # --- health and statistics

    async def check_connection_health(self) -> ConnectionHealth:
        """Ask the database for an answer; return `healthy`, `latency_ms`, `error` (None: it answered) and the pools.

        The mapping is false while the database does not answer: `if await db.check_connection_health():`.
        """
        started, error = time.perf_counter(), None
        try:
            async with self.pool.acquire(HEALTH_SECONDS) as connection:
                await connection.fetchval("SELECT 1", timeout=HEALTH_SECONDS)
        except DatabaseError as exc:
            error = str(exc)
        return ConnectionHealth(
            healthy=error is None,
            latency_ms=round((time.perf_counter() - started) * 1000, 2),
            error=error,
            server_version=self.server_version_num,
            pool=self.pool_stats(),
            orm=self.orm.stats(),
        )

    async def validate_connections(self, timeout: float = 5.0) -> dict[str, int]:
        """Close idle connections that do not answer within `timeout` seconds; return how many of how many."""
        return await self.pool.validate_connections(timeout)

    async def refresh_materialized_views(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Refresh materialized views, concurrently where an index allows it, and return the seconds by name.

        `names` None: those that revisions of Guildbook or of cogs made; views of other programs must be named. A view
        that fails does not keep the others from being refreshed; afterwards `DatabaseError` names those that failed.
        """
        return await materialized_views.refresh(self, names)

    def get_cache_stats(self) -> CacheStats:
        """Return hits, misses, hit_rate (percent), evictions, invalidations, total_requests, size and stale_served.

        All are 0 without a cache, except `stale_served`: how often `stale_if_error` returned an old result. It may be
        awaited.
        """
        stats = CacheStats() if self.cache is None else self.cache.stats()
        stats["stale_served"] = self.stale.served
        return stats

    def forget(self, sql: str, *args: Any) -> None:
        """Drop what `stale_if_error` has kept of a query, because this process has replaced what it returns.

        In a transaction this is repeated when it commits.
        """
        keys = [cache_key(verb, sql, args) for verb in ("fetch", "fetchrow", "fetchval")]
        known = [key for key in keys if key is not None]
        root = current.get()
        if root is not None:
            root.forgotten += known
        for key in known:
            self.stale.forget(key)

    def get_stats(self) -> dict[str, Any]:
        """Return the state of pools, cache and open transactions, and the slow and prepared statements."""
        return {
            "pool": self.pool_stats(),
            "orm": self.orm.stats(),
            "cache": {} if self.cache is None else dict(self.get_cache_stats()),
            "transactions": [root.describe() for root in self.open_transactions],
            "slow": self.slow.latest(),
            "slow_count": self.slow.count,
            "prepared": {name: statement.sql for name, statement in self._prepared.items()},
        }

    def pool_stats(self) -> dict[str, int]:
        """Return how many raw connections were created and destroyed, are active, idle and allowed.

        `waiting` is how many tasks wait for one.
        """
        return self.pool.pool_stats()

    def now(self) -> datetime:
        """Return the time of the database without asking it."""
        return self.pool.now()

    @property
    def server_version_num(self) -> int:
        """PostgreSQL's version as a number, 180004 for 18.4."""
        return self.pool.server_version_num

    # --- running

    def _cached(self, verb: str, sql: str, args: tuple[Any, ...], reads: Sequence[str] | None) -> CachedResult | None:
        """Return a cached result without awaiting anything."""
        cache = self.cache
        return None if cache is None or current.get() is not None else cache.cached(verb, sql, args, reads)

    async def _read(
        self,
        verb: str,
        sql: str,
        args: tuple[Any, ...],
        timeout: float | None,
        use_cache: bool,
        invalidate_cache: bool,
        reads: Sequence[str] | None,
        frame: FrameType,
    ) -> Any:
        """Run a query and cache its result, unless the cache is bypassed or a transaction is open."""
        cache = self.cache
        if cache is None or not use_cache or joined() is not None:
            return await self._run(verb, sql, args, timeout, None, frame)
        if invalidate_cache:
            cache.forget(sql, args, reads)
        writes = None if reads is None else ()
        return await cache.fetch(
            verb, sql, args, lambda: self._run(verb, sql, args, timeout, writes, frame), reads=reads
        )

    async def _read_or_stale(
        self,
        verb: str,
        sql: str,
        args: tuple[Any, ...],
        timeout: float | None,
        use_cache: bool,
        invalidate_cache: bool,
        reads: Sequence[str] | None,
        frame: FrameType,
        stale_if_error: float,
    ) -> Any:
        """Do what `_read` does; in an outage return the last result, if it is young enough."""

        async def read() -> Any:
            return await self._read(verb, sql, args, timeout, use_cache, invalidate_cache, reads, frame)

        key = cache_key(verb, sql, args)
        if key is None or joined() is not None:
            return await read()
        return await self.stale.read(key, stale_if_error, sql, read)

    async def _run(
        self,
        verb: str,
        sql: str,
        args: tuple[Any, ...],
        timeout: float | None,
        writes: Sequence[str] | None,
        frame: FrameType,
    ) -> Any:
        """Run a statement in the open transaction or on the pool, and tell the cache what it wrote."""
        cache = self.cache
        if cache is not None and writes:
            cache.check_names(writes, "writes")
        end_work = deadline.begin_work()
        use = Use(frame)
        try:
            root = joined()
            if root is not None:
                log = WriteLog({sql}) if writes is None else WriteLog(tables={(table, None) for table in writes})
                return await root.run(verb, sql, *args, log=log, use=use, timeout=timeout)
            if cache is None:
                return await self.pool.run(verb, sql, args, timeout, temp=True, use=use)
            if writes is None:
                statement = cache.statement(sql)
                if statement.is_cacheable:
                    return await self.pool.run(verb, sql, args, timeout, is_pure=True, use=use)
                tables = statement.writes
            else:
                tables = frozenset(writes)
            try:
                # What could not be analysed, or was not, because its tags are given, may create temporary tables.
                has_temp = writes is not None or tables is None
                result = await self.pool.run(verb, sql, args, timeout, temp=has_temp, use=use)
            except BaseException as exc:
                self._failed(tables, exc)
                raise
            self._invalidate(tables)
            return result
        finally:
            end_work()
            self.slow.record(sql, time.perf_counter() - use.since, use)

    # --- invalidation

    def committed(self, log: WriteLog, forgotten: Iterable[Key] = ()) -> None:
        """Tell the cache that what is in the log was committed, and drop old results."""
        self._invalidate(self._tables_of(log))
        for key in forgotten:
            self.stale.forget(key)

    def in_doubt(self, log: WriteLog) -> None:
        """Tell the cache that what is in the log may still be committed."""
        if self.cache is not None:
            self.cache.distrust(self._tables_of(log))

    def may_leave_temp(self, log: WriteLog) -> bool:
        """Return whether a statement in the log may have created a temporary table."""
        return self.cache is None or any(self.cache.statement(text).writes is None for text in log.texts)

    def _tables_of(self, log: WriteLog) -> frozenset[str] | None:
        return frozenset() if self.cache is None else self.cache.tables_of(log)

    def _invalidate(self, tables: frozenset[str] | None) -> None:
        if self.cache is not None and (tables is None or tables):
            self.cache.invalidate(tables)

    def _failed(self, tables: frozenset[str] | None, exc: BaseException) -> None:
        """Distrust what a failed statement may have written, unless the server has rejected it."""
        if self.cache is not None and not was_rejected(exc) and (tables is None or tables):
            self.cache.distrust(tables)

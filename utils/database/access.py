"""What cogs read and write with: asyncpg's verbs over pool, cache and the transaction that is open."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

import asyncpg

from utils.database import views
from utils.database.borrowed import TrackedConnection
from utils.database.orm import Orm
from utils.database.pool import Pool, Record
from utils.database.slow import SlowLog
from utils.database.statements import PreparedStatement
from utils.database.transactions import Isolation, Root, Transaction, current, end_all, joined
from utils.exceptions import DatabaseError, driver_error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from utils.database.cache import QueryCache
    from utils.database.cache.results import Kept

#: Seconds for an answer in `check_connection_health`.
HEALTH_SECONDS = 5.0


class Database:
    """The database as cogs see it.

    A statement runs in the transaction that is open in its context, or else on a connection of the pool. Results of
    SELECTs outside transactions are kept (`use_cache=False` asks the database itself, `invalidate_cache=True` anew).
    Together with the pool it holds `orm_connections` more connections than that has. Raises `DatabaseError`.
    """

    def __init__(
        self,
        database: Pool,
        *,
        cache: QueryCache | None = None,
        slow_ms: int = 500,
        log_queries: bool = False,
        orm_connections: int = 3,
    ) -> None:
        """`cache` None: every SELECT is asked. `slow_ms`: milliseconds from which a statement is logged as slow."""
        self.database: Pool = database
        self.cache: QueryCache | None = cache
        self.slow: SlowLog = SlowLog(slow_ms, log_all=log_queries)
        self.open_transactions: set[Root] = set()
        self.orm: Orm = Orm(
            database.target,
            connections=orm_connections,
            acquire_timeout=database.acquire_timeout,
            on_committed=self.committed,
            on_doubt=self.doubted,
        )
        self._prepared: dict[str, PreparedStatement] = {}

    def __repr__(self) -> str:
        return f"<Database {self.database!r}>"

    async def connect(self) -> None:
        """Connect the pool, unless it is connected."""
        await self.database.connect()

    async def close(self, timeout: float = 5.0) -> None:
        """Roll back what is open, within `timeout` seconds, and close SQLAlchemy's connections; the pool stays."""
        await end_all(self.open_transactions, timeout)
        await self.orm.close()

    async def renew(self) -> None:
        """Replace every connection and read the catalogue anew: after a change of the schema."""
        await self.database.renew()
        await self.orm.close()
        if self.cache is not None:
            await self.cache.load(self.database)

    # --- statements

    async def fetch(
        self, sql: str, *args: Any, timeout: float | None = None, use_cache: bool = True, invalidate_cache: bool = False
    ) -> list[Record]:
        """Return all rows; `timeout` (here and below) is seconds for the statement, None: DB_COMMAND_TIMEOUT."""
        if use_cache and not invalidate_cache and (kept := self._held("fetch", sql, args)) is not None:
            rows: list[Record] = kept.take()
        else:
            rows = await self._ask("fetch", sql, args, timeout, use_cache, invalidate_cache)
        return rows

    async def fetchrow(
        self, sql: str, *args: Any, timeout: float | None = None, use_cache: bool = True, invalidate_cache: bool = False
    ) -> Record | None:
        """Return the first row, or None when there is none."""
        if use_cache and not invalidate_cache and (kept := self._held("fetchrow", sql, args)) is not None:
            row: Record | None = kept.take()
        else:
            row = await self._ask("fetchrow", sql, args, timeout, use_cache, invalidate_cache)
        return row

    async def fetchval(
        self, sql: str, *args: Any, timeout: float | None = None, use_cache: bool = True, invalidate_cache: bool = False
    ) -> Any:
        """Return the first column of the first row, or None when there is none."""
        if use_cache and not invalidate_cache and (kept := self._held("fetchval", sql, args)) is not None:
            return kept.take()
        return await self._ask("fetchval", sql, args, timeout, use_cache, invalidate_cache)

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement and return the server's word for it, like `UPDATE 3`."""
        word: str = await self._run("execute", sql, args, timeout, sys._getframe(1))
        return word

    async def execute_many(self, sql: str, rows: Iterable[Sequence[Any]], timeout: float | None = None) -> None:
        """Run a statement once for each row of arguments, all of them or none."""
        await self._run("executemany", sql, (rows,), timeout, sys._getframe(1))

    async def copy_records_to_table(
        self, table: str, *, records: Any, columns: Sequence[str], schema_name: str | None = None,
        timeout: float | None = None,
    ) -> str:  # fmt: skip
        """COPY records, an iterable of tuples also asynchronous, into a table; return `COPY n`."""
        name = f"{schema_name}.{table}" if schema_name else table
        kwargs = {"records": records, "columns": columns, "schema_name": schema_name, "timeout": timeout}
        root = joined()
        if root is not None:
            root.copied.add(name)
            word: str = await root.run("copy_records_to_table", table, text="", **kwargs)
            return word
        written = self._copied((name,))
        try:
            async with self.database.acquire() as connection:
                word = await connection.copy_records_to_table(table, **kwargs)
        except BaseException as exc:
            self._failed(written, exc)
            raise
        self._wrote(written)
        return word

    async def execute_in_transaction(self, statements: Iterable[tuple[str, Sequence[Any]]]) -> list[str]:
        """Run statements in one transaction, all of them or none; return the server's words for them."""
        async with self.transaction("execute_in_transaction"):
            return [await self.execute(sql, *args) for sql, args in statements]

    def transaction(
        self, name: str | None = None, *, isolation: Isolation | None = None, readonly: bool = False
    ) -> Transaction:
        """Return a transaction for `async with`; a nested one is a savepoint.

        `name`: how it is listed while it runs; None: like the function that asks. `isolation`: read_committed,
        repeatable_read or serializable; None: the server's default.
        """
        return Transaction(self, name, isolation, readonly=readonly)

    def sessions(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Lend a session: in the open transaction, or with a connection of its own; the end of the block commits."""
        root = joined()
        return self.orm.session(None if root is None else root.connection)

    @contextlib.asynccontextmanager
    async def acquire(self, timeout: float | None = None) -> AsyncIterator[Any]:
        """Lend a raw asyncpg connection, in no transaction; nothing done to it outlasts the block.

        `timeout`: seconds to wait for a free one, None: as long as statements do.
        """
        borrowed = None
        try:
            async with self.database.acquire(timeout, temp=True) as connection:
                borrowed = TrackedConnection(connection)
                connection.add_query_logger(borrowed.note)
                try:
                    yield borrowed
                finally:
                    with contextlib.suppress(asyncpg.InterfaceError):  # it is closed
                        connection.remove_query_logger(borrowed.note)
        finally:
            if borrowed is not None:
                end = self.doubted if borrowed.is_doubtful else self.committed
                end(borrowed.texts)
                self._wrote(self._copied(borrowed.copied))

    def prepare_statement(self, name: str, sql: str) -> PreparedStatement:
        """Name a statement, to be run with `.fetch`, `.fetchrow`, `.fetchval` and `.execute`; it may also be awaited.

        Each connection prepares it with its first use, new ones too. Raises `DatabaseError` for a name that stands for
        another statement; awaited, also for SQL that the server refuses.
        """
        known = self._prepared.get(name)
        if known is None:
            known = self._prepared[name] = PreparedStatement(self, name, sql)
        elif known.sql != sql:
            raise DatabaseError(f"a statement called {name!r} is there already, and it is another one: choose a name")
        return known

    async def explain(self, sql: str, *args: Any, analyze: bool = False) -> str:
        """Return PostgreSQL's plan; `analyze` runs the statement for it, and undoes what it did."""
        options = "ANALYZE, BUFFERS" if analyze else "VERBOSE"
        async with self.database.acquire() as connection:
            attempt = connection.transaction()
            await attempt.start()
            try:
                lines = await connection.fetch(f"EXPLAIN ({options}) {sql}", *args)
            finally:
                await attempt.rollback()
        return "\n".join(line[0] for line in lines)

    # --- upkeep and figures

    async def check_connection_health(self) -> dict[str, Any]:
        """Ask the database for an answer: `healthy`, `latency_ms`, `error` (None: it answered) and the pools."""
        started, error = time.perf_counter(), None
        try:
            async with self.database.acquire(HEALTH_SECONDS) as connection:
                await connection.fetchval("SELECT 1", timeout=HEALTH_SECONDS)
        except DatabaseError as exc:
            error = str(exc)
        return {
            "healthy": error is None,
            "latency_ms": round((time.perf_counter() - started) * 1000, 2),
            "error": error,
            "server_version": self.server_version_num,
            "pool": self.pool_stats(),
            "orm": self.orm.stats(),
        }

    async def validate_connections(self, timeout: float = 5.0) -> dict[str, int]:
        """Throw away idle connections that give no answer within `timeout` seconds; say how many of how many."""
        return await self.database.validate_connections(timeout)

    async def refresh_materialized_views(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Refresh materialized views, without locking readers out where an index allows; return seconds by name.

        `names`: None for all that there are. One that fails does not keep the others from being refreshed; then
        `DatabaseError` names those that failed.
        """
        return await views.refresh(self, names)

    def get_cache_stats(self) -> dict[str, float]:
        """Return hits, misses, hit_rate, evictions, invalidations, total_requests and size; empty without a cache."""
        return {} if self.cache is None else self.cache.stats()

    def get_stats(self) -> dict[str, Any]:
        """Return pools, cache, open transactions, slow and prepared statements."""
        return {
            "pool": self.pool_stats(),
            "orm": self.orm.stats(),
            "cache": self.get_cache_stats(),
            "transactions": [root.describe() for root in self.open_transactions],
            "slow": self.slow.latest(),
            "slow_count": self.slow.count,
            "prepared": {name: statement.sql for name, statement in self._prepared.items()},
        }

    def pool_stats(self) -> dict[str, int]:
        """Return how many raw connections were created, are active, idle and allowed, and how many tasks wait."""
        return self.database.pool_stats()

    def now(self) -> datetime:
        """Return the database's time without asking it."""
        return self.database.now()

    @property
    def server_version_num(self) -> int:
        """PostgreSQL's version as a number, 180004 for 18.4."""
        return self.database.server_version_num

    # --- what was written

    def committed(self, texts: Iterable[str]) -> None:
        """Tell the cache that statements were committed."""
        self._wrote(self._written(texts))

    def doubted(self, texts: Iterable[str]) -> None:
        """Tell the cache that statements may still be committed."""
        if self.cache is not None:
            self.cache.distrust(self._written(texts))

    def _written(self, texts: Iterable[str]) -> frozenset[str] | None:
        tables: set[str] = set()
        if self.cache is not None:
            for text in texts:
                writes = self.cache.statement(text).writes if text else frozenset()
                if writes is None:
                    return None
                tables |= writes
        return frozenset(tables)

    def _copied(self, names: Iterable[str]) -> frozenset[str] | None:
        tables: set[str] = set()
        if self.cache is not None:
            for name in names:
                copied = self.cache.copied(name)
                if copied is None:
                    return None
                tables |= copied
        return frozenset(tables)

    def wrote(self, root: Root) -> None:
        """Tell the cache what a transaction committed."""
        self.committed(root.texts)
        self._wrote(self._copied(root.copied))

    def _wrote(self, tables: frozenset[str] | None) -> None:
        if self.cache is not None and (tables is None or tables):
            self.cache.invalidate(tables)

    def _failed(self, tables: frozenset[str] | None, exc: BaseException) -> None:
        """Distrust what a statement may have written, unless the server said that it was refused."""
        refused = isinstance(driver_error(exc), asyncpg.PostgresError) and not isinstance(
            driver_error(exc), asyncpg.PostgresConnectionError | asyncpg.OperatorInterventionError
        )
        if self.cache is not None and not refused and (tables is None or tables):
            self.cache.distrust(tables)

    def _held(self, verb: str, sql: str, args: tuple[Any, ...]) -> Kept | None:
        cache = self.cache
        return None if cache is None or current.get() is not None else cache.held(verb, sql, args)

    async def _ask(
        self, verb: str, sql: str, args: tuple[Any, ...], timeout: float | None, use_cache: bool, anew: bool
    ) -> Any:
        frame = sys._getframe(2)
        cache = self.cache
        if cache is None or not use_cache or joined() is not None:
            return await self._run(verb, sql, args, timeout, frame)
        if anew:
            cache.forget(sql, args)
        return await cache.fetch(verb, sql, args, lambda: self._run(verb, sql, args, timeout, frame))

    async def _run(
        self, verb: str, sql: str, args: tuple[Any, ...], timeout: float | None, frame: FrameType | None
    ) -> Any:
        """Run a statement where it belongs."""
        started = time.perf_counter()
        try:
            root = joined()
            if root is not None:
                return await root.run(verb, sql, *args, text=sql, timeout=timeout)
            cache = self.cache
            if cache is None:
                return await self.database.run(verb, sql, args, timeout)
            told = cache.statement(sql)
            if told.is_cacheable:
                return await self.database.run(verb, sql, args, timeout, is_pure=True)
            writes = told.writes
            try:
                result = await self.database.run(verb, sql, args, timeout, temp="temp" in sql.lower())
            except BaseException as exc:
                self._failed(writes, exc)
                raise
            if writes is None or writes:
                cache.invalidate(writes)
            return result
        finally:
            self.slow.note(sql, started, frame)

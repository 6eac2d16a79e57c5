"""Raw connections for cogs, in a block or held by hand: they tell the cache what was written on them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from utils.database import deadline
from utils.database.callers import Caller
from utils.database.pool import Record
from utils.database.statements import WriteLog, qualified
from utils.database.transactions import Isolation

if TYPE_CHECKING:
    from utils.database.access import Database

R = TypeVar("R")


class TrackedConnection:
    """An asyncpg connection outside any transaction of `bot.db`, which tells the cache what was written on it.

    It has every method of `asyncpg.Connection`, and they raise asyncpg's errors. Return it with `release`, or use
    `async with db.acquire()`.
    """

    def __init__(self, db: Database, caller: Caller | None, connection: Any, lease: AbstractAsyncContextManager[Any]):
        self._db = db
        self._caller = caller
        self._connection = connection
        self._lease: AbstractAsyncContextManager[Any] | None = lease
        self._log: WriteLog = WriteLog()
        self._is_in_doubt: bool = False
        #: Statements of the methods below, which asyncpg is still going to report.
        self._unreported: Counter[str] = Counter()
        connection.add_query_logger(self._report)

    def __repr__(self) -> str:
        return f"<TrackedConnection {self._connection!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows. `timeout` (here and below) is in seconds, None: DB_COMMAND_TIMEOUT."""
        rows: list[Record] = await self._run(sql, self._connection.fetch(sql, *args, timeout=timeout))
        return rows

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        row: Record | None = await self._run(sql, self._connection.fetchrow(sql, *args, timeout=timeout))
        return row

    async def fetchval(self, sql: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Return one column of the first row, or None when there is no row."""
        return await self._run(sql, self._connection.fetchval(sql, *args, column=column, timeout=timeout))

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement, or several without arguments, and return the command tag of the last, such as `UPDATE 3`."""
        tag: str = await self._run(sql, self._connection.execute(sql, *args, timeout=timeout))
        return tag

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement once for each row of arguments: all of them or none."""
        await self._run(sql, self._connection.executemany(sql, rows, timeout=timeout))

    def cursor(self, sql: str, *args: Any, prefetch: int | None = None, timeout: float | None = None) -> Any:
        """Return asyncpg's cursor, for `async for` or `await`. It needs an open transaction."""
        self.record(sql)
        return self._connection.cursor(sql, *args, prefetch=prefetch, timeout=timeout)

    async def prepare(self, sql: str, *, name: str | None = None, timeout: float | None = None) -> PreparedOnConnection:
        """Return asyncpg's prepared statement, which lives as long as the connection is held."""
        statement = await self._connection.prepare(sql, name=name, timeout=timeout)
        return PreparedOnConnection(self, sql, statement)

    def transaction(
        self, *, isolation: Isolation | None = None, readonly: bool = False, deferrable: bool = False
    ) -> ConnectionTransaction:
        """Return a transaction on this connection, for `async with` or `start`, `commit` and `rollback`."""
        return ConnectionTransaction(
            self, self._connection.transaction(isolation=isolation, readonly=readonly, deferrable=deferrable)
        )

    async def copy_records_to_table(self, table: str, *, schema_name: str | None = None, **kwargs: Any) -> str:
        """COPY records, an iterable or asynchronous iterable of tuples, into a table and return `COPY n`."""
        return await self._copy("copy_records_to_table", table, schema_name, kwargs)

    async def copy_to_table(self, table: str, *, schema_name: str | None = None, **kwargs: Any) -> str:
        """COPY a file into a table and return `COPY n`."""
        return await self._copy("copy_to_table", table, schema_name, kwargs)

    async def release(self) -> None:
        """Return the connection to the pool, which rolls back an open transaction. A second call does nothing."""
        await self.end(None, None, None)

    async def end(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Return the connection after a block that raised `error`, which is translated."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        with contextlib.suppress(asyncpg.InterfaceError):  # the connection is closed
            self._connection.remove_query_logger(self._report)
        try:
            await lease.__aexit__(kind, error, traceback)
        finally:
            self._tell()

    def settle(self) -> None:
        """Tell the cache what was written, unless a transaction is open."""
        if not self._connection.is_closed() and self._connection.is_in_transaction():
            return
        self._tell()

    def _tell(self) -> None:
        end = self._db.in_doubt if self._is_in_doubt else self._db.committed
        self._is_in_doubt = False
        end(self._log.taken())

    async def _run(self, sql: str, statement: Awaitable[R]) -> R:
        self.record(sql)
        self._unreported[sql] += 1
        return await self.finish(statement)

    async def _copy(self, verb: str, table: str, schema_name: str | None, kwargs: dict[str, Any]) -> str:
        self._log.tables.add((qualified(table, schema_name), "INSERT"))  # asyncpg reports no COPY
        copy: Awaitable[str] = getattr(self._connection, verb)(table, schema_name=schema_name, **kwargs)
        return await self.finish(copy)

    def record(self, sql: str) -> None:
        """Record that a statement is going to run."""
        self._log.texts.add(sql)

    async def finish(self, statement: Awaitable[R]) -> R:
        """Await a statement and tell the cache what it wrote."""
        try:
            with deadline.committing():  # outside a transaction the server commits it at once
                return await statement
        except BaseException as exc:
            self._is_in_doubt = self._is_in_doubt or not isinstance(exc, asyncpg.PostgresError)
            raise
        finally:
            self.settle()

    def _report(self, query: Any) -> None:
        """Record an `asyncpg.connection.LoggedQuery`, such as that of a method which is not among the above."""
        self._db.slow.record(query.query, query.elapsed, self._caller)
        if self._unreported[query.query] > 0:
            self._unreported[query.query] -= 1
            return
        self.record(query.query)
        error = query.exception
        self._is_in_doubt = self._is_in_doubt or (error is not None and not isinstance(error, asyncpg.PostgresError))


class PreparedOnConnection:
    """A prepared statement of a `TrackedConnection`: asyncpg's, which tells the cache what it wrote."""

    def __init__(self, connection: TrackedConnection, sql: str, statement: Any) -> None:
        self._connection = connection
        self._sql = sql
        self._statement = statement

    def __getattr__(self, name: str) -> Any:
        return getattr(self._statement, name)

    async def fetch(self, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows. `timeout` (here and below) is in seconds, None: DB_COMMAND_TIMEOUT."""
        rows: list[Record] = await self._run(self._statement.fetch(*args, timeout=timeout))
        return rows

    async def fetchrow(self, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        row: Record | None = await self._run(self._statement.fetchrow(*args, timeout=timeout))
        return row

    async def fetchval(self, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """Return one column of the first row, or None when there is no row."""
        return await self._run(self._statement.fetchval(*args, column=column, timeout=timeout))

    async def executemany(self, rows: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run the statement once for each row of arguments: all of them or none."""
        await self._run(self._statement.executemany(rows, timeout=timeout))

    def cursor(self, *args: Any, prefetch: int | None = None, timeout: float | None = None) -> Any:
        """Return asyncpg's cursor, for `async for` or `await`. It needs an open transaction."""
        self._connection.record(self._sql)
        return self._statement.cursor(*args, prefetch=prefetch, timeout=timeout)

    async def _run(self, statement: Awaitable[R]) -> R:
        self._connection.record(self._sql)
        return await self._connection.finish(statement)


class ConnectionTransaction:
    """A transaction on a `TrackedConnection`: asyncpg's, which tells the cache when it has ended."""

    def __init__(self, connection: TrackedConnection, transaction: Any) -> None:
        self._connection = connection
        self._transaction = transaction

    async def start(self) -> None:
        """Begin the transaction, or a savepoint inside another one."""
        await self._transaction.start()

    async def commit(self) -> None:
        """Commit."""
        await self._end(self._transaction.commit())

    async def rollback(self) -> None:
        """Roll back."""
        await self._end(self._transaction.rollback())

    async def __aenter__(self) -> ConnectionTransaction:
        await self._transaction.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._end(self._transaction.__aexit__(*error))

    async def _end(self, ending: Awaitable[Any]) -> None:
        await self._connection.finish(ending)


class AcquiredConnection:
    """A raw connection: `async with db.acquire() as connection`, or `connection = await db.acquire()`."""

    def __init__(self, db: Database, timeout: float | None, caller: Caller | None) -> None:
        self._db = db
        self._timeout = timeout
        self._caller = caller
        self._connection: TrackedConnection | None = None

    def __await__(self) -> Generator[Any, None, TrackedConnection]:
        return self._open().__await__()

    async def __aenter__(self) -> TrackedConnection:
        self._connection = await self._open()
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._connection is not None, "__aenter__ has opened it"
        await self._connection.end(kind, error, traceback)

    async def _open(self) -> TrackedConnection:
        lease = self._db.pool.acquire(self._timeout, temp=True)
        return TrackedConnection(self._db, self._caller, await lease.__aenter__(), lease)

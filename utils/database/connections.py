"""Raw connections for cogs, in a block or held by hand, and cursors: both tell the cache what they wrote."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from utils.database.callers import Caller
from utils.database.pool import Record
from utils.database.statements import WriteLog, qualified
from utils.database.transactions import Isolation, Root, joined
from utils.exceptions import DatabaseError, ValidationError

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
        connection.add_query_logger(self._record)

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
        return self._connection.cursor(sql, *args, prefetch=prefetch, timeout=timeout)

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
            self._connection.remove_query_logger(self._record)
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
        self._log.texts.add(sql)
        self._unreported[sql] += 1
        return await self._finish(statement)

    async def _copy(self, verb: str, table: str, schema_name: str | None, kwargs: dict[str, Any]) -> str:
        self._log.tables.add((qualified(table, schema_name), "INSERT"))  # asyncpg reports no COPY
        copy: Awaitable[str] = getattr(self._connection, verb)(table, schema_name=schema_name, **kwargs)
        return await self._finish(copy)

    async def _finish(self, statement: Awaitable[R]) -> R:
        try:
            return await statement
        except BaseException as exc:
            self._is_in_doubt = self._is_in_doubt or not isinstance(exc, asyncpg.PostgresError)
            raise
        finally:
            self.settle()

    def _record(self, query: Any) -> None:
        """Record an `asyncpg.connection.LoggedQuery`: what prepared statements and cursors of the connection ran."""
        self._db.slow.record(query.query, query.elapsed, self._caller)
        if self._unreported[query.query] > 0:
            self._unreported[query.query] -= 1
            return
        self._log.texts.add(query.query)
        error = query.exception
        self._is_in_doubt = self._is_in_doubt or (error is not None and not isinstance(error, asyncpg.PostgresError))


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
        await self._connection._finish(ending)


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


class Cursor:
    """The rows of a query, read `prefetch` at a time: `async for row in db.cursor(sql)`, or `await` it.

    `async for` reads in the open transaction, or else in one of its own, which keeps a connection of the pool until
    the loop ends. An awaited cursor needs an open transaction and reads with `fetch`, `fetchrow` and `forward`. Rows
    are never cached. Raises `DatabaseError`.
    """

    def __init__(self, db: Database, sql: str, args: Sequence[Any], prefetch: int, timeout: float | None) -> None:
        self._db = db
        self._sql = sql
        self._args = args
        self._prefetch = prefetch
        self._timeout = timeout
        self._root: Root | None = None
        self._cursor: Any = None

    def __repr__(self) -> str:
        return f"<Cursor {self._sql}>"

    def __await__(self) -> Generator[Any, None, Cursor]:
        return self._start().__await__()

    async def __aiter__(self) -> AsyncIterator[Record]:
        root = joined()
        if root is not None:
            await self._start()
            while rows := await self.fetch(self._prefetch):
                for row in rows:
                    yield row
            return
        try:
            async with self._db.pool.transaction(temp=True) as connection:
                async for row in await self._prepared(connection, prefetch=self._prefetch):
                    yield row
        finally:
            self._db.committed(WriteLog({self._sql}))

    async def fetch(self, count: int) -> list[Record]:
        """Return the next rows, at most `count`; an empty list at the end."""
        rows: list[Record] = await self._run("fetch", _checked(count))
        return rows

    async def fetchrow(self) -> Record | None:
        """Return the next row, or None at the end."""
        row: Record | None = await self._run("fetchrow")
        return row

    async def forward(self, count: int) -> int:
        """Skip rows, at most `count`, and return how many."""
        skipped: int = await self._run("forward", _checked(count))
        return skipped

    async def _start(self) -> Cursor:
        root = self._root = joined()
        if root is None:
            raise DatabaseError("a cursor lives in a transaction: await it inside `async with db.transaction():`")

        async def start() -> Any:
            return await (await self._prepared(root.raw))

        self._cursor = await root.run(start, log=WriteLog({self._sql}))
        return self

    async def _prepared(self, connection: Any, **kwargs: Any) -> Any:
        # Unnamed through a pooler: the backend may have a statement of the name that asyncpg would choose.
        name = "" if self._db.pool.target.pooled else None
        statement = await connection.prepare(self._sql, name=name, timeout=self._timeout)
        return statement.cursor(*self._args, timeout=self._timeout, **kwargs)

    async def _run(self, verb: str, *args: Any) -> Any:
        if self._root is None:
            raise DatabaseError(f"await the cursor before {verb}(): cursor = await db.cursor(sql)")
        return await self._root.run(getattr(self._cursor, verb), *args, timeout=self._timeout)


def _checked(count: int) -> int:
    if count < 1:
        raise ValidationError(f"the number of rows must be at least 1, not {count}")
    return count

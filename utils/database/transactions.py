"""Transactions of cogs: bound to their context, nested ones as savepoints."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import asyncpg

from utils.database import deadline
from utils.database.callers import Caller, Use, find_caller
from utils.database.deadline import ROLLBACK_SECONDS
from utils.database.orm import WRITE_LOG
from utils.database.sessions import session_settings
from utils.database.statements import WriteLog
from utils.exceptions import DRIVER_ERRORS, DatabaseError, translate_errors

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from utils.database.access import Database
    from utils.database.cursors import Cursor

R = TypeVar("R")

Isolation = Literal["read_committed", "repeatable_read", "serializable"]

_LEVELS: dict[str, str] = {
    "read_committed": "READ COMMITTED", "repeatable_read": "REPEATABLE READ", "serializable": "SERIALIZABLE",
}  # fmt: skip
_ABORTED = (
    "an earlier statement of this transaction failed, so PostgreSQL accepts no more of them: run statements that may"
    " fail in an inner `async with db.transaction():`, which is a savepoint"
)


class Root:
    """A transaction on the server: one connection, used by one statement at a time."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.began: float = time.monotonic()
        self._raw_statements: int = 0
        #: What was run, including SQLAlchemy's statements.
        self.log: WriteLog = WriteLog()
        self.lock: asyncio.Lock = asyncio.Lock()
        self.is_open: bool = False
        #: Whether PostgreSQL rejects further statements, until a rollback to a savepoint.
        self.is_aborted: bool = False
        #: Why it was ended from outside; None: it was not.
        self.ended_because: str | None = None
        self.connection: AsyncConnection | None = None
        #: Ends its registration with the deadline of the command that began it.
        self.end_work: Callable[[], None] = deadline.begin_work()
        self.raw: Any = None
        self.numbers = itertools.count(1)
        #: Results that are not to be served in an outage once it is committed: `Database.forget`.
        self.forgotten: list[Any] = []

    @property
    def statements(self) -> int:
        """Number of statements so far, including SQLAlchemy's."""
        return self._raw_statements + self.log.statements

    def describe(self) -> dict[str, Any]:
        """Return name, age in seconds and number of statements."""
        return {"name": self.name, "age": time.monotonic() - self.began, "statements": self.statements}

    async def run(
        self,
        verb: str | Callable[..., Awaitable[Any]],
        *args: Any,
        log: WriteLog | None = None,
        use: Use | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a method of `asyncpg.Connection`, by its name, or another function that uses the connection.

        One runs at a time, whichever task it comes from.

        log: what it may write. None: nothing.
        use: is told when the other statements of the transaction were done.
        """
        async with self.lock:
            if use is not None:
                use.begin()
            if self.ended_because is not None:
                raise DatabaseError(self.ended_because)
            self._raw_statements += 1
            if log is not None:
                self.log.texts |= log.texts
                self.log.tables |= log.tables
            try:
                with translate_errors():
                    method = getattr(self.raw, verb) if isinstance(verb, str) else verb
                    return await method(*args, **kwargs)
            except BaseException as exc:
                was_aborted, self.is_aborted = self.is_aborted, True
                cause = exc.__cause__
                if was_aborted and isinstance(cause, asyncpg.InFailedSQLTransactionError):
                    raise DatabaseError(_ABORTED, sqlstate=cause.sqlstate) from cause
                raise


#: The transaction of this context, inherited by the tasks started in it.
current: ContextVar[Root | None] = ContextVar("transaction", default=None)


def joined() -> Root | None:
    """Return the open transaction of this context, or None. Raises `DatabaseError` when it was ended from outside."""
    root = current.get()
    if root is None or root.is_open:
        return root
    if root.ended_because is not None:
        raise DatabaseError(root.ended_because)
    return None


@contextlib.contextmanager
def bound_to(root: Root) -> Iterator[None]:
    """Run the statements of the block in a transaction that `Transaction.begin` returned."""
    token = current.set(root)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the block ended in another context, as in fixtures
            current.reset(token)


async def run_in(transaction: Transaction, callback: Callable[..., Awaitable[R]]) -> R:
    """Run a callback in a transaction and return its result. It gets the transaction if it takes an argument."""
    if not callable(callback):
        raise DatabaseError(f"a transaction runs a coroutine function, without parentheses, not {callback!r:.100}")
    async with transaction:
        started = callback(transaction) if _takes_argument(callback) else callback()
        if not inspect.isawaitable(started):
            name = getattr(callback, "__qualname__", repr(callback))
            raise DatabaseError(f"{name} is not a coroutine function: define it with async def")
        return await started


def _takes_argument(callback: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(callback).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return True
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(one.kind in positional and one.default is one.empty for one in parameters)


class Transaction:
    """`async with db.transaction():`, also `async with await db.transaction():`.

    All statements in the block belong to it, those of `db` and of sessions. The end of the block commits, an exception
    rolls back. Inside another transaction it is a savepoint.
    """

    def __init__(
        self, db: Database, name: str | None, isolation: Isolation | None, *, readonly: bool, timeout: float | None
    ) -> None:
        self._db = db
        self._isolation = isolation
        self._readonly = readonly
        self._root: Root | None = None
        self._savepoint: str | None = None
        self._timeout = timeout
        self._token: Token[Root | None] | None = None
        if isolation is not None and isolation not in _LEVELS:
            raise DatabaseError(f"unknown isolation {isolation!r}: use one of {', '.join(_LEVELS)}")
        self.name: str = name or sys._getframe(2).f_code.co_name
        self._caller: Caller | None = find_caller(sys._getframe(2))

    def __await__(self) -> Generator[Any, None, Transaction]:
        yield from ()
        return self

    @property
    def age(self) -> float:
        """Seconds since the outermost transaction began; 0 before that."""
        return 0.0 if self._root is None else time.monotonic() - self._root.began

    @property
    def statements(self) -> int:
        """Number of statements so far, including those of inner and outer blocks."""
        return 0 if self._root is None else self._root.statements

    async def __aenter__(self) -> Transaction:
        if self._root is not None:
            raise DatabaseError("this transaction was already used: call db.transaction() for each block")
        outer = joined()
        if outer is None:
            self._token = current.set(await self.begin())
            return self
        if self._isolation is not None or self._readonly:
            raise DatabaseError(
                "isolation and readonly can only be set on the outermost transaction: an inner one is a savepoint"
            )
        savepoint = f"guildbook_{next(outer.numbers)}"
        await outer.run("execute", f"SAVEPOINT {savepoint}")
        self._root, self._savepoint = outer, savepoint
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        root = self._root
        assert root is not None, "__aenter__ has begun it"
        if self._savepoint is not None:
            await self._end_savepoint(root, is_failed=error is not None)
            return
        if self._token is not None:
            with contextlib.suppress(ValueError):  # the block ended in another context, as in fixtures
                current.reset(self._token)
        await self.end(is_failed=error is not None)

    # These verbs of the transaction and those of `db` do the same.

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[asyncpg.Record]:
        """Return all rows. `timeout` (here and below) is in seconds, None: DB_COMMAND_TIMEOUT."""
        return await self._db.fetch(sql, *args, timeout=timeout)

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> asyncpg.Record | None:
        """Return the first row, or None when there is none."""
        return await self._db.fetchrow(sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, column: int | str = 0, timeout: float | None = None) -> Any:
        """Return one column of the first row, or None when there is no row."""
        return await self._db.fetchval(sql, *args, column=column, timeout=timeout)

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement and return the server's command tag, such as `UPDATE 3`."""
        return await self._db.execute(sql, *args, timeout=timeout)

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement once for each row of arguments: all of them or none."""
        await self._db.execute_many(sql, rows, timeout)

    def cursor(self, sql: str, *args: Any, prefetch: int = 50, timeout: float | None = None) -> Cursor:
        """Return a cursor, as `Database.cursor` does."""
        return self._db.cursor(sql, *args, prefetch=prefetch, timeout=timeout)

    async def begin(self) -> Root:
        """Begin a transaction that is bound to no context, and return it. `end` ends it."""
        root = self._root = Root(self.name)
        holder = f"{self.name} ({self._caller or 'unknown'})"
        try:
            connection = root.connection = await self._db.orm.connect(holder, self._timeout)
            # Leave BEGIN and COMMIT to us: SQLAlchemy would begin with its own first statement only.
            await connection.execution_options(isolation_level="AUTOCOMMIT", **{WRITE_LOG: root.log})
            await connection.begin()
            root.raw = (await connection.get_raw_connection()).driver_connection
            level = f" ISOLATION LEVEL {_LEVELS[self._isolation]}" if self._isolation else ""
            statements = [f"BEGIN{level}{' READ ONLY' if self._readonly else ''}"]
            if self._db.pool.target.pooled:
                statements.append(session_settings(root.raw, local=True))
            await root.raw.execute("; ".join(statements))
        except BaseException as exc:
            root.end_work()
            await _discard(root)
            if isinstance(exc, Exception) and (error := self._db.orm.translated(exc)) is not exc:
                raise error from exc
            raise
        root.is_open = True
        self._db.open_transactions.add(root)
        return root

    async def end(self, *, is_failed: bool) -> None:
        """Commit or roll back what `begin` began."""
        assert self._root is not None, "begun"
        try:
            if is_failed:
                await self._roll_back(self._root)
            else:
                await self._commit(self._root)
        finally:
            self._root.end_work()

    async def _commit(self, root: Root) -> None:
        async with root.lock:
            self._db.open_transactions.discard(root)
            if root.ended_because is not None:
                await _discard(root)
                raise DatabaseError(root.ended_because)
            try:
                with translate_errors():
                    tag = await deadline.commit(root.raw)
            except BaseException:
                root.is_open = False
                self._db.in_doubt(root.log)
                await _discard(root)
                raise
            root.is_open = False
            if tag == "COMMIT":
                self._db.committed(root.log, root.forgotten)
            await self._return(root)
        if tag != "COMMIT":  # PostgreSQL answers ROLLBACK for an aborted transaction
            raise DatabaseError(f"nothing was committed: {_ABORTED}")

    async def _roll_back(self, root: Root) -> None:
        async with root.lock:
            root.is_open = False
            self._db.open_transactions.discard(root)
            try:
                async with asyncio.timeout(ROLLBACK_SECONDS):
                    await root.raw.execute("ROLLBACK")
            except (*DRIVER_ERRORS, asyncio.CancelledError):
                await _discard(root)  # the server rolls back when the connection is closed
                return
            await self._return(root)

    async def _return(self, root: Root) -> None:
        """Return the connection without settings, locks, listeners, cursors and temporary tables."""
        assert root.connection is not None
        try:
            async with asyncio.timeout(ROLLBACK_SECONDS):
                await root.raw.reset()
                if self._db.may_leave_temp(root.log):
                    await root.raw.execute("DISCARD TEMP")
            await root.connection.close()
        except (*DRIVER_ERRORS, asyncio.CancelledError):
            await _discard(root)

    async def _end_savepoint(self, root: Root, *, is_failed: bool) -> None:
        if not is_failed and root.is_aborted:
            await self._undo(root)
            raise DatabaseError(f"the inner block was rolled back: {_ABORTED}")
        if is_failed:
            await self._undo(root)
        else:
            await root.run("execute", f"RELEASE SAVEPOINT {self._savepoint}")

    async def _undo(self, root: Root) -> None:
        try:
            await root.run("execute", f"ROLLBACK TO SAVEPOINT {self._savepoint}")
            root.is_aborted = False
        except DatabaseError:
            root.is_aborted = True  # the connection is lost: the outermost block raises


async def _discard(root: Root) -> None:
    """Close a connection whose state is unknown."""
    if root.raw is not None:
        root.raw.terminate()
    if root.connection is not None:
        with contextlib.suppress(Exception):  # the connection is closed anyway
            await root.connection.invalidate()
        with contextlib.suppress(Exception):
            await root.connection.close()


async def end_all(roots: set[Root], timeout: float) -> list[str]:
    """Roll back open transactions within `timeout` seconds; return their names. Their next statement raises."""
    names = []
    for root in list(roots):
        names.append(root.name)
        root.ended_because = f"transaction {root.name} was rolled back: the bot is stopping"
        root.is_open = False
    ends_at = time.monotonic() + timeout
    for root in list(roots):
        try:
            async with asyncio.timeout(max(0.0, ends_at - time.monotonic())), root.lock:
                await root.raw.execute("ROLLBACK")
        except DRIVER_ERRORS:
            root.raw.terminate()
        roots.discard(root)
    return names

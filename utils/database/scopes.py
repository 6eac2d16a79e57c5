"""What statements of cogs run in: transactions, also by name and repeated, sessions, raw connections and cursors."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from utils.database.callers import find_caller
from utils.database.connections import AcquiredConnection, TrackedConnection
from utils.database.cursors import Cursor
from utils.database.named import NamedTransactions, TransactionSummary
from utils.database.orm import Orm, SessionScope
from utils.database.retries import RetryPolicy, describe, retry
from utils.database.transactions import Isolation, Transaction, joined, run_in
from utils.exceptions import is_conflict

if TYPE_CHECKING:
    from utils.database.access import Database

R = TypeVar("R")

#: How often and for how many seconds `run` repeats a transaction, and the first and longest delay between, in seconds:
#: together less than the three seconds in which Discord expects an answer.
RUN_ATTEMPTS, RUN_SECONDS, RUN_DELAYS = 20, 2.5, (0.01, 0.3)


class Scopes:
    """The part of `Database` that gives statements a transaction, a session or a connection."""

    orm: Orm
    _named: NamedTransactions

    @property
    def _db(self) -> Database:
        return cast("Database", self)

    @overload
    def transaction(
        self, name: str | None = ..., *, isolation: Isolation | None = ..., readonly: bool = ...,
        timeout: float | None = ...,
    ) -> Transaction: ...  # fmt: skip

    @overload
    def transaction(
        self, name: Callable[[], Awaitable[R]] | Callable[[Transaction], Awaitable[R]], *,
        isolation: Isolation | None = ..., readonly: bool = ..., timeout: float | None = ...,
    ) -> Awaitable[R]: ...  # fmt: skip

    def transaction(
        self,
        name: str | Callable[..., Awaitable[Any]] | None = None,
        *,
        isolation: Isolation | None = None,
        readonly: bool = False,
        timeout: float | None = None,
    ) -> Transaction | Awaitable[Any]:
        """Return a transaction for `async with`; a nested one is a savepoint.

        name: shown in `get_stats` while it runs; None: the name of the calling function. A coroutine function is run
            in the transaction, `result = await db.transaction(function)`, and gets it if it takes an argument.
        isolation: read_committed, repeatable_read or serializable; None: the server's default.
        timeout: seconds to wait for one of DB_TRANSACTION_CONNECTIONS, in the order of asking; None:
            DB_TRANSACTION_TIMEOUT. Then `DatabaseUnavailable` names who has them.
        """
        if name is None or isinstance(name, str):
            return Transaction(self._db, name, isolation, readonly=readonly, timeout=timeout)
        what = describe(name)
        return run_in(Transaction(self._db, what, isolation, readonly=readonly, timeout=timeout), name)

    async def run(
        self,
        function: Callable[[], Awaitable[R]] | Callable[[Transaction], Awaitable[R]],
        *,
        name: str | None = None,
        isolation: Isolation | None = None,
        readonly: bool = False,
        timeout: float | None = None,
        attempts: int = RUN_ATTEMPTS,
        seconds: float = RUN_SECONDS,
    ) -> R:
        """Run a coroutine function in a transaction and return its result; after a deadlock, run all of it again.

        The same holds for a serialization failure. Any other error rolls back and is raised at once. The function may
        run several times, so it should do nothing but work with the database. It gets the transaction if it takes an
        argument. Inside another transaction it runs once, because only the outermost can be repeated.

        attempts, seconds: whichever is reached first ends the repetitions; then `TransactionConflict` is raised.
        name: of the transaction and in log lines; None: that of the function.

        The other arguments are those of `transaction`.

        Example::

            async def move() -> None:
                await self.db.execute("UPDATE accounts SET coins = coins - 5 WHERE user_id = $1", giver)
                await self.db.execute("UPDATE accounts SET coins = coins + 5 WHERE user_id = $1", taker)

            await self.db.run(move)
        """
        what = name or describe(function)

        async def once() -> R:
            return await run_in(Transaction(self._db, what, isolation, readonly=readonly, timeout=timeout), function)

        first, longest = RUN_DELAYS
        policy = RetryPolicy(
            attempts=attempts, seconds=seconds, first_seconds=first, max_seconds=longest, is_worth_retrying=is_conflict
        )
        return await retry(once, policy, what)

    async def execute_with_retry(
        self,
        operation: Callable[[], Awaitable[R]],
        context: str | None = None,
        *,
        attempts: int | None = None,
        seconds: float = 30.0,
        first_seconds: float | None = None,
        max_seconds: float | None = None,
        factor: float = 2.0,
        errors: tuple[type[Exception], ...] = (),
    ) -> R:
        """Await `operation()` until it succeeds, and return its result; the arguments are those of `retrying`."""
        policy = RetryPolicy(
            attempts=attempts, seconds=seconds, first_seconds=first_seconds, max_seconds=max_seconds, factor=factor,
            errors=errors,
        )  # fmt: skip
        return await retry(operation, policy, context or describe(operation))

    @overload
    async def execute_in_transaction(self, statements: Iterable[tuple[str, Sequence[Any]]], /) -> list[str]: ...

    @overload
    async def execute_in_transaction(self, name: str, sql: str, /, *args: Any) -> str: ...

    async def execute_in_transaction(
        self, statements: str | Iterable[tuple[str, Sequence[Any]]], sql: str = "", /, *args: Any
    ) -> list[str] | str:
        """Run statements in one transaction, all of them or none, and return their command tags.

        With a name and one statement: run it in the transaction that `begin_transaction` began, and return its tag.
        """
        if isinstance(statements, str):
            with self._named.using(statements):
                return await self._db.execute(sql, *args)
        async with self.transaction("execute_in_transaction"):
            return [await self._db.execute(text, *values) for text, values in statements]

    async def begin_transaction(
        self,
        name: str,
        *,
        isolation: Isolation | None = None,
        readonly: bool = False,
        limit: float | None = None,
        timeout: float | None = None,
    ) -> str:
        """Begin a transaction to be used by its name, from any task, and return the name.

        Use it with `execute_in_transaction(name, sql, *args)` or `in_transaction(name)`, and end it with
        `commit_transaction(name)` or `rollback_transaction(name)`. It belongs to no context and holds a connection.

        limit: seconds after which it is rolled back if it is still open; None: 60.

        The other arguments are those of `transaction`. Raises `DatabaseError` when there is an open one of the name.
        """
        return await self._named.begin(name, isolation=isolation, readonly=readonly, limit=limit, timeout=timeout)

    @asynccontextmanager
    async def in_transaction(self, name: str) -> AsyncIterator[None]:
        """Run the statements and sessions of the block in the transaction of this name. The block does not end it."""
        with self._named.using(name):
            yield

    async def commit_transaction(self, name: str) -> TransactionSummary:
        """Commit the transaction of this name; return `operations` (statements) and `duration` (seconds)."""
        return await self._named.end(name, is_failed=False)

    async def rollback_transaction(self, name: str) -> TransactionSummary:
        """Roll back the transaction of this name; return `operations` (statements) and `duration` (seconds)."""
        return await self._named.end(name, is_failed=True)

    def session(self) -> SessionScope:
        """Return a session in the open transaction, or on a connection of its own.

        `async with db.session() as session`: the end of the block commits. `session = await db.session()`: you commit
        and close it.
        """
        root = joined()
        return self.orm.session(None if root is None else root.connection)

    def acquire(self, timeout: float | None = None) -> AcquiredConnection:
        """Return a raw asyncpg connection outside any transaction: for `async with`, which resets it afterwards.

        `connection = await db.acquire()` is held until `await db.release(connection)`.

        timeout: seconds to wait for a free connection; None: as long as statements do.
        """
        return AcquiredConnection(self._db, timeout, find_caller(sys._getframe(1)))

    async def release(self, connection: TrackedConnection) -> None:
        """Return a connection that `await acquire()` returned. A second call does nothing."""
        await connection.release()

    def cursor(self, sql: str, *args: Any, prefetch: int = 50, timeout: float | None = None) -> Cursor:
        """Return a cursor: `async for row in db.cursor(sql)`, or in a transaction `cursor = await db.cursor(sql)`.

        prefetch: rows that `async for` reads at a time.
        timeout: seconds for each read; None: DB_COMMAND_TIMEOUT.

        Outside a transaction the loop has one of its own, which is rolled back when the loop is left early.
        """
        return Cursor(self._db, sql, args, prefetch, timeout)

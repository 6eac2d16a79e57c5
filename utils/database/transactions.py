"""Transactions of cogs: bound to their context, nested ones savepoints, and known while they run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Generator
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import asyncpg

from utils.database.orm import statements
from utils.exceptions import DatabaseError, DatabaseUnavailable, translate

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from utils.database.access import Database

Isolation = Literal["read_committed", "repeatable_read", "serializable"]

_LEVELS: dict[str, str] = {
    "read_committed": "READ COMMITTED", "repeatable_read": "REPEATABLE READ", "serializable": "SERIALIZABLE",
}  # fmt: skip
#: Seconds for a transaction to be rolled back.
ROLLBACK_SECONDS = 5.0

_ABORTED = (
    "a statement of this transaction failed before, and PostgreSQL takes no more of them: put what may fail into an"
    " inner `async with db.transaction():`, which becomes a savepoint"
)


class Root:
    """The transaction on the server: one connection, used by one statement at a time."""

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.began: float = time.monotonic()
        #: Statements run so far.
        self.statements: int = 0
        #: Texts of what was run, for the cache; SQLAlchemy's as well.
        self.texts: set[str] = set()
        #: Tables that were copied into.
        self.copied: set[str] = set()
        self.lock: asyncio.Lock = asyncio.Lock()
        self.is_open: bool = False
        #: Whether PostgreSQL refuses further statements; undone by a rollback to a savepoint.
        self.is_aborted: bool = False
        #: Why it was ended from without; None: it was not.
        self.ended_because: str | None = None
        self.connection: AsyncConnection | None = None
        self.raw: Any = None
        self.numbers = itertools.count(1)

    def describe(self) -> dict[str, Any]:
        """Return name, age in seconds, and number of statements."""
        return {"name": self.name, "age": time.monotonic() - self.began, "statements": self.statements}

    async def run(self, verb: str, *args: Any, text: str, **kwargs: Any) -> Any:
        """Run one of asyncpg's verbs; one statement after the other, whichever task it comes from."""
        async with self.lock:
            if self.ended_because is not None:
                raise DatabaseError(self.ended_because)
            self.statements += 1
            self.texts.add(text)
            try:
                return await getattr(self.raw, verb)(*args, **kwargs)
            except BaseException as exc:
                was_aborted, self.is_aborted = self.is_aborted, True
                if isinstance(exc, asyncpg.InFailedSQLTransactionError) and was_aborted:
                    raise DatabaseError(_ABORTED, sqlstate=exc.sqlstate) from exc
                error = translate(exc) if isinstance(exc, Exception) else None
                if error is None or error is exc:
                    raise
                raise error from exc


#: The transaction that statements of this context belong to, and that of tasks which were started in it.
current: ContextVar[Root | None] = ContextVar("transaction", default=None)


def joined() -> Root | None:
    """Return the open transaction of this context, or None. Raises `DatabaseError` when it was ended from without."""
    root = current.get()
    if root is None or root.is_open:
        return root
    if root.ended_because is not None:
        raise DatabaseError(root.ended_because)
    return None


class Transaction:
    """`async with db.transaction():`, also `async with await db.transaction():`.

    Statements in the block belong to it, `db`'s and those of sessions alike. The end of the block commits, an exception
    rolls back. Inside another one it is a savepoint.
    """

    def __init__(self, access: Database, name: str | None, isolation: Isolation | None, *, readonly: bool) -> None:
        self._access = access
        self._isolation = isolation
        self._readonly = readonly
        self._root: Root | None = None
        self._savepoint: str | None = None
        self._tokens: list[tuple[ContextVar[Any], Token[Any]]] = []
        if isolation is not None and isolation not in _LEVELS:
            raise DatabaseError(f"isolation {isolation!r} is unknown: choose of {', '.join(_LEVELS)}")
        self.name: str = name or sys._getframe(2).f_code.co_name

    def __await__(self) -> Generator[Any, None, Transaction]:
        yield from ()
        return self

    @property
    def age(self) -> float:
        """Seconds since the outermost transaction began; 0 before."""
        return 0.0 if self._root is None else time.monotonic() - self._root.began

    @property
    def statements(self) -> int:
        """Statements run so far, those of inner and outer blocks included."""
        return 0 if self._root is None else self._root.statements

    async def __aenter__(self) -> Transaction:
        if self._root is not None:
            raise DatabaseError("this transaction was used before: call db.transaction() for each block")
        outer = joined()
        self._tokens = []
        if outer is None:
            await self._begin()
            return self
        if self._isolation is not None or self._readonly:
            raise DatabaseError("isolation and readonly are the outermost transaction's: an inner one is a savepoint")
        savepoint = f"guildbook_{next(outer.numbers)}"
        await outer.run("execute", f"SAVEPOINT {savepoint}", text="")
        self._root, self._savepoint = outer, savepoint
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        root = self._root
        assert root is not None, "begun before"
        if self._savepoint is not None:
            await self._end_savepoint(root, is_failed=error is not None)
            return
        for variable, token in reversed(self._tokens):
            with contextlib.suppress(ValueError):  # ended in another context, as fixtures may be
                variable.reset(token)
        if error is not None:
            await self._roll_back(root)
        else:
            await self._commit(root)

    # Fetching is asked of the transaction or of `db`, which is the same.

    async def fetch(self, sql: str, *args: Any, timeout: float | None = None) -> list[asyncpg.Record]:
        """Return all rows; `timeout` (here and below): seconds, None: DB_COMMAND_TIMEOUT."""
        return await self._access.fetch(sql, *args, timeout=timeout)

    async def fetchrow(self, sql: str, *args: Any, timeout: float | None = None) -> asyncpg.Record | None:
        """Return the first row, or None when there is none."""
        return await self._access.fetchrow(sql, *args, timeout=timeout)

    async def fetchval(self, sql: str, *args: Any, timeout: float | None = None) -> Any:
        """Return the first column of the first row, or None when there is none."""
        return await self._access.fetchval(sql, *args, timeout=timeout)

    async def execute(self, sql: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement and return the server's word for it, like `UPDATE 3`."""
        return await self._access.execute(sql, *args, timeout=timeout)

    async def _begin(self) -> None:
        root = self._root = Root(self.name)
        connection = root.connection = await self._access.orm.connect()
        try:
            # SQLAlchemy is to leave BEGIN and COMMIT to us: it begins with its own first statement only.
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.begin()
            root.raw = (await connection.get_raw_connection()).driver_connection
            level = f" ISOLATION LEVEL {_LEVELS[self._isolation]}" if self._isolation else ""
            await root.raw.execute(f"BEGIN{level}{' READ ONLY' if self._readonly else ''}")
        except BaseException as exc:
            await _discard(root)
            if isinstance(exc, Exception) and (error := self._access.orm.explained(exc)) is not exc:
                raise error from exc
            raise
        root.is_open = True
        self._access.open_transactions.add(root)
        self._tokens = [(current, current.set(root)), (statements, statements.set(root.texts))]

    async def _commit(self, root: Root) -> None:
        async with root.lock:
            self._access.open_transactions.discard(root)
            if root.ended_because is not None:
                await _discard(root)
                raise DatabaseError(root.ended_because)
            try:
                word = await root.raw.execute("COMMIT")
            except BaseException as exc:
                root.is_open = False
                self._access.doubted(root.texts)
                await _discard(root)
                error = translate(exc) if isinstance(exc, Exception) else None
                if error is None or error is exc:
                    raise
                raise error from exc
            root.is_open = False
            if word == "COMMIT":
                self._access.wrote(root)
            await _give_back(root)
        if word != "COMMIT":
            raise DatabaseError(f"nothing was committed: {_ABORTED}")

    async def _roll_back(self, root: Root) -> None:
        async with root.lock:
            root.is_open = False
            self._access.open_transactions.discard(root)
            try:
                async with asyncio.timeout(ROLLBACK_SECONDS):
                    await root.raw.execute("ROLLBACK")
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.CancelledError):
                await _discard(root)  # the server rolls back what lost its connection
                return
            await _give_back(root)

    async def _end_savepoint(self, root: Root, *, is_failed: bool) -> None:
        if not is_failed and root.is_aborted:
            await self._undo(root)
            raise DatabaseError(f"nothing of the inner block was kept: {_ABORTED}")
        if is_failed:
            await self._undo(root)
        else:
            await root.run("execute", f"RELEASE SAVEPOINT {self._savepoint}", text="")

    async def _undo(self, root: Root) -> None:
        try:
            await root.run("execute", f"ROLLBACK TO SAVEPOINT {self._savepoint}", text="")
            root.is_aborted = False
        except (DatabaseError, DatabaseUnavailable):
            root.is_aborted = True  # the connection is gone: the outermost block says so


async def _give_back(root: Root) -> None:
    """Return a connection clean: without settings, locks, listeners, cursors and temporary tables of its last user."""
    try:
        async with asyncio.timeout(ROLLBACK_SECONDS):
            await root.raw.reset()
            if any("temp" in text.lower() for text in root.texts):
                await root.raw.execute("DISCARD TEMP")
        assert root.connection is not None
        await root.connection.close()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.CancelledError):
        await _discard(root)


async def _discard(root: Root) -> None:
    """End a connection whose state is not known."""
    if root.raw is not None:
        root.raw.terminate()
    if root.connection is not None:
        with contextlib.suppress(Exception):  # whatever it says, the connection is gone
            await root.connection.invalidate()
        with contextlib.suppress(Exception):
            await root.connection.close()


async def end_all(roots: set[Root], timeout: float) -> list[str]:
    """Roll back what is open, within `timeout` seconds, and return the names; the blocks raise at their next step."""
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
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            root.raw.terminate()
        roots.discard(root)
    return names

"""Cursors: the rows of a query, read in parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Sequence
from typing import TYPE_CHECKING, Any

from utils.database.pool import Record
from utils.database.statements import WriteLog
from utils.database.transactions import Root, joined
from utils.exceptions import DatabaseError, ValidationError

if TYPE_CHECKING:
    from utils.database.access import Database


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

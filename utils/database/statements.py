"""Statements with a name."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from utils.database.pool import Record

if TYPE_CHECKING:
    from utils.database.access import Database


class PreparedStatement:
    """A statement that every connection prepares with its first use, so that it outlives any of them.

    Through a pooler it is sent whole each time. Its results are not kept in the cache.
    """

    def __init__(self, access: Database, name: str, sql: str) -> None:
        self.name: str = name
        self.sql: str = sql
        self._access = access

    def __repr__(self) -> str:
        return f"<PreparedStatement {self.name}: {self.sql}>"

    def __await__(self) -> Generator[Any, None, PreparedStatement]:
        return self._checked().__await__()

    async def _checked(self) -> PreparedStatement:
        async with self._access.database.acquire() as connection:
            await connection.prepare(self.sql)
        return self

    async def fetch(self, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows; `timeout` (here and below): seconds, None: DB_COMMAND_TIMEOUT."""
        return await self._access.fetch(self.sql, *args, timeout=timeout, use_cache=False)

    async def fetchrow(self, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        return await self._access.fetchrow(self.sql, *args, timeout=timeout, use_cache=False)

    async def fetchval(self, *args: Any, timeout: float | None = None) -> Any:
        """Return the first column of the first row, or None when there is none."""
        return await self._access.fetchval(self.sql, *args, timeout=timeout, use_cache=False)

    async def execute(self, *args: Any, timeout: float | None = None) -> str:
        """Run it and return the server's word for it, like `UPDATE 3`."""
        return await self._access.execute(self.sql, *args, timeout=timeout)

"""A raw connection in somebody's hands: what they run on it is noted, for the cache."""

from __future__ import annotations

from typing import Any

import asyncpg


class TrackedConnection:
    """An asyncpg connection that notes what is written with it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        #: Texts that were run.
        self.texts: set[str] = set()
        #: Tables that were copied into.
        self.copied: set[str] = set()
        #: Whether the end of one of them is not known.
        self.is_doubtful: bool = False

    def __repr__(self) -> str:
        return f"<TrackedConnection {self._connection!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def note(self, query: Any) -> None:
        """Take asyncpg's record of a query."""
        self.texts.add(query.query)
        error = query.exception
        self.is_doubtful = self.is_doubtful or (error is not None and not isinstance(error, asyncpg.PostgresError))

    async def copy_records_to_table(self, table: str, *, schema_name: str | None = None, **kwargs: Any) -> str:
        """Like asyncpg's."""
        self.copied.add(f"{schema_name}.{table}" if schema_name else table)
        word: str = await self._connection.copy_records_to_table(table, schema_name=schema_name, **kwargs)
        return word

    async def copy_to_table(self, table: str, *, schema_name: str | None = None, **kwargs: Any) -> str:
        """Like asyncpg's."""
        self.copied.add(f"{schema_name}.{table}" if schema_name else table)
        word: str = await self._connection.copy_to_table(table, schema_name=schema_name, **kwargs)
        return word

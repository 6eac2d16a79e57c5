"""Statements as cogs run them: prepared by name, on a tracked connection, and in the log when they are slow."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from utils.database.callers import Caller, Use
from utils.database.pool import Record

if TYPE_CHECKING:
    from utils.database.access import Database

_log = logging.getLogger(__name__)

Action = Literal["INSERT", "UPDATE", "DELETE", "TRUNCATE"]

#: Slow statements that `Database.get_stats` returns.
SLOW_KEPT = 50
#: Characters of a statement in the log.
SQL_SHOWN = 1_000


@dataclass(slots=True)
class WriteLog:
    """What a transaction, a session or a borrowed connection ran, to find out which tables it wrote."""

    #: Texts of statements, to be analysed.
    texts: set[str] = field(default_factory=set)
    #: Tables that are known to be written, and how. None: only that table itself, no cascades.
    tables: set[tuple[str, Action | None]] = field(default_factory=set)
    #: How many statements SQLAlchemy has run.
    statements: int = 0
    #: Whether COMMIT was sent and its answer is not known.
    is_committing: bool = False
    #: Ends the commit's registration with the deadline of its command; None: there is none.
    end_commit: Callable[[], None] | None = None

    def clear(self) -> None:
        """Forget everything: it was rolled back."""
        self.texts.clear()
        self.tables.clear()
        self.is_committing = False
        end_commit, self.end_commit = self.end_commit, None
        if end_commit is not None:
            end_commit()

    def taken(self) -> WriteLog:
        """Return the entries so far and forget them."""
        taken = WriteLog(set(self.texts), set(self.tables))
        self.clear()
        return taken


class PreparedStatement:
    """A statement that each connection prepares when it first runs it, so it survives the end of any connection.

    Through a pooler the text is sent each time. Results are not cached.
    """

    def __init__(self, db: Database, name: str, sql: str) -> None:
        self.name: str = name
        self.sql: str = sql
        self._db = db

    def __repr__(self) -> str:
        return f"<PreparedStatement {self.name}: {self.sql}>"

    def __await__(self) -> Generator[Any, None, PreparedStatement]:
        return self._check().__await__()

    async def _check(self) -> PreparedStatement:
        pool = self._db.pool
        async with pool.transaction() as connection:
            # Unnamed through a pooler: the backend may have a statement of the name that asyncpg would choose.
            await connection.prepare(self.sql, name="" if pool.target.pooled else None)
        return self

    async def fetch(self, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows. `timeout` (here and below) is in seconds, None: DB_COMMAND_TIMEOUT."""
        return await self._db.fetch(self.sql, *args, timeout=timeout, use_cache=False)

    async def fetchrow(self, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        return await self._db.fetchrow(self.sql, *args, timeout=timeout, use_cache=False)

    async def fetchval(self, *args: Any, column: int | str = 0, timeout: float | None = None) -> Any:
        """Return one column of the first row, or None when there is no row."""
        return await self._db.fetchval(self.sql, *args, column=column, timeout=timeout, use_cache=False)

    async def execute(self, *args: Any, timeout: float | None = None) -> str:
        """Run the statement and return the server's command tag, such as `UPDATE 3`."""
        return await self._db.execute(self.sql, *args, timeout=timeout)


def qualified(table: str, schema: str | None) -> str:
    """Return "schema.table", or the bare name when there is no schema."""
    return f"{schema}.{table}" if schema else table


class SlowLog:
    """Logs statements that take `threshold_ms` milliseconds or longer; with `log_all` all others too.

    The wait for a connection is no part of that, and shown apart.
    """

    def __init__(self, threshold_ms: int, *, log_all: bool = False) -> None:
        self.threshold: float = threshold_ms / 1000
        self.log_all: bool = log_all
        #: Slow statements since the start.
        self.count: int = 0
        self._latest: deque[dict[str, Any]] = deque(maxlen=SLOW_KEPT)

    def record(self, sql: str, seconds: float, caller: Caller | Use | None) -> None:
        """Record a statement. Its arguments are never logged.

        seconds: how long the statement took, without the wait for a connection.
        caller: where it was called from, and for how long it waited for a connection; None: unknown.
        """
        if seconds < self.threshold and not self.log_all:
            return
        fields: dict[str, Any] = {
            "sql": " ".join(sql.split())[:SQL_SHOWN],
            "ms": round(seconds * 1000, 1),
            "waited_ms": round((caller.waited if isinstance(caller, Use) else 0.0) * 1000, 1),
            "caller": str(caller or "unknown"),
        }
        if seconds < self.threshold:
            _log.info("statement", extra=fields)
            return
        self.count += 1
        self._latest.append(fields | {"at": time.time()})
        _log.warning("slow statement (db.explain shows its plan)", extra=fields)

    def latest(self) -> list[dict[str, Any]]:
        """Return the latest slow statements, oldest first.

        Each has `sql`, `ms`, `waited_ms` (for a connection, not part of `ms`), `caller`, and `at` (Unix time).
        """
        return list(self._latest)

"""Statements as cogs run them: prepared by name, on a tracked connection, and in the log when they are slow."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import asyncpg

from utils.database.pool import Record

if TYPE_CHECKING:
    from utils.database.access import Database

_log = logging.getLogger(__name__)

Action = Literal["INSERT", "UPDATE", "DELETE", "TRUNCATE"]

#: Slow statements that `Database.get_stats` returns.
SLOW_KEPT = 50
#: Characters of a statement in the log.
SQL_SHOWN = 1_000
_ROOT = Path(__file__).resolve().parents[2]
_DATA_LAYER = tuple(str(_ROOT / "utils" / name) for name in ("database", "repositories"))


@dataclass(slots=True)
class WriteLog:
    """What a transaction, a session or a borrowed connection ran, to find out which tables it wrote."""

    #: Texts of statements, to be analysed.
    texts: set[str] = field(default_factory=set)
    #: Tables that are known to be written, and how. None: only that table itself, no cascades.
    tables: set[tuple[str, Action | None]] = field(default_factory=set)

    def clear(self) -> None:
        """Forget everything: it was rolled back."""
        self.texts.clear()
        self.tables.clear()

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
        async with self._db.pool.acquire() as connection:
            await connection.prepare(self.sql)
        return self

    async def fetch(self, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows. `timeout` (here and below) is in seconds, None: DB_COMMAND_TIMEOUT."""
        return await self._db.fetch(self.sql, *args, timeout=timeout, use_cache=False)

    async def fetchrow(self, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        return await self._db.fetchrow(self.sql, *args, timeout=timeout, use_cache=False)

    async def fetchval(self, *args: Any, timeout: float | None = None) -> Any:
        """Return the first column of the first row, or None when there is no row."""
        return await self._db.fetchval(self.sql, *args, timeout=timeout, use_cache=False)

    async def execute(self, *args: Any, timeout: float | None = None) -> str:
        """Run the statement and return the server's command tag, such as `UPDATE 3`."""
        return await self._db.execute(self.sql, *args, timeout=timeout)


class TrackedConnection:
    """An asyncpg connection that records what is run on it, so that the cache learns what was written."""

    def __init__(self, connection: Any) -> None:
        self.log: WriteLog = WriteLog()
        #: Whether the outcome of a statement is unknown.
        self.is_in_doubt: bool = False
        self._connection = connection

    def __repr__(self) -> str:
        return f"<TrackedConnection {self._connection!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def record(self, query: Any) -> None:
        """Record a `asyncpg.connection.LoggedQuery`."""
        self.log.texts.add(query.query)
        error = query.exception
        self.is_in_doubt = self.is_in_doubt or (error is not None and not isinstance(error, asyncpg.PostgresError))

    async def copy_records_to_table(self, table: str, *, schema_name: str | None = None, **kwargs: Any) -> str:
        """Do what asyncpg's method of this name does; asyncpg logs no COPY."""
        self.log.tables.add((qualified(table, schema_name), "INSERT"))
        tag: str = await self._connection.copy_records_to_table(table, schema_name=schema_name, **kwargs)
        return tag

    async def copy_to_table(self, table: str, *, schema_name: str | None = None, **kwargs: Any) -> str:
        """Do what asyncpg's method of this name does; asyncpg logs no COPY."""
        self.log.tables.add((qualified(table, schema_name), "INSERT"))
        tag: str = await self._connection.copy_to_table(table, schema_name=schema_name, **kwargs)
        return tag


def qualified(table: str, schema: str | None) -> str:
    """Return "schema.table", or the bare name when there is no schema."""
    return f"{schema}.{table}" if schema else table


class SlowLog:
    """Logs statements that take `threshold_ms` milliseconds or longer; with `log_all` all others too."""

    def __init__(self, threshold_ms: int, *, log_all: bool = False) -> None:
        self.threshold: float = threshold_ms / 1000
        self.log_all: bool = log_all
        #: Slow statements since the start.
        self.count: int = 0
        self._latest: deque[dict[str, Any]] = deque(maxlen=SLOW_KEPT)

    def record(self, sql: str, started: float, frame: FrameType | None) -> None:
        """Record a statement that started at `started` (`time.perf_counter`). Its arguments are never logged.

        `frame` is where it was called from; None: unknown.
        """
        seconds = time.perf_counter() - started
        if seconds < self.threshold and not self.log_all:
            return
        fields = {"sql": " ".join(sql.split())[:SQL_SHOWN], "ms": round(seconds * 1000, 1), "caller": caller(frame)}
        if seconds < self.threshold:
            _log.info("statement", extra=fields)
            return
        self.count += 1
        self._latest.append(fields | {"at": time.time()})
        _log.warning("slow statement (db.explain shows its plan)", extra=fields)

    def latest(self) -> list[dict[str, Any]]:
        """Return the latest slow statements, oldest first: `sql`, `ms`, `caller`, `at` (Unix time in seconds)."""
        return list(self._latest)


def caller(frame: FrameType | None) -> str:
    """Return file, line and function of the innermost frame outside the data layer."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not (file.startswith(_DATA_LAYER) or "/sqlalchemy/" in file or file.endswith("contextlib.py")):
            path = Path(file)
            shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path.name
            return f"{shown}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "unknown"

"""SQLAlchemy beside the raw pool: an engine with the same JSON codecs, and its sessions."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from types import FrameType
from typing import Any

from greenlet import getcurrent  # type: ignore[import-untyped]
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction

from utils.database.callers import Caller, Holders, Use, find_caller
from utils.database.sessions import apply_settings, session_settings, set_codecs
from utils.database.statements import Action, SlowLog, WriteLog
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseUnavailable, translate_errors

#: Where statements that SQLAlchemy runs in this context are recorded; None: nowhere.
write_log: ContextVar[WriteLog | None] = ContextVar("write_log", default=None)

#: Execution option of the statements that only set up a transaction.
_OWN = "guildbook_own"


class _Session(Session):
    """A session with its own transaction, which reports commits. One that joins a transaction is a plain `Session`."""


class Orm:
    """An engine with a few connections.

    `on_committed` is called with what a session wrote, `on_doubt` when the outcome of its commit is unknown.
    """

    def __init__(
        self,
        target: Callable[[], ConnectTarget],
        *,
        connections: int,
        acquire_timeout: float,
        idle_seconds: float,
        slow: SlowLog,
        on_committed: Callable[[WriteLog], None],
        on_doubt: Callable[[WriteLog], None],
    ) -> None:
        """
        target: asked for each new connection.
        acquire_timeout: seconds to wait for a free connection.
        idle_seconds: a connection of that age is replaced before it is used again; 0: never.
        slow: records the statements of sessions.
        """
        self.connections: int = connections
        #: The transactions and sessions that use a connection.
        self.holders: Holders = Holders()
        self._target = target
        self._slow = slow
        self._on_committed = on_committed
        self._on_doubt = on_doubt
        self.engine: AsyncEngine = create_async_engine(
            target().sqlalchemy_url(),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=acquire_timeout,
            pool_recycle=idle_seconds or -1,
            json_serializer=lambda value: value,  # the codecs do it
        )
        event.listen(self.engine.sync_engine, "connect", _set_up)
        event.listen(self.engine.sync_engine, "do_connect", self._set_arguments)
        # First: before what SQLAlchemy asks a new connection.
        event.listen(self.engine.sync_engine, "connect", self._apply_settings, insert=True)
        event.listen(self.engine.sync_engine, "begin", self._apply_local_settings)
        event.listen(self.engine.sync_engine, "before_cursor_execute", _record)
        event.listen(self.engine.sync_engine, "before_cursor_execute", _start_clock)
        event.listen(self.engine.sync_engine, "after_cursor_execute", self._record_slow)

    def stats(self) -> dict[str, int]:
        """Return the number of connections, how many are in use, and the maximum."""
        pool: Any = self.engine.pool
        return {"size": pool.checkedin() + pool.checkedout(), "active": pool.checkedout(), "max": self.connections}

    async def connect(self) -> AsyncConnection:
        """Return a connection, which the caller closes. Raises `DatabaseError`."""
        try:
            return await self.engine.connect()
        except Exception as exc:
            raise self.translated(exc) from exc

    def _set_arguments(self, _: Any, __: Any, ___: Any, arguments: dict[str, Any]) -> None:
        arguments.update(self._target().sqlalchemy_connect_args())

    def _apply_settings(self, connection: Any, record: Any) -> None:
        if not self._target().pooled:
            apply_settings_of_driver(connection, record)

    def _apply_local_settings(self, connection: SyncConnection) -> None:
        if self._target().pooled:
            apply_local_settings(connection)

    def _record_slow(self, _: SyncConnection, __: Any, statement: str, ___: Any, context: Any, ____: bool) -> None:
        started = getattr(context, "guildbook_started", None)
        if started is not None:
            seconds = time.perf_counter() - started
            is_recorded = seconds >= self._slow.threshold or self._slow.log_all
            self._slow.record(statement, seconds, _find_session_caller() if is_recorded else None)

    @contextlib.asynccontextmanager
    async def session(self, joined: AsyncConnection | None) -> AsyncIterator[AsyncSession]:
        """Yield a session on its own connection, or as a savepoint in the transaction of `joined`.

        The end of the block commits, an exception rolls back. Errors of the driver and of SQLAlchemy about the database
        are raised as `DatabaseError`.
        """
        if joined is not None:
            session = AsyncSession(joined, join_transaction_mode="create_savepoint", expire_on_commit=False)
            log, token, use = WriteLog(), None, None
        else:
            session = AsyncSession(self.engine, sync_session_class=_Session, expire_on_commit=False)
            log = session.sync_session.info["log"] = WriteLog()
            session.sync_session.info["on_committed"] = self._on_committed
            token = write_log.set(log)
            use = Use(sys._getframe(1))
            self.holders.add(use)
        try:
            try:
                yield session
            except BaseException:
                await session.rollback()
                raise
            uncommitted = WriteLog(set(log.texts), set(log.tables))
            try:
                await session.commit()
            except BaseException:
                self._on_doubt(uncommitted)
                raise
        except Exception as exc:
            if (error := self.translated(exc)) is not exc:
                raise error from exc
            raise
        finally:
            if token is not None:
                with contextlib.suppress(ValueError):  # closed from another context, as generators may be
                    write_log.reset(token)
            await session.close()
            if use is not None:
                self.holders.discard(use)

    def translated(self, exc: Exception) -> Exception:
        """Return a `DatabaseError` for an error about the database, and any other error unchanged."""
        if isinstance(exc, PoolTimeout):
            return DatabaseUnavailable(
                f"no connection for a transaction or session was free in time: there are {self.connections} (three"
                f" tenths of DB_POOL_MAX), {self.holders}"
            )
        return translate_errors(was_connected=True).translated(exc)

    async def close(self) -> None:
        """Close every connection, those in use when they are returned."""
        await self.engine.dispose()


def _start_clock(_: SyncConnection, __: Any, ___: str, ____: Any, context: Any, _____: bool) -> None:
    if context is not None:
        context.guildbook_started = time.perf_counter()


def _find_session_caller() -> Caller | None:
    """Return who called the session: SQLAlchemy runs statements in a greenlet, whose parent is the caller's."""
    current: Any = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    while current is not None:
        if (found := find_caller(frame)) is not None:
            return found
        current = current.parent
        frame = None if current is None else current.gr_frame
    return None


def _set_up(connection: Any, _: Any) -> None:
    connection.run_async(set_codecs)


def apply_local_settings(connection: SyncConnection) -> None:
    """Set our settings for a transaction through a pooler: a listener for the event `begin`.

    A setting of the session would reach other clients of the pooler. In autocommit mode there is no transaction.
    """
    if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
        statement = session_settings(connection.connection.driver_connection, local=True)
        connection.exec_driver_sql(statement, execution_options={_OWN: True})


def apply_settings_of_driver(connection: Any, _: Any) -> None:
    """Set our settings when SQLAlchemy has connected: a listener for the event `connect`."""
    connection.run_async(apply_settings)


@event.listens_for(_Session, "after_commit")
def _after_commit(session: Session) -> None:
    log: WriteLog | None = session.info.get("log")
    if log is not None and (log.texts or log.tables):
        session.info["on_committed"](log.taken())


@event.listens_for(_Session, "after_soft_rollback")
def _after_rollback(session: Session, _: SessionTransaction) -> None:
    if session.get_transaction() is None and (log := session.info.get("log")) is not None:
        log.clear()


def _record(
    _: SyncConnection, __: Any, statement: str, ___: Any, context: Any, ____: bool
) -> None:  # the signature is SQLAlchemy's
    log = write_log.get()
    if log is None or (context is not None and context.execution_options.get(_OWN)):
        return
    if context is not None and context.compiled is not None and (written := _table_written(context)) is not None:
        # The text of a bulk INSERT differs with its number of rows, and the table is known anyway.
        log.tables.add(written)
    else:
        log.texts.add(statement)


def _table_written(context: Any) -> tuple[str, Action] | None:
    """Return table and action of a plain INSERT, UPDATE or DELETE; None for other statements."""
    name = getattr(getattr(context.compiled.statement, "table", None), "fullname", None)
    if name is None or getattr(context.compiled, "ctes", None):
        return None
    if context.isinsert:
        return name, "INSERT"
    if context.isupdate:
        return name, "UPDATE"
    return (name, "DELETE") if context.isdelete else None

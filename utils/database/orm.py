"""SQLAlchemy beside the raw pool: an engine with the same JSON codecs, and its sessions."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction

from utils.database import deadline
from utils.database.callers import Holders
from utils.database.connection_queue import ConnectionQueue, QueuedPool, find_session_caller
from utils.database.sessions import apply_settings, session_settings, set_codecs
from utils.database.statements import Action, SlowLog, WriteLog
from utils.database.target import ConnectTarget
from utils.exceptions import translate_errors, was_rejected

#: Execution option of the statements that only set up a transaction.
_OWN = "guildbook_own"
#: Execution option of a connection: the `WriteLog` that its statements are recorded in.
WRITE_LOG = "guildbook_log"


class _Session(Session):
    """A session with its own transaction, which reports commits. One that joins a transaction is a plain `Session`."""


class SessionScope(AbstractAsyncContextManager[AsyncSession]):
    """A session for `async with`, or held by hand after `await`.

    At the end of an `async with` block it commits and closes; an exception rolls back, and errors about the database
    are raised as `DatabaseError`. After `session = await scope` you commit, and you must `await session.close()`, which
    rolls back what was not committed and returns the connection. The session's own methods raise SQLAlchemy's errors.
    """

    def __init__(self, orm: Orm, session: AsyncSession) -> None:
        self._orm = orm
        self._session = session
        self._end_work: Callable[[], None] = deadline.do_nothing

    def __await__(self) -> Generator[Any, None, AsyncSession]:
        yield from ()
        return self._session

    async def __aenter__(self) -> AsyncSession:
        self._end_work = deadline.begin_work()
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with translate_errors(was_connected=True):
            try:
                if error is None:
                    await self._commit()
                    return
                await self._session.rollback()
            finally:
                self._end_work()
                await self._close()
        if isinstance(error, Exception) and (translated := self._orm.translated(error)) is not error:
            raise translated from error

    async def _close(self) -> None:
        if self._session.in_transaction():
            await self._session.close()
        else:  # its connection was returned: there is nothing to wait for
            self._session.sync_session.close()

    async def _commit(self) -> None:
        try:
            await self._session.commit()
        except Exception as exc:
            if self._session.sync_session.info.get("is_in_doubt") and not was_rejected(exc):
                raise deadline.unknown_commit(exc) from exc
            raise


class Orm:
    """An engine with a few connections.

    `on_committed` is called with what a session wrote, `on_doubt` when the outcome of its commit is unknown.
    """

    def __init__(
        self,
        target: Callable[[], ConnectTarget],
        *,
        connections: int,
        queue_timeout: float,
        idle_seconds: float,
        slow: SlowLog,
        on_committed: Callable[[WriteLog], None],
        on_doubt: Callable[[WriteLog], None],
    ) -> None:
        """
        target: asked for each new connection.
        queue_timeout: seconds to wait for a free connection.
        idle_seconds: a connection of that age is replaced before it is used again; 0: never.
        slow: records the statements of sessions.
        """
        self.connections: int = connections
        self.queue: ConnectionQueue = ConnectionQueue(connections, queue_timeout)
        self._target = target
        self._slow = slow
        self._on_committed = on_committed
        self._on_doubt = on_doubt
        self.engine: AsyncEngine = create_async_engine(
            target().sqlalchemy_url(),
            poolclass=QueuedPool,
            pool_size=connections,
            max_overflow=0,
            pool_recycle=idle_seconds or -1,
            json_serializer=lambda value: value,  # the codecs do it
        )
        pool: Any = self.engine.pool
        pool.queue = self.queue
        event.listen(self.engine.sync_engine, "connect", _set_up)
        event.listen(self.engine.sync_engine, "do_connect", self._set_arguments)
        # First: before what SQLAlchemy asks a new connection.
        event.listen(self.engine.sync_engine, "connect", self._apply_settings, insert=True)
        event.listen(self.engine.sync_engine, "begin", self._apply_local_settings)
        event.listen(self.engine.sync_engine, "before_cursor_execute", _record)
        event.listen(self.engine.sync_engine, "commit", _begin_commit)
        event.listen(self.engine.sync_engine, "before_cursor_execute", _start_clock)
        event.listen(self.engine.sync_engine, "after_cursor_execute", self._record_slow)

    @property
    def holders(self) -> Holders:
        """The transactions and sessions that use a connection."""
        return self.queue.holders

    def stats(self) -> dict[str, int]:
        """Return the number of connections, how many are in use, the maximum, and how many tasks wait for one."""
        pool: Any = self.engine.pool
        return {
            "size": pool.checkedin() + pool.checkedout(),
            "active": pool.checkedout(),
            "max": self.connections,
            "waiting": self.queue.waiting,
        }

    async def connect(self, holder: str | None = None, timeout: float | None = None) -> AsyncConnection:
        """Return a connection, which the caller closes. Raises `DatabaseError`.

        holder: named in the error of those who wait in vain; None: the caller.
        timeout: seconds to wait for a free connection; None: `queue_timeout`.
        """
        try:
            with self.queue.asking(holder, timeout):
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
            self._slow.record(statement, seconds, find_session_caller() if is_recorded else None)

    def session(self, joined: AsyncConnection | None) -> SessionScope:
        """Return a session on its own connection, or as a savepoint in the transaction of `joined`."""
        if joined is not None:
            return SessionScope(
                self, AsyncSession(joined, join_transaction_mode="create_savepoint", expire_on_commit=False)
            )
        session = AsyncSession(self.engine, sync_session_class=_Session, expire_on_commit=False)
        session.sync_session.info.update(log=WriteLog(), on_committed=self._on_committed, on_doubt=self._on_doubt)
        return SessionScope(self, session)

    def translated(self, exc: Exception) -> Exception:
        """Return a `DatabaseError` for an error about the database, and any other error unchanged."""
        return translate_errors(was_connected=True).translated(exc)

    async def close(self) -> None:
        """Close every connection, those in use when they are returned."""
        await self.engine.dispose()


def _start_clock(_: SyncConnection, __: Any, ___: str, ____: Any, context: Any, _____: bool) -> None:
    if context is not None:
        context.guildbook_started = time.perf_counter()


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


@event.listens_for(_Session, "after_begin")
def _after_begin(session: Session, _: SessionTransaction, connection: SyncConnection) -> None:
    if connection.get_execution_options().get(WRITE_LOG) is None:
        connection.execution_options(**{WRITE_LOG: session.info["log"]})


@event.listens_for(_Session, "after_commit")
def _after_commit(session: Session) -> None:
    log: WriteLog = session.info["log"]
    if log.texts or log.tables:
        session.info["on_committed"](log.taken())


@event.listens_for(_Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is not None:
        return
    log: WriteLog = session.info["log"]
    if log.is_committing and (log.texts or log.tables):
        session.info["is_in_doubt"] = True
        session.info["on_doubt"](log.taken())  # COMMIT was sent and not answered
    log.clear()


def _begin_commit(connection: SyncConnection) -> None:
    log: WriteLog | None = connection.get_execution_options().get(WRITE_LOG)
    if log is not None:
        log.end_commit = deadline.begin_commit()
        log.is_committing = True


def _record(
    connection: SyncConnection, __: Any, statement: str, ___: Any, context: Any, ____: bool
) -> None:  # the signature is SQLAlchemy's
    log: WriteLog | None = connection.get_execution_options().get(WRITE_LOG)
    if log is None or (context is not None and context.execution_options.get(_OWN)):
        return
    log.statements += 1
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

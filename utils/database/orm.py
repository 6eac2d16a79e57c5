"""SQLAlchemy beside the raw pool: an engine with the same JSON codecs, and its sessions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction

from utils.database.pool import set_codecs
from utils.database.statements import Action, WriteLog
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseUnavailable, translate_errors

#: Where statements that SQLAlchemy runs in this context are recorded; None: nowhere.
write_log: ContextVar[WriteLog | None] = ContextVar("write_log", default=None)


class _Session(Session):
    """A session with its own transaction, which reports commits. One that joins a transaction is a plain `Session`."""


class Orm:
    """An engine with a few connections.

    `on_committed` is called with what a session wrote, `on_doubt` when the outcome of its commit is unknown.
    """

    def __init__(
        self,
        target: ConnectTarget,
        *,
        connections: int,
        acquire_timeout: float,
        on_committed: Callable[[WriteLog], None],
        on_doubt: Callable[[WriteLog], None],
    ) -> None:
        """`acquire_timeout`: seconds to wait for a free connection."""
        self.connections: int = connections
        self._on_committed = on_committed
        self._on_doubt = on_doubt
        self.engine: AsyncEngine = create_async_engine(
            target.sqlalchemy_url(),
            connect_args=target.sqlalchemy_connect_args(),
            pool_size=connections,
            max_overflow=0,
            pool_timeout=acquire_timeout,
            json_serializer=lambda value: value,  # the codecs do it
        )
        event.listen(self.engine.sync_engine, "connect", _set_up)
        event.listen(self.engine.sync_engine, "before_cursor_execute", _record)

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

    @contextlib.asynccontextmanager
    async def session(self, joined: AsyncConnection | None) -> AsyncIterator[AsyncSession]:
        """Yield a session on its own connection, or as a savepoint in the transaction of `joined`.

        The end of the block commits, an exception rolls back. Errors of the driver and of SQLAlchemy about the database
        are raised as `DatabaseError`.
        """
        if joined is not None:
            session = AsyncSession(joined, join_transaction_mode="create_savepoint", expire_on_commit=False)
            log, token = WriteLog(), None
        else:
            session = AsyncSession(self.engine, sync_session_class=_Session, expire_on_commit=False)
            log = session.sync_session.info["log"] = WriteLog()
            session.sync_session.info["on_committed"] = self._on_committed
            token = write_log.set(log)
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

    def translated(self, exc: Exception) -> Exception:
        """Return a `DatabaseError` for an error about the database, and any other error unchanged."""
        if isinstance(exc, PoolTimeout):
            return DatabaseUnavailable(
                f"no connection for a transaction or session was free in time: there are {self.connections} (three"
                " tenths of DB_POOL_MAX); db.get_stats() lists open transactions"
            )
        return translate_errors(was_connected=True).translated(exc)

    async def close(self) -> None:
        """Close every connection, those in use when they are returned."""
        await self.engine.dispose()


def _set_up(connection: Any, _: Any) -> None:
    connection.run_async(set_codecs)


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
    if log is None:
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

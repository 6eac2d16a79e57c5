"""SQLAlchemy beside the raw pool: an engine whose connections speak JSON as the pool's do, and its sessions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextvars import ContextVar
from typing import Any

from sqlalchemy import Connection as SyncConnection
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction

from utils.database.codecs import set_codecs
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseUnavailable, translate

#: Texts of what SQLAlchemy was asked to run, for whoever wants to know what was written; None: nobody does.
statements: ContextVar[set[str] | None] = ContextVar("statements", default=None)


class _Session(Session):
    """A session that says when it has committed; those that join a transaction leave that to it."""


class Orm:
    """An engine of a few connections. `on_committed` and `on_doubt` hear what sessions of their own wrote."""

    def __init__(
        self,
        target: ConnectTarget,
        *,
        connections: int,
        acquire_timeout: float,
        on_committed: Callable[[Iterable[str]], None],
        on_doubt: Callable[[Iterable[str]], None],
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
            json_serializer=lambda value: value,  # the codec below does it
        )
        event.listen(self.engine.sync_engine, "connect", _set_up)
        event.listen(self.engine.sync_engine, "before_cursor_execute", _note)

    def stats(self) -> dict[str, int]:
        """Return how many connections there are, how many of them are lent, and how many there may be."""
        pool: Any = self.engine.pool
        return {"size": pool.checkedin() + pool.checkedout(), "active": pool.checkedout(), "max": self.connections}

    async def connect(self) -> AsyncConnection:
        """Lend a connection; close it. Raises `DatabaseError`."""
        try:
            return await self.engine.connect()
        except Exception as exc:
            raise self.explained(exc) from exc

    @contextlib.asynccontextmanager
    async def session(self, joined: AsyncConnection | None) -> AsyncIterator[AsyncSession]:
        """Lend a session on its own connection, or within the transaction of `joined`, as a savepoint.

        The end of the block commits, an exception rolls back. Driver's and SQLAlchemy's errors about the database leave
        as `DatabaseError`.
        """
        if joined is not None:
            session = AsyncSession(joined, join_transaction_mode="create_savepoint", expire_on_commit=False)
            texts, token = None, None
        else:
            session = AsyncSession(self.engine, sync_session_class=_Session, expire_on_commit=False)
            texts = session.sync_session.info["texts"] = set()
            session.sync_session.info["committed"] = self._on_committed
            token = statements.set(texts)
        try:
            try:
                yield session
            except BaseException:
                await session.rollback()
                raise
            waiting = set(texts or ())
            try:
                await session.commit()
            except BaseException:
                self._on_doubt(waiting)
                raise
        except Exception as exc:
            if (error := self.explained(exc)) is not exc:
                raise error from exc
            raise
        finally:
            if token is not None:
                with contextlib.suppress(ValueError):  # closed from another context, as generators may be
                    statements.reset(token)
            await session.close()

    def explained(self, exc: Exception) -> Exception:
        """Return our own error for one about the database, and any other as it is."""
        if isinstance(exc, PoolTimeout):
            return DatabaseUnavailable(
                f"no connection for a transaction or a session was free in time: there are {self.connections}"
                " (three tenths of DB_POOL_MAX); one that is held for long is in bot.stats()"
            )
        return translate(exc, was_connected=True) or exc

    async def close(self) -> None:
        """Close every connection that is not lent, and the others when they come back."""
        await self.engine.dispose()


def _set_up(connection: Any, _: Any) -> None:
    connection.run_async(set_codecs)


@event.listens_for(_Session, "after_commit")
def _committed(session: Session) -> None:
    texts: set[str] | None = session.info.get("texts")
    if texts:
        session.info["committed"](set(texts))
        texts.clear()


@event.listens_for(_Session, "after_soft_rollback")
def _rolled_back(session: Session, _: SessionTransaction) -> None:
    if session.get_transaction() is None and (texts := session.info.get("texts")):
        texts.clear()


def _note(
    _: SyncConnection, __: Any, statement: str, ___: Any, context: Any, ____: bool
) -> None:  # the signature is SQLAlchemy's
    texts = statements.get()
    if texts is None:
        return
    if context is not None and context.compiled is not None and (table := _written(context)) is not None:
        # The text of a bulk INSERT differs with the number of its rows: what counts is the table.
        texts.add(table)
    else:
        texts.add(statement)


def _written(context: Any) -> str | None:
    """Return a short statement that writes what this one writes; None when it is no plain INSERT, UPDATE or DELETE."""
    name = getattr(getattr(context.compiled.statement, "table", None), "fullname", None)
    if name is None or getattr(context.compiled, "ctes", None):
        return None
    if context.isinsert:
        return f"INSERT INTO {name} DEFAULT VALUES"
    if context.isupdate:
        return f"UPDATE {name} SET x = 1"
    return f"DELETE FROM {name}" if context.isdelete else None

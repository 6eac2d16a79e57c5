"""The pool of raw asyncpg connections, and the verbs that everything else is built on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import stamina

from utils.database import deadline
from utils.database.callers import Holders, Use
from utils.database.placement import Placement
from utils.database.sessions import (
    ATTEMPT_SECONDS,
    apply_settings,
    is_behind_pooler,
    session_settings,
    set_codecs,
)
from utils.database.target import ConnectTarget, located
from utils.exceptions import (
    DRIVER_ERRORS,
    DatabaseError,
    DatabaseUnavailable,
    is_transient,
    translate,
    translate_errors,
)

if TYPE_CHECKING:
    from asyncpg.pool import Pool as AsyncpgPool
    from asyncpg.pool import PoolConnectionProxy

    Record = asyncpg.Record
    Connection = asyncpg.Connection[Record] | PoolConnectionProxy[Record]
else:
    Record = asyncpg.Record
    Connection = asyncpg.Connection

_log = logging.getLogger(__name__)

#: Generated columns and the catalog queries of the drivers need this version; hosts still offer 13.
OLDEST_SERVER = 130_000
#: Seconds for finding out whether the direct target is behind a pooler.
DIRECT_SECONDS = 3.0
#: Turns what a statement raises into our errors. An OSError about a file, such as the source of a COPY, stays.
_BOUNDARY = translate_errors(files=False)


class Pool:
    """A bounded pool of connections to one database.

    `json` and `jsonb` are Python objects in both directions. A connection is returned without open transactions,
    settings, advisory locks, LISTENs and (after `temp=True`) temporary tables. The `async with` blocks and the verbs
    raise `DatabaseError` or `DatabaseUnavailable`, with the error of the driver as `__cause__`.
    """

    def __init__(
        self,
        target: ConnectTarget,
        *,
        direct: ConnectTarget | None = None,
        pool_min: int = 1,
        pool_max: int = 10,
        connect_timeout: float = 60.0,
        command_timeout: float = 60.0,
        acquire_timeout: float = 30.0,
        idle_seconds: float = 300.0,
        retry_seconds: float = 0.1,
        retry_max_seconds: float = 3.0,
        logs_retries: bool = True,
    ) -> None:
        """Times are in seconds. `direct` bypasses a pooler; None: `target` is direct.

        idle_seconds: a connection idle for so long is closed; 0: never.
        retry_seconds, retry_max_seconds: the first and the longest delay between two attempts of `connect`.
        logs_retries: whether `connect` logs what it waits for.
        """
        #: Where the pool connects. When a pooler answers that the address does not announce, `connect` replaces both by
        #: the same targets with `pooled` set: ask them after `connect`.
        self.target: ConnectTarget = target
        self.direct: ConnectTarget = direct or target
        self.pool_min: int = min(pool_min, pool_max)
        self.pool_max: int = pool_max
        self.connect_timeout: float = connect_timeout
        self.command_timeout: float = command_timeout
        self.acquire_timeout: float = acquire_timeout
        self.idle_seconds: float = idle_seconds
        self.retry_seconds: float = retry_seconds
        self.retry_max_seconds: float = retry_max_seconds
        self.logs_retries: bool = logs_retries
        #: PostgreSQL's version as a number, 180004 for 18.4; 0 before `connect`.
        self.server_version_num: int = 0
        self._pool: AsyncpgPool[Record] | None = None
        self._waiting: int = 0
        self._borrowed: int = 0
        self._created: int = 0
        self._destroyed: int = 0
        #: Who uses the borrowed connections.
        self.holders: Holders = Holders()
        self._is_examined: bool = False
        self._used_temp: set[int] = set()
        #: Backends that ran nothing but a query, so there is nothing to reset.
        self._pure: set[int] = set()
        self._clock: tuple[datetime, float] | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.target} {self.pool_stats()}>"

    @property
    def placement(self) -> Placement:
        """The schemas that our tables are in, found out by `connect`."""
        return self.target.placement or Placement()

    @property
    def is_connected(self) -> bool:
        """Whether the pool is open."""
        return self._pool is not None and not self._pool.is_closing()

    async def connect(self) -> None:
        """Open the pool, retrying for `connect_timeout` seconds while the server is starting or unreachable.

        A pooler that the address does not announce is recognised, and treated as one in transaction mode.
        Raises `DatabaseUnavailable` when the time is up, and `DatabaseError` or `SettingsError` at once for permanent
        errors.
        """
        if self._pool is not None:
            return
        self.target.check_files()
        started = time.monotonic()
        reason = ""
        try:
            async for attempt in stamina.retry_context(
                on=is_transient, attempts=None, timeout=self.connect_timeout,
                wait_initial=self.retry_seconds, wait_max=self.retry_max_seconds, wait_jitter=self.retry_seconds,
            ):  # fmt: skip
                with attempt:
                    remaining = self.connect_timeout - (time.monotonic() - started)
                    try:
                        async with asyncio.timeout(max(0.5, min(ATTEMPT_SECONDS, remaining))):
                            self._pool = await self._open()
                    except Exception as exc:
                        known, reason = reason, str(translate(exc))
                        if is_transient(exc) and reason != known and self.logs_retries:
                            _log.warning(
                                "waiting for the database at %s: %s", self.target, reason,
                                extra={"attempt": attempt.num, "seconds": round(time.monotonic() - started, 1)},
                            )  # fmt: skip
                        raise
        except Exception as exc:
            error = translate(exc)
            if error is None:
                raise
            if not isinstance(error, DatabaseUnavailable):
                raise error from exc
            waited = time.monotonic() - started
            raise DatabaseUnavailable(
                f"{self.target} could not be reached within {waited:.0f} s: {error}. Is the server running, and is the"
                " address right? DB_CONNECT_TIMEOUT sets how long to keep trying.",
                sqlstate=error.sqlstate,
            ) from exc
        try:
            await self._check_version()
        except BaseException:
            await self.close(timeout=5)
            raise

    async def close(self, timeout: float = 10.0) -> None:
        """Close the pool; connections still in use after `timeout` seconds are terminated."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await pool.close()  # terminates the remaining connections when it is cancelled
        except TimeoutError:
            _log.warning("terminated connections still in use after %s s", timeout)
        except DRIVER_ERRORS as exc:
            _log.warning("the pool did not close cleanly: %s", exc)

    @contextlib.asynccontextmanager
    async def acquire(self, timeout: float | None = None, *, temp: bool = False) -> AsyncIterator[Connection]:
        """Yield a connection. `temp`: drop its temporary tables when it is returned.

        Raises `DatabaseUnavailable` when none is free within `timeout` seconds (None: `acquire_timeout`).
        """
        pool = self._connected()
        use = Use(sys._getframe(1))
        conn = await self._borrow(pool, self.acquire_timeout if timeout is None else timeout, use)
        if temp:
            self._used_temp.add(conn.get_server_pid())
        try:
            with _BOUNDARY:
                yield conn
        finally:
            await self._return(pool, conn, use)

    @contextlib.asynccontextmanager
    async def transaction(
        self,
        timeout: float | None = None,
        *,
        temp: bool = False,
        isolation: Literal["read_committed", "repeatable_read", "serializable"] | None = None,
        readonly: bool = False,
    ) -> AsyncIterator[Connection]:
        """Yield a connection in a transaction, which is committed at the end and rolled back by an exception."""
        async with (
            self.acquire(timeout, temp=temp) as conn,
            conn.transaction(isolation=isolation, readonly=readonly),
        ):
            if self.target.pooled:  # a setting of the session would reach other clients of the pooler
                await conn.execute(session_settings(conn, local=True))
            yield conn

    async def run(
        self,
        verb: str,
        query: str,
        args: Sequence[Any],
        timeout: float | None,
        *,
        temp: bool = False,
        is_pure: bool = False,
        use: Use | None = None,
    ) -> Any:
        """Run one statement with a method of `asyncpg.Connection`, such as "fetchrow".

        is_pure: it is a query without side effects, so the connection need not be reset.
        use: who asks, if it is known; it is told when the connection was acquired. None: found.
        """
        pool = self._connected()
        if use is None:
            use = Use(sys._getframe(1))
        conn = await self._borrow(pool, self.acquire_timeout, use)
        if temp:
            self._used_temp.add(conn.get_server_pid())
        try:
            if is_pure or deadline.current.get() is None:
                result = await getattr(conn, verb)(query, *args, timeout=timeout)
            else:
                result = await deadline.run_statement(conn, verb, query, *args, timeout=timeout)
        except Exception as exc:  # every statement comes by, and `with` would cost it two calls
            if (error := _BOUNDARY.translated(exc)) is not exc:
                raise error from exc
            raise
        else:
            if is_pure:
                self._pure.add(conn.get_server_pid())
            return result
        finally:
            await self._return(pool, conn, use)

    def _connected(self) -> AsyncpgPool[Record]:
        if self._pool is None:
            raise DatabaseUnavailable("the pool is not connected: it was closed, or never opened")
        return self._pool

    async def _borrow(self, pool: AsyncpgPool[Record], wait: float, use: Use) -> PoolConnectionProxy[Record]:
        """Return a connection within `wait` seconds."""
        is_free = self._borrowed < self.pool_max  # then acquire() does not wait, and connecting has its own timeout
        self._borrowed += 1
        self._waiting += 1
        try:
            if is_free:
                conn = await pool.acquire()
            else:
                async with asyncio.timeout(wait):  # the timeout argument of acquire() would create a task each time
                    conn = await pool.acquire()
        except BaseException as exc:
            self._borrowed -= 1
            if not isinstance(exc, Exception):
                raise
            raise self._not_acquired(exc, wait) from exc
        finally:
            self._waiting -= 1
            use.begin()
        self.holders.add(use)
        return conn

    async def _return(self, pool: AsyncpgPool[Record], conn: PoolConnectionProxy[Record], use: Use) -> None:
        try:
            await pool.release(conn)
        except DRIVER_ERRORS as exc:  # the pool has closed the connection
            _log.debug("dropped a connection that could not be reset: %s", exc)
        finally:
            self._borrowed -= 1
            self.holders.discard(use)

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows. `timeout` (here and below) is in seconds, None: `command_timeout`."""
        rows: list[Record] = await self.run("fetch", query, args, timeout)
        return rows

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        row: Record | None = await self.run("fetchrow", query, args, timeout)
        return row

    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        """Return the first column of the first row, or None when there is no row."""
        return await self.run("fetchval", query, args, timeout)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement and return the server's command tag, such as `UPDATE 3`."""
        tag: str = await self.run("execute", query, args, timeout)
        return tag

    def _not_acquired(self, exc: Exception, wait: float) -> Exception:
        """Return what to raise when no connection was acquired within `wait` seconds."""
        pool = self._pool
        if isinstance(exc, TimeoutError) and pool is not None:
            in_use = pool.get_size() - pool.get_idle_size()
            return DatabaseUnavailable(
                f"no connection was free or could be made within {wait:g} s ({in_use} of {pool.get_max_size()} in use,"
                f" {self.holders})"
            )
        return translate(exc, was_connected=True) or exc

    async def renew(self) -> None:
        """Replace every connection: after DDL of another session their cached statements would fail once each."""
        if self._pool is not None:
            await self._pool.expire_connections()

    async def check(self, timeout: float = 5.0) -> bool:
        """Return whether the database answers within `timeout` seconds; if so, set `now` by its clock."""
        try:
            async with self.acquire(timeout) as conn:
                await self._set_clock(conn, timeout)
        except DatabaseError as exc:
            _log.warning("the database does not answer: %s", exc)
            return False
        return True

    def now(self) -> datetime:
        """Return the time of the database without asking it, as of `connect` or the last `check` plus the time since.

        Raises `DatabaseUnavailable` before the first `connect`.
        """
        if self._clock is None:
            raise DatabaseUnavailable("the time of the database is unknown before connect()")
        at, measured = self._clock
        return at + timedelta(seconds=time.monotonic() - measured)

    def pool_stats(self) -> dict[str, int]:
        """Return how many connections were created and destroyed so far, are active, idle and allowed.

        `waiting` is how many tasks wait for one.
        """
        pool = self._pool
        size = pool.get_size() if pool is not None else 0
        idle = pool.get_idle_size() if pool is not None else 0
        return {
            "created": self._created, "destroyed": self._destroyed, "active": size - idle, "idle": idle,
            "waiting": self._waiting, "size": size, "max": self.pool_max,
        }  # fmt: skip

    async def validate_connections(self, timeout: float = 5.0) -> dict[str, int]:
        """Close idle connections that do not answer within `timeout` seconds; never raises for a lost database.

        Returns how many were `checked` and how many `replaced`; the pool opens new ones on demand.
        """
        pool = self._pool
        borrowed: list[PoolConnectionProxy[Record]] = []
        if pool is None:
            return {"checked": 0, "replaced": 0}
        try:
            try:
                async with asyncio.timeout(timeout):
                    while pool.get_idle_size() and len(borrowed) < self.pool_max:  # those in use are being tried anyway
                        borrowed.append(await pool.acquire())
            except DRIVER_ERRORS as exc:
                _log.warning("connections could not be checked: %s", translate(exc))
            answered = await asyncio.gather(*(_answers(connection, timeout) for connection in borrowed))
        except BaseException:
            for connection in borrowed:
                with contextlib.suppress(asyncpg.InterfaceError):  # the pool has closed it
                    connection.terminate()
            raise
        released = (pool.release(connection, timeout=timeout) for connection in borrowed)
        await asyncio.gather(*released, return_exceptions=True)
        replaced = answered.count(False)
        if replaced:
            _log.warning("replacing dead connections", extra={"replaced": replaced})
        return {"checked": len(answered), "replaced": replaced}

    async def _open(self) -> AsyncpgPool[Record]:
        if not self._is_examined:
            await self._detect_poolers()
            await self._locate()
            self._is_examined = True
            for note in self.target.notes:
                _log.info(note)
        return await asyncpg.create_pool(
            **self.target.connect_kwargs(),
            min_size=self.pool_min,
            max_size=self.pool_max,
            timeout=ATTEMPT_SECONDS,
            command_timeout=self.command_timeout,
            init=self._set_up,
            reset=self._reset,
            max_inactive_connection_lifetime=self.idle_seconds,
        )

    async def _detect_poolers(self) -> None:
        """Mark targets as pooled if a pooler answers: the backend is then not the one of the start-up handshake."""
        target, direct = self.target, self.direct
        if not (target.pooled or target.is_declared) and await is_behind_pooler(target):
            self.target = target.through_pooler()
            if direct == target:
                self.direct = self.target
        if self.target.pooled and not target.is_declared:
            _log.warning(
                "%s is a pooler: assuming transaction mode, without prepared statements and staging by COPY. Set"
                " DATABASE_UNPOOLED_URL to an address without a pooler, for migrations, backups and notifications of"
                " other processes; with pgbouncer=false in the address sessions are trusted",
                self.target,
            )
        if direct != target and not (direct.pooled or direct.is_declared):
            try:
                async with asyncio.timeout(DIRECT_SECONDS):
                    is_pooled = await is_behind_pooler(direct)
            except (*DRIVER_ERRORS, asyncio.IncompleteReadError) as exc:  # it is not needed yet
                _log.warning("the direct address %s does not answer: %s", direct, translate(exc) or exc)
                return
            if is_pooled:
                self.direct = direct.through_pooler()
                _log.warning("%s, read from %s, is a pooler as well", direct, direct.source or "the settings")

    async def _locate(self) -> None:
        """Find out in which schemas our tables are."""
        target, direct = self.target, self.direct
        self.target = await located(target)
        self.direct = self.target if direct == target else replace(direct, placement=self.target.placement)
        if self.placement != Placement():
            _log.info("tables are in schema %s, those of the bot itself in %s", self.placement.main, self.placement.ops)

    async def _set_up(self, conn: asyncpg.Connection[Record]) -> None:
        self._created += 1
        conn.add_termination_listener(self._count_destroyed)
        await set_codecs(conn)
        if not self.target.pooled:
            await apply_settings(conn)

    def _count_destroyed(self, _: object) -> None:
        self._destroyed += 1

    async def _check_version(self) -> None:
        async with self.acquire() as conn:
            self.server_version_num = int(await conn.fetchval("SELECT current_setting('server_version_num')"))
            encoding = await conn.fetchval("SELECT current_setting('server_encoding')")
            await self._set_clock(conn, self.command_timeout)
        if self.server_version_num < OLDEST_SERVER:
            raise DatabaseError(
                f"PostgreSQL {self.server_version_num // 10_000} at {self.target} is too old: use 13 or newer"
            )
        if encoding != "UTF8":
            raise DatabaseError(
                f"the database at {self.target} has the encoding {encoding}, which cannot hold what Discord sends: use"
                " one made with createdb -E UTF8 -T template0"
            )
        _log.info("connected to %s", self.target, extra={"server_version": self.server_version_num})

    async def _set_clock(self, conn: Connection, timeout: float) -> None:
        asked = time.monotonic()
        at: datetime = await conn.fetchval("SELECT clock_timestamp()", timeout=timeout)
        self._clock = at, (asked + time.monotonic()) / 2

    async def _reset(self, conn: asyncpg.Connection[Record]) -> None:
        """Reset a returned connection; asyncpg has ended its transaction."""
        pid = conn.get_server_pid()
        if pid in self._pure:
            self._pure.discard(pid)
            return
        query = conn.get_reset_query()
        if pid in self._used_temp:
            self._used_temp.discard(pid)
            query += "\nDISCARD TEMP;"
        if not self.target.pooled:
            query += f"\n{session_settings(conn)}"
        await conn.execute(query)


async def _answers(connection: Connection, timeout: float) -> bool:
    """Return whether a connection answers; terminate it if not."""
    try:
        await connection.fetchval("SELECT 1", timeout=timeout)
    except DRIVER_ERRORS:
        with contextlib.suppress(asyncpg.InterfaceError):  # the pool has closed it
            connection.terminate()
        return False
    return True

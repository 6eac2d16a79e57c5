"""The pool of raw asyncpg connections, and the verbs that everything else uses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

import asyncpg
import stamina

from utils.database.codecs import set_codecs
from utils.database.target import ConnectTarget
from utils.exceptions import DatabaseError, DatabaseUnavailable, driver_error, is_transient, translate

if TYPE_CHECKING:
    from asyncpg.pool import Pool as AsyncpgPool
    from asyncpg.pool import PoolConnectionProxy

    Record = asyncpg.Record
    Connection = asyncpg.Connection[Record] | PoolConnectionProxy[Record]
else:
    Record = asyncpg.Record
    Connection = asyncpg.Connection

_log = logging.getLogger(__name__)

#: Generated columns and the drivers' catalogue queries need it; hosts still offer 13.
OLDEST_SERVER = 130_000
#: Seconds that one attempt to connect may take.
ATTEMPT_SECONDS = 10.0
#: What a connection in trouble raises.
_DRIVERS_OWN = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Pool:
    """A bounded pool of connections to one database.

    `jsonb` is Python objects both ways. No connection goes back with an open transaction, changed settings, advisory
    locks, LISTENs or (after `temp=True`) temporary tables. Errors of the driver leave the `async with` blocks and the
    verbs as `DatabaseError` or `DatabaseUnavailable`, with the driver's own as `__cause__`.
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
    ) -> None:
        """Times are seconds; `direct` is the way around a pooler, None when `target` is direct already."""
        self.target: ConnectTarget = target
        self.direct: ConnectTarget = direct or target
        self.pool_min: int = min(pool_min, pool_max)
        self.pool_max: int = pool_max
        self.connect_timeout: float = connect_timeout
        self.command_timeout: float = command_timeout
        self.acquire_timeout: float = acquire_timeout
        #: PostgreSQL's version as a number, 180004 for 18.4; 0 before `connect`.
        self.server_version_num: int = 0
        self._pool: AsyncpgPool[Record] | None = None
        self._waiting: int = 0
        self._lent: int = 0
        self._created: int = 0
        self._used_temp: set[int] = set()
        #: Server processes that did nothing to be cleaned up after.
        self._pure: set[int] = set()
        self._clock: tuple[datetime, float] | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.target} {self.pool_stats()}>"

    @property
    def is_connected(self) -> bool:
        """Whether `connect` has succeeded and `close` was not called."""
        return self._pool is not None and not self._pool.is_closing()

    async def connect(self) -> None:
        """Open the pool, waiting up to `connect_timeout` seconds for a server that is starting or out of reach.

        Raises `DatabaseUnavailable` when the time is up, and `DatabaseError` at once for what waiting cannot mend.
        """
        if self._pool is not None:
            return
        started = time.monotonic()
        try:
            async for attempt in stamina.retry_context(
                on=is_transient, attempts=None, timeout=self.connect_timeout, wait_initial=0.1, wait_max=3.0
            ):
                with attempt:
                    remaining = self.connect_timeout - (time.monotonic() - started)
                    try:
                        async with asyncio.timeout(max(0.5, min(ATTEMPT_SECONDS, remaining))):
                            self._pool = await self._open()
                    except Exception as exc:
                        if is_transient(exc):
                            _log.warning(
                                "waiting for the database at %s: %s", self.target, translate(exc),
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
                " address right? DB_CONNECT_TIMEOUT says how long to keep trying.",
                sqlstate=error.sqlstate,
            ) from exc
        try:
            await self._greet()
        except BaseException:
            await self.close(timeout=5)
            raise

    async def close(self, timeout: float = 10.0) -> None:
        """Close the pool; connections still in use after `timeout` seconds are cut."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await pool.close()  # cuts what is left by itself when it is cancelled
        except TimeoutError:
            _log.warning("connections still in use after %s s were cut", timeout)
        except _DRIVERS_OWN as exc:
            _log.warning("the pool did not close cleanly: %s", exc)

    @contextlib.asynccontextmanager
    async def acquire(self, timeout: float | None = None, *, temp: bool = False) -> AsyncIterator[Connection]:
        """Lend a connection; `temp`: its temporary tables are dropped when it goes back.

        `timeout`: seconds to wait for a free one (None: `acquire_timeout`), then `DatabaseUnavailable`.
        """
        pool = self._connected()
        conn = await self._lend(pool, self.acquire_timeout if timeout is None else timeout)
        if temp:
            self._used_temp.add(conn.get_server_pid())
        try:
            with _translated():
                yield conn
        finally:
            await self._take_back(pool, conn)

    @contextlib.asynccontextmanager
    async def transaction(
        self,
        timeout: float | None = None,
        *,
        temp: bool = False,
        isolation: Literal["read_committed", "repeatable_read", "serializable"] | None = None,
        readonly: bool = False,
    ) -> AsyncIterator[Connection]:
        """Lend a connection inside a transaction: committed at the end, rolled back by any exception."""
        async with (
            self.acquire(timeout, temp=temp) as conn,
            conn.transaction(isolation=isolation, readonly=readonly),
        ):
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
    ) -> Any:
        """Run one statement with a verb of asyncpg's.

        `is_pure`: it reads tables and does nothing else, so that there is nothing to be cleaned up after it.
        """
        pool = self._connected()
        conn = await self._lend(pool, self.acquire_timeout)
        if temp:
            self._used_temp.add(conn.get_server_pid())
        try:
            result = await getattr(conn, verb)(query, *args, timeout=timeout)
        except Exception as exc:
            error = _explained(exc)
            if error is exc:
                raise
            raise error from exc
        else:
            if is_pure:
                self._pure.add(conn.get_server_pid())
            return result
        finally:
            await self._take_back(pool, conn)

    def _connected(self) -> AsyncpgPool[Record]:
        if self._pool is None:
            raise DatabaseUnavailable("the database is not connected: it was closed, or never opened")
        return self._pool

    async def _lend(self, pool: AsyncpgPool[Record], wait: float) -> PoolConnectionProxy[Record]:
        """Lend a connection within `wait` seconds."""
        is_free = self._lent < self.pool_max  # then nobody is waited for, and making a connection has its own bound
        self._lent += 1
        self._waiting += 1
        try:
            if is_free:
                return await pool.acquire()
            async with asyncio.timeout(wait):  # the pool's own makes a task of every acquire
                return await pool.acquire()
        except BaseException as exc:
            self._lent -= 1
            if not isinstance(exc, Exception):
                raise
            raise self._not_lent(exc, wait) from exc
        finally:
            self._waiting -= 1

    async def _take_back(self, pool: AsyncpgPool[Record], conn: PoolConnectionProxy[Record]) -> None:
        try:
            await pool.release(conn)
        except _DRIVERS_OWN as exc:  # the pool has thrown the connection away already
            _log.debug("a connection could not be reset and was dropped: %s", exc)
        finally:
            self._lent -= 1

    async def fetch(self, query: str, *args: Any, timeout: float | None = None) -> list[Record]:
        """Return all rows; `timeout` (here and below) is seconds for the statement, None: `command_timeout`."""
        rows: list[Record] = await self.run("fetch", query, args, timeout)
        return rows

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None) -> Record | None:
        """Return the first row, or None when there is none."""
        row: Record | None = await self.run("fetchrow", query, args, timeout)
        return row

    async def fetchval(self, query: str, *args: Any, timeout: float | None = None) -> Any:
        """Return the first column of the first row, or None when there is none."""
        return await self.run("fetchval", query, args, timeout)

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement and return the server's word for it, like `UPDATE 3`."""
        word: str = await self.run("execute", query, args, timeout)
        return word

    def _not_lent(self, exc: Exception, wait: float) -> Exception:
        """Return what to raise when no connection was lent within `wait` seconds."""
        pool = self._pool
        if isinstance(exc, TimeoutError) and pool is not None:
            in_use = pool.get_size() - pool.get_idle_size()
            return DatabaseUnavailable(
                f"no connection was free or could be made within {wait:g} s ({in_use} of {pool.get_max_size()} in use)"
            )
        return translate(exc, was_connected=True) or exc

    async def renew(self) -> None:
        """Replace every connection: after foreign DDL their cached statements would fail once each."""
        if self._pool is not None:
            await self._pool.expire_connections()

    async def check(self, timeout: float = 5.0) -> bool:
        """Tell whether the database answers within `timeout` seconds, and set `now` by its clock when it does."""
        try:
            async with self.acquire(timeout) as conn:
                await self._set_clock(conn, timeout)
        except DatabaseError as exc:
            _log.warning("the database does not answer: %s", exc)
            return False
        return True

    def now(self) -> datetime:
        """Return the database's time, without asking it: as of `connect` or the last `check`, plus what passed since.

        Raises `DatabaseUnavailable` before the first `connect`.
        """
        if self._clock is None:
            raise DatabaseUnavailable("the database's clock is not known before the first connect()")
        at, measured = self._clock
        return at + timedelta(seconds=time.monotonic() - measured)

    def pool_stats(self) -> dict[str, int]:
        """Return how many connections were created so far, are active, idle and allowed, and how many tasks wait."""
        pool = self._pool
        size = pool.get_size() if pool is not None else 0
        idle = pool.get_idle_size() if pool is not None else 0
        return {
            "created": self._created, "active": size - idle, "idle": idle, "waiting": self._waiting,
            "size": size, "max": self.pool_max,
        }  # fmt: skip

    async def validate_connections(self, timeout: float = 5.0) -> dict[str, int]:
        """Ask every idle connection for an answer within `timeout` seconds, and throw away those that give none.

        Returns how many were `checked` and how many `replaced`: the pool opens new ones when they are needed. A
        database that is gone is no error here.
        """
        pool = self._pool
        lent: list[PoolConnectionProxy[Record]] = []
        if pool is None:
            return {"checked": 0, "replaced": 0}
        try:
            try:
                async with asyncio.timeout(timeout):
                    while pool.get_idle_size() and len(lent) < self.pool_max:  # who is lent already is being tried
                        lent.append(await pool.acquire())
            except _DRIVERS_OWN as exc:
                _log.warning("connections could not be checked: %s", translate(exc))
            answered = await asyncio.gather(*(_answers(connection, timeout) for connection in lent))
        except BaseException:
            for connection in lent:
                with contextlib.suppress(asyncpg.InterfaceError):  # it has been thrown away already
                    connection.terminate()
            raise
        given_back = (pool.release(connection, timeout=timeout) for connection in lent)
        await asyncio.gather(*given_back, return_exceptions=True)
        replaced = answered.count(False)
        if replaced:
            _log.warning("connections were dead: they are replaced", extra={"replaced": replaced})
        return {"checked": len(answered), "replaced": replaced}

    async def _open(self) -> AsyncpgPool[Record]:
        return await asyncpg.create_pool(
            **self.target.connect_kwargs(),
            min_size=self.pool_min,
            max_size=self.pool_max,
            timeout=ATTEMPT_SECONDS,
            command_timeout=self.command_timeout,
            init=self._set_up,
            reset=self._reset,
        )

    async def _set_up(self, conn: asyncpg.Connection[Record]) -> None:
        self._created += 1
        await set_codecs(conn)

    async def _greet(self) -> None:
        async with self.acquire() as conn:
            self.server_version_num = int(await conn.fetchval("SELECT current_setting('server_version_num')"))
            await self._set_clock(conn, self.command_timeout)
        if self.server_version_num < OLDEST_SERVER:
            raise DatabaseError(
                f"PostgreSQL {self.server_version_num // 10_000} at {self.target} is too old: use 13 or newer"
            )
        _log.info("connected to %s", self.target, extra={"server_version": self.server_version_num})

    async def _set_clock(self, conn: Connection, timeout: float) -> None:
        asked = time.monotonic()
        at: datetime = await conn.fetchval("SELECT clock_timestamp()", timeout=timeout)
        self._clock = at, (asked + time.monotonic()) / 2

    async def _reset(self, conn: asyncpg.Connection[Record]) -> None:
        """Clean a connection that goes back; asyncpg has ended its transaction already."""
        pid = conn.get_server_pid()
        if pid in self._pure:
            self._pure.discard(pid)
            return
        query = conn.get_reset_query()
        if pid in self._used_temp:
            self._used_temp.discard(pid)
            query += "\nDISCARD TEMP;"
        await conn.execute(query)


async def _answers(connection: Connection, timeout: float) -> bool:
    """Return whether a connection answers; one that does not is ended."""
    try:
        await connection.fetchval("SELECT 1", timeout=timeout)
    except _DRIVERS_OWN:
        with contextlib.suppress(asyncpg.InterfaceError):  # the pool knows already
            connection.terminate()
        return False
    return True


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what the driver raises into our own errors."""
    try:
        yield
    except Exception as exc:
        error = _explained(exc)
        if error is exc:
            raise
        raise error from exc


def _explained(exc: Exception) -> Exception:
    """Return our own error for one of the driver's; a file that cannot be read stays an OSError."""
    cause = driver_error(exc)
    if cause is None or (isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError)):
        return exc
    return translate(exc) or exc

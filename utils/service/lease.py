"""Which process acts: one row on the database's clock, whose epoch orders all that a process observes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from utils.database import Connection, ConnectTarget, Database
from utils.errors import DatabaseUnavailable, GuildbookError, LeaseLost, translate

_log = logging.getLogger(__name__)

#: One process serves all shards, so one row stands for them.
SHARD = 0
#: Seconds after the last renewal from which others may take the lease.
TTL_SECONDS = 3.0
RENEW_SECONDS = 1.0
#: How often a process that stands by looks.
POLL_SECONDS = 0.5
#: Seconds for one statement, and for one attempt to connect: a renewal has to come round in time.
STEP_SECONDS = 1.5
#: Seconds that the taker waits for transactions of the former holder before it ends them.
PATIENCE_SECONDS = 0.3
#: Seconds between two log lines that say the same.
SAY_SECONDS = 60.0

_SEIZE = """
INSERT INTO ops.leases AS lease (shard, holder, epoch) VALUES ($1, $2, 1)
ON CONFLICT (shard) DO UPDATE SET epoch = lease.epoch + 1, holder = excluded.holder, taken_at = now(), expires_at = NULL
RETURNING epoch
"""
_CHECK = "SELECT epoch FROM ops.leases WHERE shard = $1 FOR KEY SHARE"
_LOOK = "SELECT holder, coalesce(expires_at < clock_timestamp(), true) AS is_free FROM ops.leases WHERE shard = $1"
_FIRST = "INSERT INTO ops.leases (shard, holder, epoch) VALUES ($1, '', 0) ON CONFLICT (shard) DO NOTHING"
#: Waits for every transaction that has checked the former epoch: none of them can commit afterwards.
_LOCK = _LOOK.replace("FROM ops.leases", ", epoch FROM ops.leases") + " FOR UPDATE"
_TAKE = """
UPDATE ops.leases SET holder = $2, epoch = epoch + 1, taken_at = clock_timestamp(),
expires_at = clock_timestamp() + make_interval(secs => $3) WHERE shard = $1 RETURNING epoch
"""
_RENEW = """
UPDATE ops.leases SET expires_at = clock_timestamp() + make_interval(secs => $4)
WHERE shard = $1 AND holder = $2 AND epoch = $3 RETURNING epoch
"""
_RELEASE = "UPDATE ops.leases SET expires_at = NULL WHERE shard = $1 AND holder = $2 AND epoch = $3"
_END_BLOCKERS = "SELECT pid, pg_terminate_backend(pid) AS ended FROM unnest(pg_blocking_pids($1)) AS pid"


def holder() -> str:
    """Return a name for this process that no other one has, good for a directory too."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64]
    return f"{host}_{os.getpid()}_{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Fence:
    """What every writing transaction begins with."""

    holder: str
    epoch: int

    async def check(self, connection: Connection) -> None:
        """Raise `LeaseLost` when another process acts; until the transaction's end nobody can take over."""
        epoch = await connection.fetchval(_CHECK, SHARD)
        if epoch != self.epoch:
            raise LeaseLost(f"another process acts now: the lease's epoch is {epoch}, ours is {self.epoch}")


async def seize(database: Database, name: str) -> Fence:
    """Take the lease at once, whoever holds it: for tests and benchmarks."""
    return Fence(name, await database.fetchval(_SEIZE, SHARD, name))


class Lease:
    """Waits for the lease and keeps it, on connections of its own: a pool in trouble must not cost it.

    `is_dead` tells whether a holder's process has provably ended; whose lease need not expire.
    """

    def __init__(
        self, target: ConnectTarget, name: str, *, is_dead: Callable[[str], bool] = lambda holder: False
    ) -> None:
        self.name: str = name
        #: None before it was won.
        self.fence: Fence | None = None
        #: Set when another process has taken it.
        self.lost: asyncio.Event = asyncio.Event()
        self._target = target
        self._is_dead = is_dead
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._renewing: asyncio.Task[None] | None = None
        #: `time.monotonic()` just before the last renewal that succeeded was sent.
        self._renewed: float | None = None
        self._said: float | None = None

    def __repr__(self) -> str:
        return f"<Lease {self.describe()}>"

    def is_sure(self) -> bool:
        """Whether nobody else can have taken it: by our own clock, counted from before the renewal was sent."""
        held = self.fence is not None and not self.lost.is_set() and self._renewed is not None
        return held and time.monotonic() - (self._renewed or 0.0) < TTL_SECONDS

    def describe(self) -> dict[str, Any]:
        """Return holder, epoch (None in standby), state and the seconds since the last renewal, for people."""
        state = "standby"
        if self.lost.is_set():
            state = "lost"
        elif self.fence is not None:
            state = "active" if self.is_sure() else "unsure"
        since = None if self._renewed is None else round(time.monotonic() - self._renewed, 1)
        return {"state": state, "holder": self.name, "epoch": self.fence and self.fence.epoch, "renewed_ago": since}

    async def wait(self) -> Fence:
        """Stand by until the lease is ours, however long that takes, then keep it until `release` or until it is lost.

        Raises `DatabaseError` for what waiting cannot mend.
        """
        while True:
            try:
                fence = await self._try_to_take()
            except DatabaseUnavailable as error:
                self._say("standing by, the database does not answer: %s", error)
                fence = None
            if fence is not None:
                break
            await asyncio.sleep(POLL_SECONDS)
        self.fence = fence
        self._said = None
        self._renewing = asyncio.create_task(self._keep_renewing(fence), name="lease")
        _log.info("this process acts now", extra={"holder": fence.holder, "epoch": fence.epoch})
        return fence

    def give_up(self) -> None:
        """Take it for lost: a transaction has found another process's epoch."""
        if not self.lost.is_set():
            _log.error("another process has taken over: this one writes nothing more")
            self.lost.set()

    async def release(self, timeout: float) -> None:
        """Give it back, so that a process that stands by takes over at once; never raises."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing}, timeout=timeout)
        fence = self.fence
        try:
            if fence is not None and not self.lost.is_set():
                async with asyncio.timeout(timeout), self._connected() as connection:
                    await connection.execute(_RELEASE, SHARD, fence.holder, fence.epoch)
        except Exception as error:
            _log.warning("the lease could not be given back, it expires in %g s: %s", TTL_SECONDS, _why(error))
        await self._disconnect()

    # --- taking

    async def _try_to_take(self) -> Fence | None:
        try:
            async with self._connected() as connection:
                row = await connection.fetchrow(_LOOK, SHARD)
                if row is None:
                    await connection.execute(_FIRST, SHARD)
                elif not (row["is_free"] or self._is_dead(row["holder"])):
                    self._say("standing by: %s acts", row["holder"])
                    return None
                return await self._take(connection)
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            if isinstance(error, asyncpg.LockNotAvailableError):
                return None  # another taker, or a transaction that may not be ended: the next look tells
            raise translate(error) or error from error

    async def _take(self, connection: asyncpg.Connection[asyncpg.Record]) -> Fence | None:
        """Lock the row against the former holder's transactions, look again, and raise the epoch."""
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{STEP_SECONDS} s'")
            pid = await connection.fetchval("SELECT pg_backend_pid()")
            ending = asyncio.create_task(self._end_blockers(pid))
            try:
                row = await connection.fetchrow(_LOCK, SHARD, timeout=2 * STEP_SECONDS)
            finally:
                ending.cancel()
                await asyncio.wait({ending})
            assert row is not None
            if not (row["is_free"] or self._is_dead(row["holder"])):
                return None
            asked = time.monotonic()
            epoch = await connection.fetchval(_TAKE, SHARD, self.name, TTL_SECONDS)
        self._renewed = asked
        return Fence(self.name, epoch)

    async def _end_blockers(self, pid: int) -> None:
        """End the transactions that keep backend `pid` waiting: their process was stopped or cut off in the middle."""
        await asyncio.sleep(PATIENCE_SECONDS)
        try:
            connection = await self._connect()
        except (OSError, TimeoutError, asyncpg.PostgresError) as error:
            _log.warning("transactions of the former holder could not be ended: %s", _why(error))
            return
        try:
            for row in await connection.fetch(_END_BLOCKERS, pid):
                _log.warning("a transaction of the former holder was ended", extra=dict(row))
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            _log.warning("transactions of the former holder could not be ended: %s", _why(error))
        finally:
            connection.terminate()

    # --- keeping

    async def _keep_renewing(self, fence: Fence) -> None:
        while not self.lost.is_set():
            await asyncio.sleep(RENEW_SECONDS)
            asked = time.monotonic()
            try:
                async with self._connected() as connection:
                    renewed = await connection.fetchval(_RENEW, SHARD, fence.holder, fence.epoch, TTL_SECONDS)
            except Exception as error:
                # Not renewing is not losing: when the database is back, the epoch tells.
                self._say("the lease could not be renewed: %s", _why(error))
                continue
            if renewed is None:
                self.give_up()
            else:
                self._renewed, self._said = asked, None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Lend the connection, made anew when it was lost; an error costs it."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        try:
            yield self._connection
        except BaseException:
            await self._disconnect()
            raise

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        # Through a pooler no statement may count on the one before it: nothing is prepared.
        kwargs = self._target.connect_kwargs() | {"statement_cache_size": 0}
        async with asyncio.timeout(STEP_SECONDS):
            return await asyncpg.connect(**kwargs, timeout=STEP_SECONDS, command_timeout=STEP_SECONDS)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.terminate()

    def _say(self, message: str, *arguments: Any) -> None:
        """Log a line that would come twice a second, once a minute."""
        now = time.monotonic()
        if self._said is None or now - self._said > SAY_SECONDS:
            self._said = now
            _log.warning(message, *arguments)


def _why(error: BaseException) -> BaseException | GuildbookError:
    return translate(error) or error

"""Which process acts: one row on the database's clock, whose epoch orders all that a process observes."""

from __future__ import annotations

import asyncio
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

from utils.database import Connection, ConnectTarget, Pool
from utils.exceptions import DatabaseUnavailable, LeaseLost, translate

_log = logging.getLogger(__name__)

#: One process serves all shards, so one row stands for them.
SHARD = 0
#: Seconds after the last renewal from which others may take the lease.
TTL_SECONDS = 3.0
RENEW_SECONDS = 1.0
#: Seconds without a sign of life after which the process counts as having been stopped: half of what the lease lasts.
SLEPT_SECONDS = 1.5
#: How often a process that stands by looks.
POLL_SECONDS = 0.5
#: Seconds for one statement: a renewal has to come round in time.
STEP_SECONDS = 1.5
#: Seconds for one attempt to connect: with TLS and a password that is half a dozen answers.
CONNECT_SECONDS = 3.0
#: Seconds that the taker waits for the row in one try: enough to end who holds it, by a network that takes its time.
LOCK_SECONDS = 5.0
#: Seconds that the taker waits for transactions of the former holder before it ends them.
PATIENCE_SECONDS = 0.3
#: Seconds between two looks for more of them: PostgreSQL waits for those that hold a row one after the other.
END_SECONDS = 0.02
#: Seconds between two log lines that say the same.
SAY_SECONDS = 60.0

_CHECK = "SELECT holder, epoch FROM ops.leases WHERE shard = $1 FOR KEY SHARE"
_LOOK = "SELECT holder, coalesce(expires_at < clock_timestamp(), true) AS is_free FROM ops.leases WHERE shard = $1"
_FIRST = "INSERT INTO ops.leases (shard, holder, epoch) VALUES ($1, '', 0) ON CONFLICT (shard) DO NOTHING"
#: Waits for every transaction that has checked the former epoch: none of them can commit afterwards. The UPDATE alone
#: would not wait, as it changes no key.
_LOCK = f"{_LOOK} FOR UPDATE"
_SEIZE = """
UPDATE ops.leases SET holder = $2, epoch = epoch + 1, taken_at = clock_timestamp(), expires_at = NULL
WHERE shard = $1 RETURNING epoch
"""
_TAKE = """
UPDATE ops.leases SET holder = $2, epoch = epoch + 1, taken_at = clock_timestamp(),
expires_at = clock_timestamp() + make_interval(secs => $3) WHERE shard = $1 RETURNING epoch
"""
_RENEW = """
UPDATE ops.leases SET expires_at = clock_timestamp() + make_interval(secs => $4)
WHERE shard = $1 AND holder = $2 AND epoch = $3 RETURNING epoch
"""
_PID = "SELECT pg_backend_pid()"
_COMMIT = "COMMIT"
#: By these `pg_stat_activity` shows a taker; the first and the last because its view may be a moment old.
_OF_TAKERS = (_PID, _LOCK, _TAKE, _COMMIT)
_RELEASE = "UPDATE ops.leases SET expires_at = NULL WHERE shard = $1 AND holder = $2"
#: Ends what keeps backend $1 waiting for the row, but neither another taker that is at it (its query is one of $2)
#: unless its process has said nothing for $3 seconds, nor whoever changes the table: a migration.
_END_BLOCKERS = """
SELECT activity.pid, pg_terminate_backend(activity.pid) AS ended
FROM pg_stat_activity AS activity
WHERE activity.pid = ANY(pg_blocking_pids($1))
AND NOT coalesce(activity.query = ANY($2::text[]) AND (activity.state = 'active'
    OR activity.state_change > clock_timestamp() - make_interval(secs => $3)), false)
AND EXISTS (SELECT FROM pg_locks AS wanted
    WHERE wanted.pid = $1 AND NOT wanted.granted AND wanted.locktype <> 'relation')
"""


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
        row = await connection.fetchrow(_CHECK, SHARD)
        # The holder as well: after a failover that lost the last takeover, its epoch is given out once more.
        if row is None or (row["holder"], row["epoch"]) != (self.holder, self.epoch):
            epoch = None if row is None else row["epoch"]
            raise LeaseLost(f"another process acts now: the lease's epoch is {epoch}, ours is {self.epoch}")


async def seize(database: Pool, name: str) -> Fence:
    """Take the lease without waiting until it is free: for tests and benchmarks.

    Transactions that have checked the former epoch are waited for.
    """
    async with database.transaction(isolation="read_committed") as connection:
        await connection.execute(_FIRST, SHARD)
        await connection.execute(_LOCK, SHARD)
        return Fence(name, await connection.fetchval(_SEIZE, SHARD, name))


class Lease:
    """Waits for the lease and keeps it, on connections of its own: a pool in trouble must not cost it.

    `is_dead` tells whether a holder's process has provably ended; whose lease need not expire.
    """

    def __init__(
        self, target: ConnectTarget, name: str, *, is_dead: Callable[[str], bool] = lambda holder: False
    ) -> None:
        self.name: str = name
        #: None before it was won and after it was given back.
        self.fence: Fence | None = None
        #: Set when another process has taken it.
        self.lost: asyncio.Event = asyncio.Event()
        self._target = target
        self._is_dead = is_dead
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._renewing: asyncio.Task[None] | None = None
        #: `time.monotonic()` just before the last renewal that succeeded was sent.
        self._renewed: float | None = None
        self._ticking: asyncio.Task[None] | None = None
        #: `time.monotonic()` of the event loop's last sign of life, and when it was found to have given none for long.
        self._pulse: float = time.monotonic()
        self._woke: float | None = None
        #: Whether the answer to a take is missing: it may be ours.
        self._in_doubt: bool = False
        #: By message, when it was logged last.
        self._said: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Lease {self.describe()}>"

    def is_sure(self) -> bool:
        """Whether nobody else can have taken it: by our own clock, counted from before the renewal was sent."""
        held = self.fence is not None and not self.lost.is_set() and self._renewed is not None
        return held and time.monotonic() - (self._renewed or 0.0) < TTL_SECONDS

    def has_slept(self) -> bool:
        """Whether this process was stopped for a time, and has not asked since whether another one acts now."""
        now = time.monotonic()
        if now - self._pulse > SLEPT_SECONDS:
            self._woke = now
        self._pulse = now
        return self._woke is not None

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
                self._say(logging.WARNING, "standing by, the database does not answer: %s", error)
                fence = None
            if fence is not None:
                break
            await asyncio.sleep(POLL_SECONDS)
        self.fence = fence
        self._said.clear()
        self._pulse = time.monotonic()
        self._renewing = asyncio.create_task(self._keep_renewing(fence), name="lease")
        self._ticking = asyncio.create_task(self._keep_ticking(), name="lease-pulse")
        _log.info("this process acts now", extra={"holder": fence.holder, "epoch": fence.epoch})
        return fence

    def give_up(self) -> None:
        """Take it for lost: a transaction has found another process's epoch."""
        if not self.lost.is_set():
            _log.error("another process has taken over: this one writes nothing more")
            self.lost.set()

    async def release(self, timeout: float) -> None:
        """Give it back within `timeout` seconds, so that a process that stands by takes over at once; never raises."""
        ends_at = time.monotonic() + timeout
        for task in (self._ticking, self._renewing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=timeout)
        is_ours = (self.fence is not None or self._in_doubt) and not self.lost.is_set()
        self.fence, self._in_doubt = None, False
        try:
            if is_ours:
                async with asyncio.timeout(max(0.0, ends_at - time.monotonic())), self._connected() as connection:
                    await connection.execute(_RELEASE, SHARD, self.name)
        except Exception as error:
            _log.warning("the lease could not be given back, it expires in %g s: %s", TTL_SECONDS, _why(error))
        self._disconnect()

    # --- taking

    async def _try_to_take(self) -> Fence | None:
        try:
            async with self._connected() as connection:
                row = await connection.fetchrow(_LOOK, SHARD)
                if row is None:
                    await connection.execute(_FIRST, SHARD)
                elif not self._may_take(row):
                    self._say(logging.INFO, "standing by: %s acts", row["holder"])
                    return None
                return await self._take(connection)
        except asyncpg.LockNotAvailableError:
            self._say(logging.WARNING, "standing by: the lease is free, but somebody keeps its row locked")
            return None
        except Exception as error:
            known = translate(error)
            if known is None:
                raise
            raise known from error

    def _may_take(self, row: asyncpg.Record) -> bool:
        former: str = row["holder"]
        return row["is_free"] or (self._in_doubt and former == self.name) or self._is_dead(former)

    async def _take(self, connection: asyncpg.Connection[asyncpg.Record]) -> Fence | None:
        """Lock the row against the former holder's transactions, look again, and raise the epoch.

        An error leaves the transaction open: it costs the connection, and nothing else ends as surely.
        """
        await connection.execute(
            f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {round(LOCK_SECONDS * 1000)}"
        )
        pid = await connection.fetchval(_PID)
        ending = asyncio.create_task(self._end_blockers(pid), name="lease-blockers")
        try:
            row = await connection.fetchrow(_LOCK, SHARD, timeout=LOCK_SECONDS + STEP_SECONDS)
        finally:
            ending.cancel()
            await asyncio.wait({ending})
        if row is None or not self._may_take(row):
            await connection.execute("ROLLBACK")
            return None
        asked = time.monotonic()
        self._in_doubt = True
        epoch = await connection.fetchval(_TAKE, SHARD, self.name, TTL_SECONDS)
        await connection.execute(_COMMIT)
        self._in_doubt, self._renewed = False, asked
        return Fence(self.name, epoch)

    async def _end_blockers(self, pid: int) -> None:
        """End the transactions that keep backend `pid` waiting: their process was stopped or cut off in the middle."""
        await asyncio.sleep(PATIENCE_SECONDS)
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        try:
            while True:
                try:
                    connection = connection or await self._connect()
                    for row in await connection.fetch(_END_BLOCKERS, pid, _OF_TAKERS, PATIENCE_SECONDS):
                        _log.warning("a transaction of the former holder was ended", extra=dict(row))
                except Exception as error:
                    self._say(logging.WARNING, "a transaction of the former holder is not to be ended: %s", _why(error))
                    if connection is not None and connection.is_closed():
                        connection = None
                await asyncio.sleep(END_SECONDS)
        finally:
            if connection is not None:
                connection.terminate()

    # --- keeping

    async def _keep_renewing(self, fence: Fence) -> None:
        asked = time.monotonic()
        while not self.lost.is_set():
            await asyncio.sleep(max(0.0, asked + RENEW_SECONDS - time.monotonic()))
            asked = time.monotonic()
            try:
                async with self._connected() as connection:
                    renewed = await connection.fetchval(_RENEW, SHARD, fence.holder, fence.epoch, TTL_SECONDS)
            except Exception as error:
                # Not renewing is not losing: when the database is back, the epoch tells.
                self._say(logging.WARNING, "the lease could not be renewed: %s", _why(error))
                continue
            if renewed is None:
                self.give_up()
                continue
            self._renewed = asked
            if self._woke is not None and asked >= self._woke:
                self._woke = None
            if self._said:
                self._said.clear()
                _log.info("the lease is renewed again")

    async def _keep_ticking(self) -> None:
        while not self.lost.is_set():
            self.has_slept()
            await asyncio.sleep(SLEPT_SECONDS / 6)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Lend the connection, made anew when it was lost; an error costs it."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        try:
            yield self._connection
        except BaseException:
            self._disconnect()
            raise

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        # Behind a pooler no statement may count on the one before it: nothing is prepared under a name.
        kwargs = self._target.connect_kwargs() | {"statement_cache_size": 0}
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncpg.connect(**kwargs, timeout=CONNECT_SECONDS, command_timeout=STEP_SECONDS)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _say(self, level: int, message: str, *arguments: Any) -> None:
        """Log a line that would come twice a second, once a minute."""
        now = time.monotonic()
        if now - self._said.get(message, -SAY_SECONDS) >= SAY_SECONDS:
            self._said[message] = now
            _log.log(level, message, *arguments)


def _why(error: BaseException) -> BaseException:
    return translate(error) or error

"""Which process acts: one row on the database's clock, whose epoch orders everything that a process observes.

All SQL on `ops.leases` is in this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg

from utils.database import Connection, ConnectTarget, Pool
from utils.database.placement import Placement
from utils.database.sessions import apply_settings
from utils.exceptions import (
    MISSING_TABLE,
    DatabaseError,
    DatabaseUnavailable,
    GuildbookError,
    LeaseLost,
    translate,
    translate_errors,
)
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

TABLE = "ops.leases"
#: One process serves all shards, so there is one row.
SHARD = 0
#: Seconds that an operator's lease lasts without renewal, and between two renewals.
OPERATOR_TTL_SECONDS, OPERATOR_RENEW_SECONDS = 60.0, 15.0
#: The holder while an operator's command changes what no bot may meanwhile; older versions know this name.
OPERATOR = "db downgrade"
#: The holder after a restore has revoked the lease.
RESTORE = "restore"
#: The largest epoch that the clock gives. A stamp has 23 bits for it (8,388,607 minutes end in December 2040); the rest
#: is left for counting on, also with a clock that is decades ahead.
MAX_CLOCK_EPOCH = 2**23 - 2**17
#: The epoch that follows `{epoch}` and the newest known one, `{known}`. A database that was restored or recreated has
#: lost the epochs handed out since, while their stamps live on in spools; minutes outrank them without a search.
NEXT_EPOCH = (
    "greatest({epoch} + 1, {known} + 1, least(floor(extract(epoch FROM clock_timestamp()"
    f" - timestamptz '2025-01-01 00:00:00+00') / 60), {MAX_CLOCK_EPOCH})::bigint)"
)

_EXISTS = "SELECT to_regclass('ops.leases') IS NOT NULL"
_CHECK = (
    "SELECT holder, epoch, coalesce(expires_at < clock_timestamp(), true) AS is_free"
    " FROM ops.leases WHERE shard = $1 FOR KEY SHARE"
)
_STATE = "SELECT holder, coalesce(expires_at < clock_timestamp(), true) AS is_free FROM ops.leases WHERE shard = $1"
_INSERT = "INSERT INTO ops.leases (shard, holder, epoch) VALUES ($1, '', 0) ON CONFLICT (shard) DO NOTHING"
#: Waits for every transaction that has checked the former epoch, so none of them can commit afterwards. The UPDATE
#: alone would not wait, because it changes no key.
_LOCK = f"{_STATE} FOR UPDATE"
_TAKE = (
    "UPDATE ops.leases SET holder = $2, epoch = "  # noqa: S608
    + NEXT_EPOCH.format(epoch="epoch", known="$4::bigint")
    + """,
taken_at = clock_timestamp(), expires_at = clock_timestamp() + make_interval(secs => $3)
WHERE shard = $1 RETURNING epoch, expires_at
"""
)
#: A row that expires before the time of the last renewal ($5) is from an earlier state of the database.
_RENEW = """
UPDATE ops.leases SET expires_at = clock_timestamp() + make_interval(secs => $4)
WHERE shard = $1 AND holder = $2 AND epoch = $3 AND coalesce(expires_at >= $5, true) RETURNING expires_at
"""
_CURRENT = _CHECK.removesuffix(" FOR KEY SHARE")
_BACKEND_PID = "SELECT pg_backend_pid()"
_COMMIT = "COMMIT"
#: The statements by which `pg_stat_activity` shows a process that takes the lease. It may lag, hence the neighbours.
_TAKING = (_BACKEND_PID, _LOCK, _TAKE, _COMMIT)
_RELEASE = "UPDATE ops.leases SET expires_at = NULL WHERE shard = $1 AND holder = $2"
#: Terminates what blocks backend $1 on the row, except another taker (its query is one of $2) that was active within
#: $3 seconds, and except a session that locks the table: a migration.
_TERMINATE_BLOCKERS = """
SELECT activity.pid, pg_terminate_backend(activity.pid) AS ended
FROM pg_stat_activity AS activity
WHERE activity.pid = ANY(pg_blocking_pids($1))
AND NOT coalesce(activity.query = ANY($2::text[]) AND (activity.state = 'active'
    OR activity.state_change > clock_timestamp() - make_interval(secs => $3)), false)
AND EXISTS (SELECT FROM pg_locks AS awaited
    WHERE awaited.pid = $1 AND NOT awaited.granted AND awaited.locktype <> 'relation')
"""
_ACTING = "SELECT holder FROM ops.leases WHERE expires_at > clock_timestamp() LIMIT 1"
_TAKE_FREE = (
    "INSERT INTO ops.leases AS l (shard, holder, epoch, expires_at) VALUES ($1, $2, "  # noqa: S608
    + NEXT_EPOCH.format(epoch="0", known="0")
    + """, clock_timestamp() + make_interval(secs => $3))
ON CONFLICT (shard) DO UPDATE SET holder = excluded.holder, epoch = greatest(l.epoch + 1, excluded.epoch),
    expires_at = excluded.expires_at
WHERE coalesce(l.expires_at <= clock_timestamp(), true) RETURNING true
"""
)
_EXTEND = "UPDATE ops.leases SET expires_at = clock_timestamp() + make_interval(secs => $2) WHERE holder = $1"
_END = "UPDATE ops.leases SET expires_at = NULL WHERE holder = $1"
_EPOCHS = "SELECT shard, epoch, taken_at FROM ops.leases WHERE epoch > 0"
_LIVE = "SELECT shard FROM ops.leases WHERE expires_at > clock_timestamp()"
_BLOCK = "SELECT FROM ops.leases FOR UPDATE"
_RAISE = "UPDATE ops.leases SET epoch = greatest(epoch, $2) WHERE shard = $1"
_DEPOSE = "UPDATE ops.leases SET holder = $1, epoch = epoch + 1, expires_at = NULL"
_REVIVE = """
UPDATE ops.leases SET expires_at = clock_timestamp() + make_interval(secs => $2)
WHERE shard = ANY($1::int[]) AND expires_at IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class LeaseTimings:
    """How long everything about a lease takes, in seconds."""

    #: From the last renewal until others may take the lease.
    ttl: float = 3.0
    renew_every: float = 1.0
    #: Without a turn of the event loop the process counts as suspended: half of `ttl`.
    suspended: float = 1.5
    #: Between two attempts of a process in standby.
    poll: float = 0.5
    #: For one statement. A renewal must finish in time.
    statement: float = 1.5
    #: For one attempt to connect. TLS and a password take half a dozen round trips.
    connect: float = 3.0
    #: For the row lock in one attempt: enough to terminate its owner over a slow network.
    lock: float = 5.0
    #: For transactions of the former holder before they are terminated.
    grace: float = 0.3
    #: Between two searches for such transactions: PostgreSQL queues those that wait for a row one after another.
    terminate_every: float = 0.02
    #: Between two equal log lines.
    repeat: float = 60.0


DEFAULT_TIMINGS = LeaseTimings()


def holder() -> str:
    """Return a unique name for this process, which is also a valid name of a directory."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:64]
    return f"{host}_{os.getpid()}_{secrets.token_hex(4)}"


async def has_table(where: Pool | Connection) -> bool:
    """Return whether `ops.leases` exists; without it there is no lease to wait for."""
    return bool(await where.fetchval(_EXISTS))


@dataclass(frozen=True, slots=True)
class Fence:
    """The lease as a writing transaction sees it: it must still have this holder and this epoch."""

    holder: str
    epoch: int

    async def check(self, connection: Connection) -> None:
        """Raise `LeaseLost` when the lease is no longer ours. Nobody can take it before the end of the transaction."""
        row = await connection.fetchrow(_CHECK, SHARD)
        # The epoch alone does not do: after a failover that lost the last takeover it is assigned a second time.
        if row is None or (row["holder"], row["epoch"]) != (self.holder, self.epoch):
            raise LeaseLost(self.explain_loss(row))

    def explain_loss(self, row: asyncpg.Record | None) -> str:
        """Return what happened to the lease, from the row of `ops.leases`; None if there is none."""
        if row is None:
            return f"the database was emptied or restored: it has no lease, ours has epoch {self.epoch}"
        holder, epochs = row["holder"], f"the epoch of the lease is {row['epoch']}, ours is {self.epoch}"
        if row["epoch"] < self.epoch or (holder, row["epoch"]) == (self.holder, self.epoch):
            return f"the database went back to an earlier state: {epochs}"
        if holder == RESTORE:
            return f"a restore has revoked it: {epochs}"
        if holder == OPERATOR:
            return f"an operator's command has taken it: {epochs}"
        if row["is_free"]:
            return f"another process took it and has released it ({holder}): {epochs}"
        return f"another process acts now ({holder}): {epochs}"


class Lease:
    """Acquires the lease and renews it, on connections of its own, so that a busy pool cannot cost it.

    `is_dead` returns whether the process of a holder has provably ended; its lease is taken before it expires.
    `newest_epoch` returns the newest epoch known without the database, from spools; it is called in a thread, and the
    epoch taken is greater.
    """

    def __init__(
        self,
        target: ConnectTarget,
        name: str,
        *,
        is_dead: Callable[[str], bool] = lambda holder: False,
        newest_epoch: Callable[[], int] = lambda: 0,
        timings: LeaseTimings = DEFAULT_TIMINGS,
    ) -> None:
        self.name: str = name
        self.timings: LeaseTimings = timings
        #: None before the lease was acquired and after it was released.
        self.fence: Fence | None = None
        #: Set when another process has taken it, when a restore has revoked it, or when the database went back to a
        #: state before it was taken.
        self.lost: asyncio.Event = asyncio.Event()
        #: Set while renewals find no table of leases: the database was recreated. Whoever waits for it decides when to
        #: call `give_up`; until then nothing can be written.
        self.table_missing: asyncio.Event = asyncio.Event()
        self._target = target
        self._is_dead = is_dead
        self._newest_epoch = newest_epoch
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._renewing: asyncio.Task[None] | None = None
        #: `time.monotonic()` just before the last successful renewal was sent.
        self._renewed: float | None = None
        #: When it expires, on the database's clock, as of the last successful renewal.
        self._expires_at: datetime | None = None
        self._ticking: asyncio.Task[None] | None = None
        #: `time.monotonic()` of the last turn of the event loop, and of the turn after the last suspension.
        self._last_tick: float = time.monotonic()
        self._resumed: float | None = None
        #: Whether the answer to a take is missing: the lease may be ours.
        self._in_doubt: bool = False
        #: When each message was last logged.
        self._logged: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Lease {self.describe()}>"

    def is_sure(self) -> bool:
        """Return whether nobody else can have taken it, by the local clock since before the last renewal was sent."""
        held = self.fence is not None and not self.lost.is_set() and self._renewed is not None
        return held and time.monotonic() - (self._renewed or 0.0) < self.timings.ttl

    def was_suspended(self) -> bool:
        """Return whether this process was suspended and has not renewed the lease since."""
        now = time.monotonic()
        if now - self._last_tick > self.timings.suspended:
            self._resumed = now
        self._last_tick = now
        return self._resumed is not None

    def describe(self) -> dict[str, Any]:
        """Return state, holder, epoch (None in standby) and the seconds since the last renewal."""
        state = "standby"
        if self.lost.is_set():
            state = "lost"
        elif self.fence is not None:
            state = "active" if self.is_sure() else "unsure"
        since = None if self._renewed is None else round(time.monotonic() - self._renewed, 1)
        return {"state": state, "holder": self.name, "epoch": self.fence and self.fence.epoch, "renewed_ago": since}

    async def wait(self) -> Fence:
        """Stand by until the lease is ours, then renew it until `release` or until it is lost.

        Raises `DatabaseError` for errors that a later attempt cannot mend.
        """
        # Polled at a fixed interval, without stamina: backing off would delay the takeover.
        while True:
            try:
                fence = await self._try_to_take()
            except DatabaseUnavailable as error:
                self._log_once(logging.WARNING, "standing by, the database does not answer: %s", error)
                fence = None
            if fence is not None:
                break
            await asyncio.sleep(self.timings.poll)
        self.fence = fence
        self._logged.clear()
        self._last_tick = time.monotonic()
        self._renewing = asyncio.create_task(self._keep_renewing(fence), name="lease")
        self._ticking = asyncio.create_task(self._keep_ticking(), name="lease tick")
        _log.info("lease acquired: this process is active", extra={"holder": fence.holder, "epoch": fence.epoch})
        return fence

    def give_up(self, reason: str = "a write was refused") -> None:
        """Mark the lease as lost; it must be taken anew before anything is written."""
        if not self.lost.is_set():
            _log.error("lease lost, this process stops writing: %s", reason)
            self.lost.set()

    async def release(self, timeout: float) -> None:
        """Release it within `timeout` seconds, so that a process in standby takes over at once. Never raises."""
        ends_at = time.monotonic() + timeout
        for task in (self._ticking, self._renewing):
            if task is not None:
                await cancel_and_wait((task,), timeout)
        is_ours = (self.fence is not None or self._in_doubt) and not self.lost.is_set()
        self.fence, self._in_doubt = None, False
        try:
            if is_ours:
                async with asyncio.timeout(max(0.0, ends_at - time.monotonic())), self._connected() as connection:
                    await connection.execute(_RELEASE, SHARD, self.name)
        except Exception as error:
            reason = translate(error) or error
            _log.warning("the lease was not released, it expires in %g s: %s", self.timings.ttl, reason)
        self._disconnect()

    # --- taking

    async def _try_to_take(self) -> Fence | None:
        try:
            with translate_errors(was_connected=True):  # the pool was, so a missing database is being replaced
                async with self._connected() as connection:
                    row = await connection.fetchrow(_STATE, SHARD)
                    if row is None:
                        await connection.execute(_INSERT, SHARD)
                    elif not self._may_take(row):
                        self._log_once(logging.INFO, "standing by: %s is active", row["holder"])
                        return None
                    return await self._take(connection)
        except DatabaseUnavailable as error:
            if error.sqlstate == "55P03":  # lock_not_available
                self._log_once(logging.WARNING, "standing by: the lease is free, but its row is locked")
                return None
            raise

    def _may_take(self, row: asyncpg.Record) -> bool:
        former: str = row["holder"]
        return row["is_free"] or (self._in_doubt and former == self.name) or self._is_dead(former)

    async def _take(self, connection: asyncpg.Connection[asyncpg.Record]) -> Fence | None:
        """Lock the row against transactions of the former holder, check it again, and increment the epoch.

        An error leaves the transaction open; `_connected` then closes the connection, which surely ends it.
        """
        await connection.execute(
            f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = {round(self.timings.lock * 1000)}"
        )
        pid = await connection.fetchval(_BACKEND_PID)
        known = await asyncio.to_thread(self._newest_epoch)
        terminating = asyncio.create_task(self._terminate_blockers(pid), name="lease blockers")
        try:
            row = await connection.fetchrow(_LOCK, SHARD, timeout=self.timings.lock + self.timings.statement)
        finally:
            await cancel_and_wait((terminating,))
        if row is None or not self._may_take(row):
            await connection.execute("ROLLBACK")
            return None
        sent_at = time.monotonic()
        self._in_doubt = True
        taken = await connection.fetchrow(_TAKE, SHARD, self.name, self.timings.ttl, known)
        assert taken is not None, "the row is locked"
        await connection.execute(_COMMIT)
        self._in_doubt, self._renewed, self._expires_at = False, sent_at, taken["expires_at"]
        return Fence(self.name, taken["epoch"])

    async def _terminate_blockers(self, pid: int) -> None:
        """Terminate transactions that block backend `pid`: their process was suspended or cut off in the middle."""
        await asyncio.sleep(self.timings.grace)
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        placement = self._target.placement or Placement()
        taking = [placement.adapt(statement) for statement in _TAKING]
        try:
            while True:
                try:
                    connection = connection or await self._connect()
                    for row in await connection.fetch(_TERMINATE_BLOCKERS, pid, taking, self.timings.grace):
                        _log.warning("terminated a transaction of the former holder", extra=dict(row))
                except Exception as error:
                    self._log_once(
                        logging.WARNING,
                        "a transaction of the former holder cannot be terminated: %s", translate(error) or error,
                    )  # fmt: skip
                    if connection is not None and connection.is_closed():
                        connection = None
                await asyncio.sleep(self.timings.terminate_every)
        finally:
            if connection is not None:
                connection.terminate()

    # --- renewing

    async def _keep_renewing(self, fence: Fence) -> None:
        # Driven by the deadline of the lease, without stamina: a back-off would let it expire.
        sent_at = time.monotonic()
        while not self.lost.is_set():
            await asyncio.sleep(max(0.0, sent_at + self.timings.renew_every - time.monotonic()))
            sent_at = time.monotonic()
            try:
                async with self._connected() as connection:
                    expires_at = await connection.fetchval(
                        _RENEW, SHARD, fence.holder, fence.epoch, self.timings.ttl, self._expires_at
                    )
                    if expires_at is None:
                        self.give_up(fence.explain_loss(await connection.fetchrow(_CURRENT, SHARD)))
                        continue
            except Exception as error:
                # A failed renewal does not mean that the lease is lost: the epoch tells once the database is back.
                known = translate(error)
                self._log_once(logging.WARNING, "the lease could not be renewed: %s", known or error)
                if isinstance(known, DatabaseError) and known.sqlstate in MISSING_TABLE:
                    self.table_missing.set()
                continue
            self._renewed, self._expires_at = sent_at, expires_at
            self.table_missing.clear()
            if self._resumed is not None and sent_at >= self._resumed:
                self._resumed = None
            if self._logged:
                self._logged.clear()
                _log.info("the lease is renewed again")

    async def _keep_ticking(self) -> None:
        while not self.lost.is_set():
            self.was_suspended()
            await asyncio.sleep(self.timings.suspended / 6)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Yield the connection, a new one if it was lost; an error in the block closes it."""
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect()
        try:
            yield self._connection
        except BaseException:
            self._disconnect()
            raise

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        # Behind a pooler two statements may reach different backends, so nothing is prepared under a name.
        kwargs = self._target.connect_kwargs() | {"statement_cache_size": 0}
        async with asyncio.timeout(self.timings.connect):
            connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
                **kwargs, timeout=self.timings.connect, command_timeout=self.timings.statement
            )
            if not self._target.pooled:
                await apply_settings(connection)
            return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _log_once(self, level: int, message: str, *arguments: Any) -> None:
        """Log a message that would be repeated twice a second at most once a minute."""
        now = time.monotonic()
        if now - self._logged.get(message, -self.timings.repeat) >= self.timings.repeat:
            self._logged[message] = now
            _log.log(level, message, *arguments)


# --- operators and restores


@asynccontextmanager
async def hold_as_operator(pool: Pool) -> AsyncIterator[None]:
    """Keep the lease from every bot during the block; without the table there is nothing to keep.

    Raises `GuildbookError` when a bot holds it.
    """
    if not await has_table(pool):
        yield
        return
    acting = await pool.fetchval(_ACTING)
    taken = acting is None and await pool.fetchval(_TAKE_FREE, SHARD, OPERATOR, OPERATOR_TTL_SECONDS)
    if acting == OPERATOR:
        raise GuildbookError("another operator's command uses this database: wait until it is done")
    if not taken:
        raise GuildbookError(
            f"{acting or 'a bot'} acts on this database (it holds the lease): stop the bot, then try again"
        )
    renewing = asyncio.create_task(_keep_extending(pool), name="lease of an operator")
    try:
        yield
    finally:
        await cancel_and_wait((renewing,), 5)
        with contextlib.suppress(DatabaseError):  # a downgrade may have dropped the table; otherwise it expires
            await pool.execute(_END, OPERATOR, timeout=5.0)


async def _keep_extending(pool: Pool) -> None:
    while True:
        await asyncio.sleep(OPERATOR_RENEW_SECONDS)
        with contextlib.suppress(DatabaseError):
            await pool.execute(_EXTEND, OPERATOR, OPERATOR_TTL_SECONDS, timeout=5.0)


async def list_epochs(connection: Connection, table: str = TABLE) -> dict[int, tuple[int, datetime | None]]:
    """Return the epoch of each shard that was ever leased, and when it was last taken.

    table: its name in SQL, for one in which a backup was loaded.
    """
    if not await connection.fetchval(_EXISTS.replace(TABLE, table)):
        return {}
    rows = await connection.fetch(_EPOCHS.replace(TABLE, table))
    return {row["shard"]: (row["epoch"], row["taken_at"]) for row in rows}


def has_diverged(
    live: Mapping[int, tuple[int, datetime | None]], restored: Mapping[int, tuple[int, datetime | None]]
) -> bool:
    """Return whether a live database began anew since a backup: its leases do not continue those of the backup.

    Then the rows that the bot wrote there have lower stamps than those of the backup, and its `ops` lacks earlier
    requests to be forgotten.
    """
    for shard, (epoch, taken_at) in restored.items():
        live_epoch, live_taken_at = live.get(shard, (0, None))
        if live_epoch < epoch or (live_epoch == epoch and live_taken_at != taken_at):
            return True
    return False


async def block_writers(connection: Connection) -> None:
    """Wait for the transactions that hold a lease, and keep new ones waiting until this one ends."""
    if await has_table(connection):
        await connection.execute(_BLOCK)


async def raise_epochs(connection: Connection, epochs: Mapping[int, int]) -> None:
    """Raise the epoch of each shard to at least this one."""
    await connection.executemany(_RAISE, list(epochs.items()))


async def list_live(connection: Connection) -> set[int]:
    """Return the shards whose lease has not expired."""
    if not await has_table(connection):
        return set()
    return {row["shard"] for row in await connection.fetch(_LIVE)}


async def depose(connection: Connection) -> None:
    """Revoke every lease, so that whoever acts finds that its own is lost."""
    await connection.execute(_DEPOSE, RESTORE)


async def revive(connection: Connection, shards: set[int]) -> None:
    """Extend the leases of these shards as if they had just been renewed, unless they were released."""
    await connection.execute(_REVIVE, list(shards), DEFAULT_TIMINGS.ttl)

"""The lease on a real PostgreSQL: acquiring, standing by, and what a former holder can still do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeAlias

import asyncpg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.leases import seize
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError, LeaseLost
from utils.mirror.records.rows import COUNTER_BITS, Stamps
from utils.service import lease as module
from utils.service.lease import SHARD, Fence, Lease, LeaseTimings, holder

#: Nothing here may take longer, in seconds.
PATIENCE = 20.0
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
EXPIRE = "UPDATE ops.leases SET expires_at = clock_timestamp() - interval '1 s'"
WRITE = "INSERT INTO ops.positions (journal, position) VALUES ($1, 1)"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
WRITTEN = "SELECT count(*) FROM ops.positions"


#: Polls and renews often; the lease still lasts long enough not to expire by accident.
QUICK = LeaseTimings(poll=0.02, renew_every=0.05)


class Candidates:
    """Creates leases on one database and releases them after the test."""

    def __init__(self, target: ConnectTarget, timings: LeaseTimings = QUICK) -> None:
        self._target = target
        self.timings = timings
        self._made: list[Lease] = []
        self._waits: set[asyncio.Task[Fence]] = set()

    def new(self, name: str = "", **given: Any) -> Lease:
        lease = Lease(self._target, name or holder(), timings=self.timings, **given)
        self._made.append(lease)
        return lease

    async def acting(self, name: str = "") -> tuple[Lease, Fence]:
        """Acquire a free lease."""
        lease = self.new(name)
        return lease, await asyncio.wait_for(lease.wait(), PATIENCE)

    def waiting(self, lease: Lease) -> asyncio.Task[Fence]:
        """Stand by in a task."""
        task = asyncio.create_task(lease.wait())
        self._waits.add(task)
        return task

    async def end(self) -> None:
        for task in self._waits:
            task.cancel()
        if self._waits:
            await asyncio.wait(self._waits)
        for lease in self._made:
            await lease.release(5)


@pytest.fixture
async def candidates(target: ConnectTarget) -> AsyncIterator[Candidates]:
    made = Candidates(target)
    yield made
    await made.end()


async def expires_at(database: Pool) -> datetime:
    moment = await database.fetchval("SELECT expires_at FROM ops.leases")
    assert isinstance(moment, datetime), "nobody has it"
    return moment


async def renewed_times(database: Pool, times: int) -> None:
    """Wait for this many renewals, during which a process in standby polls several times."""
    query = "SELECT expires_at > $1 FROM ops.leases"
    for _ in range(times):
        before = await expires_at(database)
        await until(lambda since=before: database.fetchval(query, since))  # type: ignore[misc]


async def passes(database: Pool, fence: Fence) -> bool:
    async with database.transaction() as connection:
        try:
            await fence.check(connection)
        except LeaseLost:
            return False
    return True


async def dies(lease: Lease) -> None:
    """Stop renewing without a release, as the end of the process would."""
    assert lease._renewing is not None
    lease._renewing.cancel()
    await asyncio.wait({lease._renewing})


def pid_of(lease: Lease) -> int | None:
    connection = lease._connection
    return None if connection is None or connection.is_closed() else connection.get_server_pid()


async def until_one_waits_for(connections: list[Connection]) -> None:
    """Wait until a session waits for a lock of one of these connections, using the first of them."""
    query = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pg_blocking_pids(pid) && $1::int[])"
    pids = [connection.get_server_pid() for connection in connections]
    await until(lambda: connections[0].fetchval(query, pids))


@asynccontextmanager
async def connected(target: ConnectTarget) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10)
    try:
        yield connection
    finally:
        connection.terminate()


# --- acquiring


async def test_standby_takes_over_after_a_release(database: Pool, candidates: Candidates) -> None:
    candidates.timings = replace(QUICK, ttl=2.0)
    by_task = {candidates.waiting(lease): lease for lease in (candidates.new(), candidates.new())}
    done, pending = await asyncio.wait(by_task, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
    (first,), (second,) = done, pending
    at_first = await expires_at(database)
    await until(lambda: database.fetchval("SELECT clock_timestamp() > $1", at_first))
    await renewed_times(database, 5)
    assert not second.done()
    assert [by_task[task].describe()["state"] for task in (first, second)] == ["active", "standby"]
    await by_task[first].release(5)
    assert (await asyncio.wait_for(second, PATIENCE)).epoch > first.result().epoch
    assert [await passes(database, task.result()) for task in (first, second)] == [False, True]


async def test_standby_takes_over_after_expiry(database: Pool, candidates: Candidates) -> None:
    candidates.timings = replace(QUICK, ttl=0.5)
    lease, fence = await candidates.acting()
    await dies(lease)
    ran_out = await expires_at(database)
    _, taken = await candidates.acting()
    assert taken.epoch > fence.epoch
    assert await database.fetchval("SELECT taken_at FROM ops.leases") >= ran_out
    assert not await passes(database, fence)


async def test_takes_a_dead_holders_lease_but_not_its_successors(
    database: Pool, candidates: Candidates, target: ConnectTarget
) -> None:
    candidates.timings = replace(QUICK, ttl=3600.0)
    lease, fence = await candidates.acting("the-dead")
    await dies(lease)
    late = candidates.new(is_dead=lambda name: name == "the-dead")
    async with connected(target) as other, other.transaction():
        await other.fetchval("SELECT 1 FROM ops.leases FOR NO KEY UPDATE")
        attempt = asyncio.create_task(late._try_to_take())
        await until_one_waits_for([other])
        await other.execute("UPDATE ops.leases SET holder = 'the-living'")
    assert await attempt is None
    await database.execute("UPDATE ops.leases SET holder = 'the-dead'")
    assert (await asyncio.wait_for(late.wait(), PATIENCE)).epoch > fence.epoch


async def test_ignores_the_clock_of_the_host(
    database: Pool, candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_time, off = time.time, ContextVar("off", default=0.0)
    monkeypatch.setattr(time, "time", lambda: true_time() + off.get())
    lease, fence = await candidates.acting()
    for seconds in (300.0, -300.0):
        off.set(seconds)
        task = candidates.waiting(skewed := candidates.new())  # and whatever it starts in turn
        off.set(0.0)
        await renewed_times(database, 5)
        assert not task.done()
        await lease.release(5)
        lease, former, fence = skewed, fence, await asyncio.wait_for(task, PATIENCE)
        assert fence.epoch > former.epoch
        left = "SELECT expires_at - clock_timestamp() BETWEEN interval '0' AND interval '3 s' FROM ops.leases"
        assert await database.fetchval(left)


# --- the former holder


async def test_waits_for_a_transaction_of_the_former_holder(
    database: Pool, candidates: Candidates, target: ConnectTarget
) -> None:
    candidates.timings = replace(QUICK, grace=60.0, statement=20.0)
    lease, fence = await candidates.acting()
    await dies(lease)
    async with connected(target) as former:
        async with former.transaction():
            await fence.check(former)
            await former.execute(WRITE, "a-journal")
            await database.execute(EXPIRE)
            taking = candidates.waiting(candidates.new())
            await until_one_waits_for([former])
            assert not taking.done()
            assert await passes(database, fence), "until the taker has it, the former holder goes on writing"
        assert (await asyncio.wait_for(taking, PATIENCE)).epoch > fence.epoch
    assert await database.fetchval(WRITTEN) == 1, "committed before the epoch was raised"


async def test_a_check_during_a_takeover_fails(candidates: Candidates, target: ConnectTarget, database: Pool) -> None:
    _, fence = await candidates.acting()
    async with connected(target) as taker, connected(target) as former:
        await taker.execute("BEGIN")
        await taker.execute(module._LOCK, SHARD)
        await taker.execute("UPDATE ops.leases SET epoch = epoch + 1, holder = 'another'")
        await former.execute("BEGIN")
        check = asyncio.create_task(fence.check(former))
        await until_one_waits_for([taker])
        await taker.execute("COMMIT")
        with pytest.raises(LeaseLost, match=f"lease is {fence.epoch + 1}, ours is {fence.epoch}"):
            await check


async def test_terminates_stalled_transactions_of_the_former_holder(
    database: Pool, candidates: Candidates, target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    lease, fence = await candidates.acting()
    await dies(lease)
    async with AsyncExitStack() as stack:
        former = [await stack.enter_async_context(connected(target)) for _ in range(5)]
        for number, connection in enumerate(former):
            await connection.execute("BEGIN")
            await fence.check(connection)
            await connection.execute(WRITE, f"journal-{number}")
        await database.execute(EXPIRE)
        attempts = [candidates.new()._try_to_take() for _ in range(3)]
        (taken,) = [each for each in await asyncio.gather(*attempts) if each is not None]
        assert taken.epoch == fence.epoch + 1, "one attempt ends them all"
        ended = {
            record.__dict__["pid"] for record in caplog.records if "terminated a transaction" in record.getMessage()
        }
        assert ended <= {connection.get_server_pid() for connection in former}, "and no other taker"
        for connection in former:
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)):
                await connection.execute("COMMIT")
    assert await database.fetchval(WRITTEN) == 0


async def test_terminates_a_taker_that_froze_with_the_row_locked(candidates: Candidates, target: ConnectTarget) -> None:
    lease, fence = await candidates.acting()
    await lease.release(5)
    async with connected(target) as frozen:
        await frozen.execute("BEGIN")
        await frozen.fetchrow(module._LOCK, SHARD)
        assert (await candidates.acting())[1].epoch > fence.epoch
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)):
            await frozen.execute("COMMIT")


async def test_another_epoch_means_that_the_lease_is_lost(database: Pool, candidates: Candidates) -> None:
    lease, fence = await candidates.acting()
    assert await passes(database, fence)
    other = await seize(database, "another")
    claims = (fence, Fence(fence.holder, other.epoch), other)  # a failover may give an epoch out twice
    assert [await passes(database, claim) for claim in claims] == [False, False, True]
    await until(lease.lost.is_set)
    assert lease.describe()["state"] == "lost"
    assert not lease.is_sure()
    await database.execute("UPDATE ops.leases SET expires_at = 'infinity'")
    await lease.release(5)
    row = await database.fetchrow("SELECT holder, epoch, expires_at IS NULL FROM ops.leases")
    assert row is not None
    assert tuple(row) == ("another", other.epoch, False), "what another holds is not given back"


async def test_an_expired_lease_that_nobody_took_is_kept(
    database: Pool, candidates: Candidates, target: ConnectTarget
) -> None:
    candidates.timings = replace(QUICK, ttl=0.5, statement=0.2)
    lease, fence = await candidates.acting()
    async with connected(target) as other, other.transaction():
        await other.execute("SELECT 1 FROM ops.leases FOR UPDATE")
        await until(lambda: not lease.is_sure())
        await until(lambda: other.fetchval("SELECT clock_timestamp() > expires_at FROM ops.leases"))
        assert lease.describe()["state"] == "unsure"
        assert not lease.lost.is_set()
    await until(lease.is_sure)
    assert await passes(database, fence)


async def test_survives_the_loss_of_connections(database: Pool, candidates: Candidates) -> None:
    lease, fence = await candidates.acting()
    other = candidates.new()
    taking = candidates.waiting(other)
    for _ in range(3):
        await until(lambda: pid_of(lease) and pid_of(other))
        pids = pid_of(lease), pid_of(other)
        await database.execute("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid", pids)
        await until(lambda ended=pids: not {pid_of(lease), pid_of(other)} & {None, *ended})  # type: ignore[misc]
        await renewed_times(database, 2)
    assert lease.is_sure()
    assert not taking.done()
    async with database.transaction() as connection:
        await fence.check(connection)
        await renewed_times(database, 2)  # which does not wait for a transaction that has checked
    await lease.release(5)
    assert (await asyncio.wait_for(taking, PATIENCE)).epoch > fence.epoch


async def test_release_never_raises(candidates: Candidates, server: EmbeddedServer, target: ConnectTarget) -> None:
    lease, _ = await candidates.acting()
    async with connected(target) as other, other.transaction():
        await other.execute("SELECT 1 FROM ops.leases FOR UPDATE")
        await until_one_waits_for([other])
        await asyncio.wait_for(lease.release(0.1), PATIENCE)
        await other.execute(EXPIRE)
    lease, _ = await candidates.acting()
    async with connected(server.target("postgres")) as admin:
        await admin.execute(f"DROP DATABASE {target.connect_kwargs()['database']} WITH (FORCE)")
    await lease.release(5)


async def test_a_missing_table_ends_the_wait(empty_target: ConnectTarget) -> None:
    with pytest.raises(DatabaseError, match="42P01"):
        await asyncio.wait_for(Lease(empty_target, holder()).wait(), PATIENCE)


# --- what a lost lease says

ACTS = "UPDATE ops.leases SET holder = '{}', epoch = epoch + 1, expires_at = clock_timestamp() + interval '1 min'"
RELEASED = "UPDATE ops.leases SET holder = 'other', epoch = epoch + 1, expires_at = NULL"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DELETE FROM ops.leases", "the database was emptied or restored: it has no lease"),
        ("UPDATE ops.leases SET epoch = epoch - 1", "the database went back to an earlier state"),
        (ACTS.format("other"), "another process acts now (other)"),
        (RELEASED, "another process took it and has released it (other)"),
        (ACTS.format(module.OPERATOR), "an operator's command has taken it"),
        (None, "a restore has revoked it"),
    ],
)
async def test_lost_lease_says_what_happened(database: Pool, change: str | None, reason: str) -> None:
    fence = await seize(database, "ours")
    async with database.acquire() as connection:
        await fence.check(connection)
        if change is None:
            await module.depose(connection)
        else:
            await connection.execute(change)
        with pytest.raises(LeaseLost) as caught:
            await fence.check(connection)
    assert str(caught.value).startswith(reason)


# --- databases that went back


async def test_the_epoch_is_the_minutes_on_the_databases_clock(database: Pool, candidates: Candidates) -> None:
    minutes = "SELECT floor(extract(epoch FROM clock_timestamp() - timestamptz '2025-01-01 00:00+00') / 60)::bigint"
    before = await database.fetchval(minutes)
    _, fence = await candidates.acting()
    assert before <= fence.epoch <= await database.fetchval(minutes)


async def test_the_epoch_grows_although_the_clock_stands_still(database: Pool, candidates: Candidates) -> None:
    _, first = await candidates.acting()
    await database.execute("UPDATE ops.leases SET epoch = epoch + 1000, expires_at = NULL")
    _, second = await candidates.acting()
    assert second.epoch == first.epoch + 1001


async def test_the_epoch_exceeds_that_of_a_spool(database: Pool, candidates: Candidates) -> None:
    known = (await candidates.acting())[1].epoch + 5_000
    await database.execute(EXPIRE)
    lease = candidates.new(newest_epoch=lambda: known)
    assert (await asyncio.wait_for(lease.wait(), PATIENCE)).epoch == known + 1


async def test_the_epochs_of_a_clock_far_ahead_still_fit_into_a_stamp() -> None:
    assert module.MAX_CLOCK_EPOCH < 1 << (63 - COUNTER_BITS)
    Stamps(module.MAX_CLOCK_EPOCH + 100_000)


async def test_an_operators_epoch_comes_from_the_clock_too(database: Pool, candidates: Candidates) -> None:
    lease, fence = await candidates.acting()
    await lease.release(5)
    await database.execute("DELETE FROM ops.leases")  # recreated empty
    async with module.hold_as_operator(database):
        assert await database.fetchval("SELECT epoch FROM ops.leases") >= fence.epoch


@pytest.mark.parametrize(
    "restore",
    [
        "UPDATE ops.leases SET holder = 'former', epoch = epoch - 7",
        "UPDATE ops.leases SET expires_at = expires_at - interval '1 s'",  # a snapshot of this very lease
        "DELETE FROM ops.leases",
    ],
    ids=["older-epoch", "same-epoch", "no-row"],
)
async def test_the_lease_is_lost_when_the_database_went_back(
    database: Pool, candidates: Candidates, caplog: pytest.LogCaptureFixture, restore: str
) -> None:
    lease, fence = await candidates.acting()
    await database.execute(restore)
    await until(lease.lost.is_set)
    assert any(word in caplog.text for word in ("an earlier state", "emptied or restored"))
    await database.execute("UPDATE ops.leases SET expires_at = NULL")
    assert (await candidates.acting())[1].epoch >= fence.epoch


async def test_the_lease_is_not_lost_when_its_table_is_missing(database: Pool, candidates: Candidates) -> None:
    lease, _ = await candidates.acting()
    await database.execute("ALTER TABLE ops.leases RENAME TO others")
    await until(lease.table_missing.is_set)
    assert not lease.lost.is_set()


# --- any order of events

KINDS = st.sampled_from(["take", "take", "renew", "release", "seize", "expire"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 2)), min_size=1, max_size=20)


@examples(25)
@example(steps=[("take", 0), ("expire", 0), ("take", 1), ("release", 0), ("take", 2)])
@given(steps=STEPS)
async def test_one_epoch_passes_and_epochs_only_grow(
    database: Pool, target: ConnectTarget, steps: list[tuple[str, int]]
) -> None:
    """Against a model of three lines: whose epoch it is, whether it is free, and every fence ever won."""
    await database.execute("DELETE FROM ops.leases")
    timings = LeaseTimings(ttl=3600.0)  # a step makes it expire
    leases = [Lease(target, f"holder-{number}", timings=timings) for number in range(3)]
    fences: list[Fence] = []
    is_free = True
    for step, number in steps:
        lease = leases[number]
        is_current = bool(fences) and lease.fence is fences[-1]
        if step == "take":
            fence = await lease._try_to_take()
            assert (fence is not None) == is_free
            is_free = False
            lease.fence = fence or lease.fence
            fences += [fence] if fence is not None else []
        elif step == "seize":
            lease.fence = await seize(database, lease.name)
            fences.append(lease.fence)
            is_free = True
        elif step == "renew" and fences:
            whose = fences[number - 3 :][0]  # an older one of the same holder, too
            row = await database.fetchval(module._RENEW, SHARD, whose.holder, whose.epoch, 3600.0, LONG_AGO)
            assert (row is not None) == (whose is fences[-1])
            is_free = is_free and row is None
        elif step == "release":
            await lease.release(5)
            is_free = is_free or is_current
        elif step == "expire":
            await database.execute(EXPIRE)
            is_free = True
        epochs = [fence.epoch for fence in fences]
        assert epochs == sorted(set(epochs))
        assert [fence for fence in fences if await passes(database, fence)] == fences[-1:]
    for lease in leases:
        await lease.release(5)


async def test_is_unsure_after_a_suspension_until_renewed(database: Pool) -> None:
    lease = Lease(database.target, holder())
    await lease.wait()
    try:
        assert not lease.was_suspended()
        lease._last_tick -= 60  # as if the process had been stopped for so long
        assert lease.was_suspended()
        await until(lambda: not lease.was_suspended())
        assert lease.is_sure()
    finally:
        await lease.release(5)

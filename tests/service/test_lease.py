"""The lease on a real PostgreSQL: who acts, who waits, and what a former holder can still do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, TypeAlias

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError, LeaseLost
from utils.service import lease as module
from utils.service.lease import SHARD, Fence, Lease, holder, seize

#: Nothing here may take longer, in seconds.
PATIENCE = 20.0
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
EXPIRE = "UPDATE ops.leases SET expires_at = clock_timestamp() - interval '1 s'"
WRITE = "INSERT INTO ops.positions (journal, position) VALUES ($1, 1)"
WRITTEN = "SELECT count(*) FROM ops.positions"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and renewals that come often; a lease still lasts long enough not to run out by accident."""
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.05)


class Candidates:
    """Makes leases on one database and lets go of them after the test."""

    def __init__(self, target: ConnectTarget) -> None:
        self._target = target
        self._made: list[Lease] = []
        self._waits: set[asyncio.Task[Fence]] = set()

    def new(self, name: str = "", **given: Any) -> Lease:
        lease = Lease(self._target, name or holder(), **given)
        self._made.append(lease)
        return lease

    async def acting(self, name: str = "") -> tuple[Lease, Fence]:
        """Return a lease that was free to take."""
        lease = self.new(name)
        return lease, await asyncio.wait_for(lease.wait(), PATIENCE)

    def waiting(self, lease: Lease) -> asyncio.Task[Fence]:
        """Let a lease stand by."""
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
    """Wait until the row's expiry has moved on so often: whoever stands by has looked several times meanwhile."""
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
    """End a holder's renewals without giving the lease back, as the end of its process would."""
    assert lease._renewing is not None
    lease._renewing.cancel()
    await asyncio.wait({lease._renewing})


def pid_of(lease: Lease) -> int | None:
    connection = lease._connection
    return None if connection is None or connection.is_closed() else connection.get_server_pid()


async def until_one_waits_for(connections: list[Connection]) -> None:
    """Wait until somebody waits for a lock that one of these connections holds; the first of them is asked."""
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


# --- who acts


async def test_of_two_one_wins_and_renews_and_the_other_follows_its_release(
    database: Pool, candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TTL_SECONDS", 2.0)
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


async def test_a_holder_that_ends_without_release_is_followed_when_its_lease_has_run_out(
    database: Pool, candidates: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TTL_SECONDS", 0.5)
    lease, fence = await candidates.acting()
    await dies(lease)
    ran_out = await expires_at(database)
    _, taken = await candidates.acting()
    assert taken.epoch > fence.epoch
    assert await database.fetchval("SELECT taken_at FROM ops.leases") >= ran_out
    assert not await passes(database, fence)


async def test_who_is_provably_dead_is_not_waited_for_but_who_has_just_followed_is(
    database: Pool, candidates: Candidates, target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TTL_SECONDS", 3600.0)
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


async def test_a_host_whose_clock_is_five_minutes_off_changes_nothing(
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


# --- what the former holder can still do


async def test_an_open_transaction_of_the_former_holder_is_waited_for(
    database: Pool, candidates: Candidates, target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(module, "STEP_SECONDS", 20.0)
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


async def test_a_check_that_comes_while_the_lease_changes_hands_fails(
    candidates: Candidates, target: ConnectTarget, database: Pool
) -> None:
    _, fence = await candidates.acting()
    async with connected(target) as taker, connected(target) as former:
        await taker.execute("BEGIN")
        await taker.execute(module._LOCK, SHARD)
        await taker.execute("UPDATE ops.leases SET epoch = epoch + 1, holder = 'another'")
        await former.execute("BEGIN")
        check = asyncio.create_task(fence.check(former))
        await until_one_waits_for([taker])
        await taker.execute("COMMIT")
        with pytest.raises(LeaseLost, match=f"epoch is {fence.epoch + 1}, ours is {fence.epoch}"):
            await check


async def test_stalled_transactions_of_the_former_holder_are_all_ended_and_none_can_commit(
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
        ended = {record.__dict__["pid"] for record in caplog.records if "was ended" in record.getMessage()}
        assert ended <= {connection.get_server_pid() for connection in former}, "and no other taker"
        for connection in former:
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)):
                await connection.execute("COMMIT")
    assert await database.fetchval(WRITTEN) == 0


async def test_a_taker_that_froze_with_the_row_locked_is_ended(candidates: Candidates, target: ConnectTarget) -> None:
    lease, fence = await candidates.acting()
    await lease.release(5)
    async with connected(target) as frozen:
        await frozen.execute("BEGIN")
        await frozen.fetchrow(module._LOCK, SHARD)
        assert (await candidates.acting())[1].epoch > fence.epoch
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)):
            await frozen.execute("COMMIT")


async def test_a_holder_that_finds_another_epoch_has_lost_it(database: Pool, candidates: Candidates) -> None:
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


async def test_renewals_refused_for_longer_than_the_lease_lasts_do_not_cost_it_when_nobody_takes_it(
    database: Pool, candidates: Candidates, target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TTL_SECONDS", 0.5)
    monkeypatch.setattr(module, "STEP_SECONDS", 0.2)
    lease, fence = await candidates.acting()
    async with connected(target) as other, other.transaction():
        await other.execute("SELECT 1 FROM ops.leases FOR UPDATE")
        await until(lambda: not lease.is_sure())
        await until(lambda: other.fetchval("SELECT clock_timestamp() > expires_at FROM ops.leases"))
        assert lease.describe()["state"] == "unsure"
        assert not lease.lost.is_set()
    await until(lease.is_sure)
    assert await passes(database, fence)


async def test_who_acts_and_who_stands_by_survive_the_end_of_their_connections(
    database: Pool, candidates: Candidates
) -> None:
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


async def test_release_never_raises_with_the_row_locked_or_the_database_gone(
    candidates: Candidates, server: EmbeddedServer, target: ConnectTarget
) -> None:
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


async def test_what_waiting_cannot_mend_ends_the_wait(empty_target: ConnectTarget) -> None:
    with pytest.raises(DatabaseError, match="42P01"):
        await asyncio.wait_for(Lease(empty_target, holder()).wait(), PATIENCE)


# --- whatever happens in whatever order

KINDS = st.sampled_from(["take", "take", "renew", "release", "seize", "expire"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 2)), min_size=1, max_size=20)


@settings(max_examples=25)
@example(steps=[("take", 0), ("expire", 0), ("take", 1), ("release", 0), ("take", 2)])
@given(steps=STEPS)
async def test_in_whatever_order_things_happen_one_epoch_passes_and_epochs_only_grow(
    database: Pool, target: ConnectTarget, steps: list[tuple[str, int]]
) -> None:
    """Against a model of three lines: whose epoch it is, whether it is free, and every fence ever won."""
    await database.execute("DELETE FROM ops.leases")
    leases = [Lease(target, f"holder-{number}") for number in range(3)]
    fences: list[Fence] = []
    is_free = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TTL_SECONDS", 3600.0)  # it runs out when a step says so
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
                row = await database.fetchval(module._RENEW, SHARD, whose.holder, whose.epoch, 3600.0)
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

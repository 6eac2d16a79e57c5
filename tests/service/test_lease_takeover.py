"""Failures in the middle of a takeover, on a real PostgreSQL and through a network that fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, TypeAlias

import asyncpg
import pytest

from simulator.proxy import Proxy
from tests.leases import seize
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.embedded import PORT
from utils.exceptions import DRIVER_ERRORS, LeaseLost
from utils.service.lease import Fence, Lease, LeaseTimings, holder

#: Nothing here may take longer, in seconds.
PATIENCE = 20.0
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
#: What a connection raises that the server has terminated or is about to.
ENDED = DRIVER_ERRORS


#: Polls and renews often.
QUICK = LeaseTimings(poll=0.02, renew_every=0.05)


@contextlib.asynccontextmanager
async def standing_by(lease: Lease) -> AsyncIterator[asyncio.Task[Fence]]:
    """Stand by in a task, and release the lease afterwards."""
    task = asyncio.create_task(lease.wait())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        await lease.release(5)


@contextlib.asynccontextmanager
async def connected(target: ConnectTarget) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10)
    try:
        yield connection
    finally:
        connection.terminate()


async def won(task: asyncio.Task[Fence]) -> Fence:
    async with asyncio.timeout(PATIENCE):
        return await task


async def renewed_times(database: Pool, times: int) -> None:
    query = "SELECT expires_at > $1 FROM ops.leases"
    for _ in range(times):
        before = await database.fetchval("SELECT expires_at FROM ops.leases")
        await until(lambda since=before: database.fetchval(query, since))  # type: ignore[misc]


async def waits_for(connection: Connection) -> bool:
    query = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid)))"
    return bool(await connection.fetchval(query))


def through(proxy: Proxy, target: ConnectTarget) -> ConnectTarget:
    return replace(target, hosts=("127.0.0.1",), ports=(proxy.port,))


def upstream(target: ConnectTarget) -> str:
    return f"{target.hosts[0]}/.s.PGSQL.{PORT}"


async def test_seizing_waits_for_an_open_transaction(database: Pool, target: ConnectTarget) -> None:
    fence = await seize(database, "one")
    async with connected(target) as former:
        async with former.transaction():
            await fence.check(former)
            seizing = asyncio.create_task(seize(database, "two"))
            await until(lambda: waits_for(former))
        assert (await won(seizing)).epoch == fence.epoch + 1


async def test_an_epoch_assigned_twice_passes_for_one_holder(database: Pool) -> None:
    fence = await seize(database, "one")
    await database.execute("UPDATE ops.leases SET holder = 'two'")
    async with database.transaction() as connection:
        await Fence("two", fence.epoch).check(connection)
        with pytest.raises(LeaseLost):
            await fence.check(connection)


async def test_takers_do_not_terminate_one_another(
    database: Pool, target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    fence = await seize(database, "the-former")
    leases = [Lease(target, holder(), timings=QUICK) for _ in range(3)]
    async with connected(target) as former, contextlib.AsyncExitStack() as stack:
        await former.execute("BEGIN")
        await fence.check(former)
        pid = former.get_server_pid()
        tasks = [await stack.enter_async_context(standing_by(lease)) for lease in leases]
        async with asyncio.timeout(PATIENCE):
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), len(pending)) == (1, 2)
        assert done.pop().result().epoch == fence.epoch + 1
        with pytest.raises(ENDED):
            await former.execute("COMMIT")
    # The winner may have had the row before it learnt that it had terminated a session.
    ended = {vars(record)["pid"] for record in caplog.records if "terminated a transaction" in record.getMessage()}
    assert ended <= {pid}


async def test_waits_for_a_lock_on_the_whole_table(
    database: Pool, target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    fence = await seize(database, "the-former")
    lease = Lease(target, holder(), timings=replace(QUICK, grace=0.0, lock=0.3))
    async with connected(target) as migration, standing_by(lease) as task:
        async with migration.transaction():
            await migration.execute("LOCK TABLE ops.leases IN EXCLUSIVE MODE")

            async def is_told() -> bool:
                return any("its row is locked" in record.getMessage() for record in caplog.records)

            await until(is_told)
            assert not task.done()
        assert (await won(task)).epoch == fence.epoch + 1


async def test_waits_for_a_transaction_that_it_may_not_terminate(
    database: Pool, target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    fence = await seize(database, "the-former")
    role = f"somebody_{target.database}"
    await database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        await database.execute(f"GRANT USAGE ON SCHEMA ops TO {role}")
        await database.execute(f"GRANT SELECT, INSERT, UPDATE ON ops.leases TO {role}")
        lease = Lease(replace(target, user=role), holder(), timings=QUICK)
        async with connected(target) as former:
            await former.execute("BEGIN")
            await fence.check(former)  # as a superuser
            async with standing_by(lease) as task:

                async def is_told() -> bool:
                    return any("cannot be terminated" in record.getMessage() for record in caplog.records)

                await until(is_told)
                assert not task.done()
                await former.execute("COMMIT")
                assert (await won(task)).epoch == fence.epoch + 1
        assert sum("cannot be terminated" in record.getMessage() for record in caplog.records) == 1, "told once"
    finally:
        await database.execute(f"DROP OWNED BY {role}")
        await database.execute(f"DROP ROLE {role}")


class Unanswered:
    """A connection that loses the answer to a COMMIT."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def execute(self, query: str, *arguments: Any) -> str:
        done = await self._connection.execute(query, *arguments)
        if query == "COMMIT":
            raise ConnectionResetError(104, "Connection reset by peer")
        return done


@contextlib.asynccontextmanager
async def whose_take_went_unanswered(target: ConnectTarget, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lease]:
    lease = Lease(target, holder(), timings=replace(QUICK, ttl=3600.0))
    connect, commits = lease._connect, 0

    async def once_unanswered() -> Any:
        nonlocal commits
        commits += 1
        return Unanswered(await connect()) if commits == 1 else await connect()

    monkeypatch.setattr(lease, "_connect", once_unanswered)
    try:
        yield lease
    finally:
        await lease.release(5)


async def test_retakes_at_once_after_a_lost_answer(
    database: Pool, target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with whose_take_went_unanswered(target, monkeypatch) as lease, asyncio.timeout(PATIENCE):
        minutes = "floor(extract(epoch FROM clock_timestamp() - timestamptz '2025-01-01 00:00+00') / 60)::bigint"
        before = await database.fetchval(f"SELECT {minutes}")
        fence = await lease.wait()
        assert fence.epoch > before, "the first one is given up: nobody has acted by it"
        async with database.transaction() as connection:
            await fence.check(connection)


async def test_releases_after_a_lost_answer(
    database: Pool, target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with whose_take_went_unanswered(target, monkeypatch) as lease:
        with pytest.raises(Exception, match="reset"):
            await lease._try_to_take()
        assert not await database.fetchval("SELECT expires_at IS NULL FROM ops.leases")
    assert await database.fetchval("SELECT expires_at IS NULL FROM ops.leases")


async def test_a_released_lease_is_not_held(database: Pool, target: ConnectTarget) -> None:
    lease = Lease(target, holder(), timings=QUICK)
    await lease.wait()
    assert lease.is_sure()
    await lease.release(5)
    assert not lease.is_sure()
    assert (lease.fence, lease.describe()["state"]) == (None, "standby")


@pytest.mark.parametrize("how", ["reset", "silent"])
async def test_a_holder_that_was_cut_off_finds_the_lease_lost(database: Pool, target: ConnectTarget, how: str) -> None:
    """Its open transaction was terminated by the taker and cannot be committed."""
    timings = replace(QUICK, ttl=0.5, statement=0.5, connect=0.5)
    async with Proxy(upstream(target)) as network:
        cut_off = Lease(through(network, target), holder(), timings=timings)
        fence = await cut_off.wait()
        async with connected(through(network, target)) as writer:
            await writer.execute("BEGIN")
            await fence.check(writer)
            await writer.execute("INSERT INTO ops.positions (journal, position) VALUES ('a-journal', 1)")
            (network.cut if how == "reset" else network.freeze)()
            other = Lease(target, holder(), timings=timings)
            async with standing_by(other) as task:
                taken = await won(task)
                assert taken.epoch == fence.epoch + 1
                assert not cut_off.lost.is_set(), "it cannot know"
                await until(lambda: is_unsure(cut_off))
                network.heal()
                async with asyncio.timeout(PATIENCE):
                    await cut_off.lost.wait()
                with pytest.raises(ENDED):
                    await writer.execute("COMMIT")
                assert await database.fetchval("SELECT count(*) FROM ops.positions") == 0
                await cut_off.release(5)
                async with database.transaction() as connection:
                    await taken.check(connection)
                assert other.is_sure()


async def is_unsure(lease: Lease) -> bool:
    return bool(lease.describe()["state"] == "unsure")


async def test_works_over_a_slow_network(database: Pool, target: ConnectTarget) -> None:
    """Even when a transaction must be terminated first."""
    fence = await seize(database, "the-former")
    async with connected(target) as former, Proxy(upstream(target), latency=0.1) as network:
        await former.execute("BEGIN")
        await fence.check(former)
        lease = Lease(through(network, target), holder(), timings=QUICK)
        async with standing_by(lease) as task:
            taken = await won(task)
            await renewed_times(database, 2)
            assert lease.is_sure()
            async with database.transaction() as connection:
                await taken.check(connection)


async def test_standby_logs_the_active_holder_once(
    database: Pool, target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    acting = Lease(target, "the-one-that-acts", timings=QUICK)
    await acting.wait()
    async with standing_by(Lease(target, holder(), timings=QUICK)):
        await renewed_times(database, 5)
        await acting.release(5)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("standing by")]
    assert lines == ["standing by: the-one-that-acts is active"]

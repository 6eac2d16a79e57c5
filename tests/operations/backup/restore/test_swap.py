"""Two databases are swapped completely or not at all, with the newest rows of `ops`, under open sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from tests.conftest import cloned
from tests.operations.backup.helpers import (
    connect,
    dropping_scratch_databases,
    execute,
    fetchval,
    scratch_databases,
    until_query,
)
from utils.database import ConnectTarget
from utils.database.embedded import EmbeddedServer
from utils.database.placement import Placement
from utils.exceptions import BackupError
from utils.operations import migrations
from utils.operations.backup.restore.swap import SwapResult, swap
from utils.operations.backup.scratch import databases
from utils.operations.backup.scratch.locks import new_suffix

INSERT_DEAD_LETTERS = (
    "INSERT INTO ops.dead_letters (table_name, key, payload, stamp, error) SELECT 'guilds',"
    " jsonb_build_object('id', n), NULL, n, 'E\\t\\\\' || n FROM generate_series(1, {}) AS n"
)

LEASE = "INSERT INTO ops.leases (shard, holder, epoch, taken_at, expires_at) VALUES (0, '{}', {}, '{}', '{}')"


@pytest.fixture
async def fresh(server: EmbeddedServer, template: str, target: ConnectTarget) -> AsyncIterator[ConnectTarget]:
    """A restored database just before the swap."""
    async with dropping_scratch_databases(target), cloned(server, template) as other:
        await execute(other, "INSERT INTO guilds (id, name) VALUES (1, 'restored')")
        await execute(target, "INSERT INTO guilds (id, name) VALUES (1, 'live')")
        yield other


async def run_swap(target: ConnectTarget, fresh: ConnectTarget, **options: Any) -> tuple[SwapResult, ConnectTarget]:
    """Swap, and return the result and the address of the old database."""
    name = databases.scratch_name(str(target.database), databases.BEFORE, new_suffix())
    result = await swap(target, str(target.database), str(fresh.database), name, comment="it's the old one", **options)
    return result, target.with_database(name)


async def test_swaps_names_and_keeps_the_old_rows(target: ConnectTarget, fresh: ConnectTarget) -> None:
    _, before = await run_swap(target, fresh)
    assert await fetchval(target, "SELECT name FROM guilds") == "restored"
    assert await fetchval(before, "SELECT name FROM guilds") == "live"
    postgres = target.with_database("postgres")
    comment = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1"
    assert await fetchval(postgres, comment, before.database) == "it's the old one"
    assert await fetchval(postgres, comment, target.database) is None
    assert await scratch_databases(target, databases.BEFORE) == [before.database]


async def test_keeps_the_rows_and_sequences_of_ops(target: ConnectTarget, fresh: ConnectTarget) -> None:
    await execute(fresh, INSERT_DEAD_LETTERS.format(3), "INSERT INTO ops.suppressions (user_id) VALUES (7)")
    await execute(target, INSERT_DEAD_LETTERS.format(5_000), "INSERT INTO ops.suppressions (user_id) VALUES (8)")
    expected = await fetchval(target, "SELECT md5(string_agg(d::text, '' ORDER BY id)) FROM ops.dead_letters AS d")
    result, _ = await run_swap(target, fresh)
    assert (
        await fetchval(target, "SELECT md5(string_agg(d::text, '' ORDER BY id)) FROM ops.dead_letters AS d") == expected
    )
    assert await fetchval(target, "SELECT array_agg(user_id) FROM ops.suppressions") == [8]
    await execute(target, INSERT_DEAD_LETTERS.format(1))
    assert await fetchval(target, "SELECT max(id) FROM ops.dead_letters") == 5_001
    assert result.ops_rows["dead_letters"] == 5_000


@pytest.mark.parametrize("epoch", [8, 9], ids=["began anew", "continued"])
async def test_keeps_ops_in_a_schema_of_its_own(server: EmbeddedServer, epoch: int) -> None:
    placement = Placement.of("Bot-X")
    async with cloned(server, "template1") as first, cloned(server, "template1") as second:
        target, fresh = first.with_placement(placement), second.with_placement(placement)
        async with dropping_scratch_databases(target):
            for database in (target, fresh):
                await migrations.upgrade(database)
            await execute(fresh, LEASE.format("bot", 8, "2026-01-01", "2026-01-01"), INSERT_DEAD_LETTERS.format(3))
            await execute(target, LEASE.format("bot", epoch, "2026-01-02", "infinity"), INSERT_DEAD_LETTERS.format(2))
            result, _ = await run_swap(target, fresh)
            assert result.has_diverged == (epoch == 8)
            await execute(target, INSERT_DEAD_LETTERS.format(1))
            ids = await fetchval(target, "SELECT array_agg(id ORDER BY id) FROM ops.dead_letters")
            assert ids == ([1, 2, 3, 4, 5, 6] if result.has_diverged else [1, 2, 3])


async def test_ignores_tables_and_columns_of_another_revision(target: ConnectTarget, fresh: ConnectTarget) -> None:
    await execute(target, "ALTER TABLE ops.suppressions ADD COLUMN why text", "CREATE TABLE ops.newer (id int)")
    await execute(target, "INSERT INTO ops.suppressions (user_id, why) VALUES (8, 'asked')")
    await execute(fresh, "ALTER TABLE ops.suppressions ADD COLUMN other int DEFAULT 4, ALTER user_id TYPE numeric")
    await execute(fresh, "CREATE TABLE ops.older (id int)", "INSERT INTO ops.older VALUES (1)")
    await run_swap(target, fresh)
    assert await fetchval(target, "SELECT (user_id, other)::text FROM ops.suppressions") == "(8,4)"
    assert await fetchval(target, "SELECT count(*) FROM ops.older") == 1


async def test_a_live_database_without_ops(server: EmbeddedServer, template: str, empty_target: ConnectTarget) -> None:
    async with dropping_scratch_databases(empty_target), cloned(server, template) as fresh:
        await execute(fresh, "INSERT INTO ops.suppressions (user_id) VALUES (7)")
        result, _ = await run_swap(empty_target, fresh)
        assert result.ops_rows == {}
        assert await fetchval(empty_target, "SELECT count(*) FROM ops.suppressions") == 1


async def test_a_live_lease_stays_alive(target: ConnectTarget, fresh: ConnectTarget) -> None:
    await execute(
        target,
        "INSERT INTO ops.leases (shard, holder, epoch, expires_at) VALUES (0, 'alive', 4, now() + interval '1s'),"
        " (1, 'dead', 5, now() - interval '1s'), (2, 'released', 6, NULL)",
    )
    await run_swap(target, fresh)
    rows = "SELECT array_agg(holder || coalesce(expires_at > now(), false)::text ORDER BY shard) FROM ops.leases"
    assert await fetchval(target, rows) == ["alivetrue", "deadfalse", "releasedfalse"]


@pytest.mark.parametrize(("epoch", "taken"), [(9, "2026-01-02"), (8, "2026-01-01")])
async def test_merges_ops_of_a_database_that_began_anew(
    target: ConnectTarget, fresh: ConnectTarget, epoch: int, taken: str
) -> None:
    """Otherwise every restored row would have a later stamp than what the bot writes, and the mirror would stall."""
    await execute(fresh, LEASE.format("former", 9, "2026-01-01", "2026-01-01"), INSERT_DEAD_LETTERS.format(3))
    await execute(fresh, "INSERT INTO ops.suppressions (user_id, since) VALUES (7, '2020-01-01'), (8, '2020-01-01')")
    await execute(target, LEASE.format("bot", epoch, taken, "infinity"), INSERT_DEAD_LETTERS.format(2))
    await execute(target, "INSERT INTO ops.suppressions (user_id, since) VALUES (8, '2026-01-01'), (9, '2026-01-01')")
    result, _ = await run_swap(target, fresh)
    assert result.has_diverged
    assert await fetchval(target, "SELECT epoch FROM ops.leases WHERE expires_at IS NULL") == 10
    rows = await fetchval(
        target, "SELECT string_agg(user_id || ' ' || since::date, ', ' ORDER BY 1) FROM ops.suppressions"
    )
    assert rows == "7 2020-01-01, 8 2020-01-01, 9 2026-01-01"
    assert await fetchval(target, "SELECT array_agg(id) FROM ops.dead_letters") == [1, 2, 3, 4, 5]


async def test_revoking_the_lease_raises_its_epoch(target: ConnectTarget, fresh: ConnectTarget) -> None:
    await execute(fresh, LEASE.format("bot", 8, "2026-01-01", "2026-01-01"))
    await execute(target, LEASE.format("bot", 9, "2026-01-02", "infinity"))
    result, _ = await run_swap(target, fresh, revoke_lease=True)
    assert not result.has_diverged
    assert await fetchval(target, "SELECT epoch FROM ops.leases WHERE expires_at IS NULL") == 10


async def test_loses_no_write_committed_before_the_swap(target: ConnectTarget, fresh: ConnectTarget) -> None:
    """Every row that concurrent writers have committed is in `ops` of the new database."""
    await execute(target, "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, 'bot', 1)")
    committed: list[int] = []
    errors: list[str] = []
    stop = asyncio.Event()

    async def write(first: int) -> None:
        number = first
        while not stop.is_set():
            try:
                async with connect(target) as connection:
                    while not stop.is_set():
                        async with connection.transaction():
                            await connection.execute("SELECT FROM ops.leases WHERE shard = 0 FOR KEY SHARE")
                            await connection.execute("INSERT INTO ops.counted_messages (id) VALUES ($1)", number)
                        committed.append(number)
                        number += 1
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
                number += 1  # it may have been committed
                errors.append(getattr(error, "sqlstate", None) or type(error).__name__)

    writers = [asyncio.create_task(write(n * 10_000_000 + 1)) for n in range(4)]
    await until_query(target, "SELECT count(*) > 100 FROM ops.counted_messages")
    await run_swap(target, fresh)
    seen = len(committed)
    await until_query(target, "SELECT count(*) > $1 FROM ops.counted_messages", seen + 100)
    stop.set()
    await asyncio.gather(*writers)
    kept = await fetchval(target, "SELECT count(*) FROM ops.counted_messages WHERE id = ANY($1::bigint[])", committed)
    assert kept == len(committed)
    assert "57P01" in errors, "waiting logins are terminated, which clients retry"


async def test_retries_while_a_session_holds_locks(target: ConnectTarget, fresh: ConnectTarget) -> None:
    async with connect(target) as other:
        await other.execute("BEGIN; INSERT INTO ops.suppressions (user_id) VALUES (9)")
        task = asyncio.create_task(run_swap(target, fresh, lock_seconds=1))
        waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND mode = 'ExclusiveLock')"
        await until_query(target, waiting)
        await until_query(target, f"SELECT NOT ({waiting})")
        await other.execute("COMMIT")
        result, _ = await task
    assert result.attempts > 1
    assert await fetchval(target, "SELECT array_agg(user_id) FROM ops.suppressions") == [9]


async def test_names_sessions_that_it_may_not_terminate(
    server: EmbeddedServer, target: ConnectTarget, fresh: ConnectTarget
) -> None:
    role = f"owner_{target.database}"
    postgres = target.with_database("postgres")
    await execute(postgres, f"CREATE ROLE {role} LOGIN CREATEDB")
    try:
        for name in (target.database, fresh.database):
            await execute(postgres, f'ALTER DATABASE "{name}" OWNER TO {role}')
        for one in (target, fresh):
            await execute(one, f"GRANT ALL ON SCHEMA ops TO {role}", f"GRANT ALL ON ALL TABLES IN SCHEMA ops TO {role}")
            await execute(one, f"GRANT ALL ON ALL SEQUENCES IN SCHEMA ops TO {role}")
        ours = ConnectTarget(target.hosts, target.ports, user=role, database=target.database, sslmode="disable")
        async with connect(target) as superuser:
            await superuser.execute("SET application_name = 'dashboard'")
            with pytest.raises(BackupError, match=r"dashboard.*Nothing was changed"):
                await run_swap(ours, fresh, attempts=1)
            assert await superuser.fetchval("SELECT name FROM guilds") == "live"
        await run_swap(ours, fresh)
        assert await fetchval(target, "SELECT name FROM guilds") == "restored"
    finally:
        for name in (*await scratch_databases(target, databases.BEFORE), str(target.database)):
            await execute(postgres, f"ALTER DATABASE {name} OWNER TO postgres")
            await execute(target.with_database(name), f"DROP OWNED BY {role}")
        await execute(postgres, f"DROP ROLE {role}")


async def test_copies_settings_and_grants(target: ConnectTarget, fresh: ConnectTarget) -> None:
    postgres = target.with_database("postgres")
    path = '"$user", public, "odd, one"'
    await execute(
        postgres,
        f"ALTER DATABASE {target.database} SET search_path TO {path}",
        f"ALTER DATABASE {target.database} SET work_mem TO '7MB'",
        f"REVOKE ALL ON DATABASE {target.database} FROM PUBLIC",
        f"GRANT CONNECT ON DATABASE {target.database} TO pg_monitor",
        f"COMMENT ON DATABASE {target.database} IS 'ours'",
    )
    acl = "SELECT datacl::text || shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1"
    expected = await fetchval(postgres, acl, target.database)
    result, _ = await run_swap(target, fresh)
    assert result.not_copied == []
    assert await fetchval(postgres, acl, target.database) == expected
    assert (await fetchval(target, "SHOW search_path"), await fetchval(target, "SHOW work_mem")) == (path, "7MB")

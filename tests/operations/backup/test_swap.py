"""Two databases change places: at once or not at all, with the newest rows of `ops`, and whoever is connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

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
from utils.exceptions import BackupError, ForbiddenHere
from utils.operations.backup import scratch
from utils.operations.backup import swap as swapping
from utils.operations.backup.swap import swap

LETTER = (
    "INSERT INTO ops.dead_letters (table_name, key, payload, stamp, error) SELECT 'guilds',"
    " jsonb_build_object('id', n), NULL, n, 'E\\t\\\\' || n FROM generate_series(1, {}) AS n"
)


@pytest.fixture
async def fresh(server: EmbeddedServer, template: str, target: ConnectTarget) -> AsyncIterator[ConnectTarget]:
    """A scratch database as a restore has it just before the swap."""
    async with dropping_scratch_databases(target), cloned(server, template) as other:
        await execute(other, "INSERT INTO guilds (id, name) VALUES (1, 'restored')")
        await execute(target, "INSERT INTO guilds (id, name) VALUES (1, 'live')")
        yield other


async def swapped(target: ConnectTarget, fresh: ConnectTarget) -> tuple[swapping.SwapResult, ConnectTarget]:
    name = scratch.scratch_name(str(target.database), scratch.BEFORE, scratch.new_suffix())
    done = await swap(target, str(target.database), str(fresh.database), name, comment="it's the old one")
    return done, target.with_database(name)


async def test_the_databases_change_names_and_the_old_one_keeps_its_rows(
    target: ConnectTarget, fresh: ConnectTarget
) -> None:
    _, before = await swapped(target, fresh)
    assert await fetchval(target, "SELECT name FROM guilds") == "restored"
    assert await fetchval(before, "SELECT name FROM guilds") == "live"
    home = target.with_database("postgres")
    comment = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1"
    assert await fetchval(home, comment, before.database) == "it's the old one"
    assert await fetchval(home, comment, target.database) is None
    assert await scratch_databases(target, scratch.BEFORE) == [before.database]


async def test_ops_keeps_its_newest_rows_and_its_sequences_go_on(target: ConnectTarget, fresh: ConnectTarget) -> None:
    await execute(fresh, LETTER.format(3), "INSERT INTO ops.suppressions (user_id) VALUES (7)")
    await execute(target, LETTER.format(5_000), "INSERT INTO ops.suppressions (user_id) VALUES (8)")
    wanted = await fetchval(target, "SELECT md5(string_agg(d::text, '' ORDER BY id)) FROM ops.dead_letters AS d")
    done, _ = await swapped(target, fresh)
    assert (
        await fetchval(target, "SELECT md5(string_agg(d::text, '' ORDER BY id)) FROM ops.dead_letters AS d") == wanted
    )
    assert await fetchval(target, "SELECT array_agg(user_id) FROM ops.suppressions") == [8]
    await execute(target, LETTER.format(1))
    assert await fetchval(target, "SELECT max(id) FROM ops.dead_letters") == 5_001
    assert done.ops_rows["dead_letters"] == 5_000


async def test_tables_and_columns_of_another_revision_are_left_alone(
    target: ConnectTarget, fresh: ConnectTarget
) -> None:
    await execute(target, "ALTER TABLE ops.suppressions ADD COLUMN why text", "CREATE TABLE ops.newer (id int)")
    await execute(target, "INSERT INTO ops.suppressions (user_id, why) VALUES (8, 'asked')")
    await execute(fresh, "ALTER TABLE ops.suppressions ADD COLUMN other int DEFAULT 4, ALTER user_id TYPE numeric")
    await execute(fresh, "CREATE TABLE ops.older (id int)", "INSERT INTO ops.older VALUES (1)")
    await swapped(target, fresh)
    assert await fetchval(target, "SELECT (user_id, other)::text FROM ops.suppressions") == "(8,4)"
    assert await fetchval(target, "SELECT count(*) FROM ops.older") == 1


async def test_a_live_database_without_ops_gives_none(
    server: EmbeddedServer, template: str, empty_target: ConnectTarget
) -> None:
    async with dropping_scratch_databases(empty_target), cloned(server, template) as fresh:
        await execute(fresh, "INSERT INTO ops.suppressions (user_id) VALUES (7)")
        done, _ = await swapped(empty_target, fresh)
        assert done.ops_rows == {}
        assert await fetchval(empty_target, "SELECT count(*) FROM ops.suppressions") == 1


async def test_a_lease_that_was_alive_when_its_holder_had_to_wait_is_alive_afterwards(
    target: ConnectTarget, fresh: ConnectTarget
) -> None:
    await execute(
        target,
        "INSERT INTO ops.leases (shard, holder, epoch, expires_at) VALUES (0, 'alive', 4, now() + interval '1s'),"
        " (1, 'dead', 5, now() - interval '1s'), (2, 'released', 6, NULL)",
    )
    await swapped(target, fresh)
    rows = "SELECT array_agg(holder || coalesce(expires_at > now(), false)::text ORDER BY shard) FROM ops.leases"
    assert await fetchval(target, rows) == ["alivetrue", "deadfalse", "releasedfalse"]


LEASE = "INSERT INTO ops.leases (shard, holder, epoch, taken_at, expires_at) VALUES (0, '{}', {}, '{}', '{}')"


@pytest.mark.parametrize(("epoch", "taken"), [(9, "2026-01-02"), (8, "2026-01-01")])
async def test_a_database_that_began_anew_since_the_backup_gets_a_later_epoch_and_keeps_both_lists(
    target: ConnectTarget, fresh: ConnectTarget, epoch: int, taken: str
) -> None:
    """Otherwise every row of the backup would be younger than all that the bot says, and the mirror stand still."""
    await execute(fresh, LEASE.format("former", 9, "2026-01-01", "2026-01-01"), LETTER.format(3))
    await execute(fresh, "INSERT INTO ops.suppressions (user_id, since) VALUES (7, '2020-01-01'), (8, '2020-01-01')")
    await execute(target, LEASE.format("bot", epoch, taken, "infinity"), LETTER.format(2))
    await execute(target, "INSERT INTO ops.suppressions (user_id, since) VALUES (8, '2026-01-01'), (9, '2026-01-01')")
    done, _ = await swapped(target, fresh)
    assert done.has_diverged
    assert await fetchval(target, "SELECT epoch FROM ops.leases WHERE expires_at IS NULL") == 10
    rows = await fetchval(
        target, "SELECT string_agg(user_id || ' ' || since::date, ', ' ORDER BY 1) FROM ops.suppressions"
    )
    assert rows == "7 2020-01-01, 8 2020-01-01, 9 2026-01-01"
    assert await fetchval(target, "SELECT array_agg(id) FROM ops.dead_letters") == [1, 2, 3, 4, 5]


async def test_a_holder_that_is_deposed_finds_that_it_acts_no_more(target: ConnectTarget, fresh: ConnectTarget) -> None:
    await execute(fresh, LEASE.format("bot", 8, "2026-01-01", "2026-01-01"))
    await execute(target, LEASE.format("bot", 9, "2026-01-02", "infinity"))
    name = scratch.scratch_name(str(target.database), scratch.BEFORE, scratch.new_suffix())
    done = await swap(target, str(target.database), str(fresh.database), name, comment="", revoke_lease=True)
    assert not done.has_diverged
    assert await fetchval(target, "SELECT epoch FROM ops.leases WHERE expires_at IS NULL") == 10


async def test_nothing_is_written_to_the_old_database_once_its_ops_were_copied(
    target: ConnectTarget, fresh: ConnectTarget
) -> None:
    """Writers that never give up: whatever was committed is in `ops` of the new one."""
    await execute(target, "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, 'bot', 1)")
    committed: list[int] = []
    refused: list[str] = []
    done = asyncio.Event()

    async def write(first: int) -> None:
        number = first
        while not done.is_set():
            try:
                async with connect(target) as connection:
                    while not done.is_set():
                        async with connection.transaction():
                            await connection.execute("SELECT FROM ops.leases WHERE shard = 0 FOR KEY SHARE")
                            await connection.execute("INSERT INTO ops.counted_messages (id) VALUES ($1)", number)
                        committed.append(number)
                        number += 1
            except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
                number += 1  # it may be in, or not
                refused.append(getattr(error, "sqlstate", None) or type(error).__name__)

    writers = [asyncio.create_task(write(n * 10_000_000 + 1)) for n in range(4)]
    await until_query(target, "SELECT count(*) > 100 FROM ops.counted_messages")
    await swapped(target, fresh)
    seen = len(committed)
    await until_query(target, "SELECT count(*) > $1 FROM ops.counted_messages", seen + 100)
    done.set()
    await asyncio.gather(*writers)
    kept = await fetchval(target, "SELECT count(*) FROM ops.counted_messages WHERE id = ANY($1::bigint[])", committed)
    assert kept == len(committed)
    assert "57P01" in refused, "who logs in meanwhile is cut off, which sounds like trying again"


async def test_sessions_that_hold_locks_are_waited_for_and_then_it_is_tried_again(
    target: ConnectTarget, fresh: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapping, "LOCK_SECONDS", 1)
    async with connect(target) as other:
        await other.execute("BEGIN; INSERT INTO ops.suppressions (user_id) VALUES (9)")
        task = asyncio.create_task(swapped(target, fresh))
        waiting = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND mode = 'ExclusiveLock')"
        await until_query(target, waiting)
        await until_query(target, f"SELECT NOT ({waiting})")
        await other.execute("COMMIT")
        done, _ = await task
    assert done.attempts > 1
    assert await fetchval(target, "SELECT array_agg(user_id) FROM ops.suppressions") == [9]


async def test_who_cannot_be_ended_is_named_and_nothing_is_changed(
    server: EmbeddedServer, target: ConnectTarget, fresh: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swapping, "ATTEMPTS", 1)
    role = f"owner_{target.database}"
    home = target.with_database("postgres")
    await execute(home, f"CREATE ROLE {role} LOGIN CREATEDB")
    try:
        for name in (target.database, fresh.database):
            await execute(home, f'ALTER DATABASE "{name}" OWNER TO {role}')
        for one in (target, fresh):
            await execute(one, f"GRANT ALL ON SCHEMA ops TO {role}", f"GRANT ALL ON ALL TABLES IN SCHEMA ops TO {role}")
            await execute(one, f"GRANT ALL ON ALL SEQUENCES IN SCHEMA ops TO {role}")
        ours = ConnectTarget(target.hosts, target.ports, user=role, database=target.database, sslmode="disable")
        async with connect(target) as superuser:
            await superuser.execute("SET application_name = 'dashboard'")
            with pytest.raises(BackupError, match=r"dashboard.*Nothing was changed"):
                await swapped(ours, fresh)
            assert await superuser.fetchval("SELECT name FROM guilds") == "live"
        await swapped(ours, fresh)
        assert await fetchval(target, "SELECT name FROM guilds") == "restored"
    finally:
        for name in (*await scratch_databases(target, scratch.BEFORE), str(target.database)):
            await execute(home, f"ALTER DATABASE {name} OWNER TO postgres")
            await execute(target.with_database(name), f"DROP OWNED BY {role}")
        await execute(home, f"DROP ROLE {role}")


async def test_settings_and_grants_of_the_database_go_with_it(target: ConnectTarget, fresh: ConnectTarget) -> None:
    home = target.with_database("postgres")
    path = '"$user", public, "odd, one"'
    await execute(
        home,
        f"ALTER DATABASE {target.database} SET search_path TO {path}",
        f"ALTER DATABASE {target.database} SET work_mem TO '7MB'",
        f"REVOKE ALL ON DATABASE {target.database} FROM PUBLIC",
        f"GRANT CONNECT ON DATABASE {target.database} TO pg_monitor",
        f"COMMENT ON DATABASE {target.database} IS 'ours'",
    )
    acl = "SELECT datacl::text || shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1"
    wanted = await fetchval(home, acl, target.database)
    done, _ = await swapped(target, fresh)
    assert done.not_copied == []
    assert await fetchval(home, acl, target.database) == wanted
    assert (await fetchval(target, "SHOW search_path"), await fetchval(target, "SHOW work_mem")) == (path, "7MB")


async def test_names_of_databases_fit_and_say_whose_they_are() -> None:
    mark = scratch.new_suffix()
    long = ["d" * 60 + end for end in ("ab", "ac")] + ["ü" * 31]
    names = [scratch.scratch_name(name, scratch.RESTORE, mark) for name in long]
    assert len(set(names)) == 3
    assert all(len(name.encode()) <= 63 for name in names)
    assert scratch.scratch_name("guildbook", scratch.DRILL, mark) == f"guildbook_drill_{mark}"


async def test_what_a_killed_restore_left_is_dropped_by_the_next_but_not_what_others_work_in(
    target: ConnectTarget,
) -> None:
    name = str(target.database)
    left = scratch.scratch_name(name, scratch.RESTORE, "20200101_000000_abcd")
    theirs = f"{name}_restore_of_mine"
    home = target.with_database("postgres")
    await execute(home, f"CREATE DATABASE {left}", f"CREATE DATABASE {theirs}")
    try:
        async with (
            dropping_scratch_databases(target),
            scratch.scratch_database(target, name, scratch.DRILL, scratch.new_suffix()) as first,
        ):
            assert await scratch_databases(target, scratch.RESTORE) == []
            async with scratch.scratch_database(target, name, scratch.RESTORE, scratch.new_suffix()) as second:
                assert await scratch_databases(target, scratch.DRILL) == [first.name]
                with pytest.raises(BackupError, match="another restore"):
                    async with scratch.scratch_database(target, name, scratch.RESTORE, scratch.new_suffix()):
                        pass
                kind = "(pg_encoding_to_char(encoding), datcollate, datctype)::text"
                like = f"SELECT {kind} FROM pg_database WHERE datname = $1"  # noqa: S608
                assert await fetchval(home, like, second.name) == await fetchval(home, like, name)
        assert await scratch_databases(target, scratch.RESTORE) == await scratch_databases(target, scratch.DRILL) == []
        assert await fetchval(home, "SELECT count(*) FROM pg_database WHERE datname = $1", theirs) == 1
    finally:
        await execute(home, f"DROP DATABASE {theirs}")


async def test_where_no_second_database_is_allowed_it_says_why(target: ConnectTarget) -> None:
    role = f"poor_{target.database}"
    home = target.with_database("postgres")
    await execute(home, f"CREATE ROLE {role} LOGIN")
    try:
        ours = ConnectTarget(target.hosts, target.ports, user=role, database=target.database, sslmode="disable")
        with pytest.raises(ForbiddenHere, match="CREATEDB"):
            async with scratch.scratch_database(ours, str(target.database), scratch.RESTORE, scratch.new_suffix()):
                pass
        await execute(home, f"ALTER ROLE {role} CREATEDB")
        with pytest.raises(ForbiddenHere, match="may not rename"):
            async with scratch.scratch_database(ours, str(target.database), scratch.RESTORE, scratch.new_suffix()):
                pass
    finally:
        await execute(home, f"DROP ROLE {role}")

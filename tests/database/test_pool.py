"""The pool against a real server: what it lends, what it takes back, and what it says when things go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from sqlalchemy import text

from utils.database import Connection, ConnectTarget, Pool
from utils.database.address import parse_url
from utils.database.embedded import EmbeddedServer
from utils.database.orm import Orm
from utils.database.statements import SlowLog
from utils.exceptions import DatabaseError, DatabaseUnavailable, SettingsError, is_transient, translate
from utils.operations.migrations.environment import run_on_connection
from utils.service.lease import Lease


@contextlib.asynccontextmanager
async def pool(target: ConnectTarget, **options: float) -> AsyncIterator[Pool]:
    db = Pool(target, **{"connect_timeout": 10, **options})  # type: ignore[arg-type]
    await db.connect()
    try:
        yield db
    finally:
        await db.close()


async def test_json_is_python_objects_also_in_copy(database: Pool) -> None:
    value = {"a": [1, 2.5, None, "ü🙂"], "b": {"c": True}}
    async with database.acquire(temp=True) as conn:
        await conn.execute("CREATE TEMP TABLE t (n int, j json, b jsonb)")
        await conn.copy_records_to_table("t", records=[(1, value, value), (2, None, None)])
        await conn.execute("INSERT INTO t VALUES (3, $1, $2)", value, [value])
        rows = await conn.fetch("SELECT j, b FROM t ORDER BY n")
        arrays = await conn.fetchval("SELECT array_agg(b) FROM t WHERE n <> 2")
    assert [tuple(row) for row in rows] == [(value, value), (None, None), (value, [value])]
    assert arrays == [value, [value]]


async def test_verbs(database: Pool) -> None:
    assert await database.execute("INSERT INTO users (id) VALUES ($1), ($2)", 1, 2) == "INSERT 0 2"
    assert [row["id"] for row in await database.fetch("SELECT id FROM users ORDER BY id")] == [1, 2]
    row = await database.fetchrow("SELECT id, username FROM users WHERE id = $1", 1)
    assert row is not None
    assert (row["id"], row["username"]) == (1, None)
    assert await database.fetchrow("SELECT FROM users WHERE id = 3") is None
    assert await database.fetchval("SELECT count(*) FROM users") == 2


async def test_a_transaction_is_atomic(database: Pool) -> None:
    async with database.transaction() as conn:
        await conn.execute("INSERT INTO users (id) VALUES (1)")
    with contextlib.suppress(ZeroDivisionError):
        async with database.transaction() as conn:
            await conn.execute("INSERT INTO users (id) VALUES (2)")
            raise ZeroDivisionError
    assert await database.fetchval("SELECT array_agg(id) FROM users") == [1]


async def test_connections_are_reset(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1) as db:
        async with db.acquire(temp=True) as conn:
            pid = conn.get_server_pid()
            await conn.execute("CREATE TEMP TABLE left_over (n int)")
            await conn.execute("SET work_mem = '1MB'; SELECT pg_advisory_lock(7); LISTEN something")
            await conn.execute("BEGIN; INSERT INTO users (id) VALUES (1)")
        async with db.acquire() as conn:
            assert conn.get_server_pid() == pid
            assert await conn.fetchval("SELECT to_regclass('pg_temp.left_over')") is None
            assert await conn.fetchval("SELECT current_setting('work_mem')") != "1MB"
            assert await conn.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
            assert await conn.fetch("SELECT pg_listening_channels()") == []
            assert await conn.fetchval("SELECT count(*) FROM users") == 0


async def test_temporary_tables_are_dropped_after_a_failed_block(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1) as db:

        async def fail(lend: Callable[..., contextlib.AbstractAsyncContextManager[Connection]]) -> None:
            async with lend(temp=True) as conn:
                await conn.execute("CREATE TEMP TABLE left_over (n int)")
                await conn.execute("SELECT 1 / 0")

        for lend in (db.transaction, db.acquire):
            with pytest.raises(DatabaseError, match="division by zero"):
                await fail(lend)
        assert await db.fetchval("SELECT to_regclass('pg_temp.left_over')") is None


async def test_waiting_for_a_connection_times_out(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1) as db, db.acquire():
        assert db.pool_stats() == {
            "created": 1, "destroyed": 0, "active": 1, "idle": 0, "waiting": 0, "size": 1, "max": 1,
        }  # fmt: skip
        with pytest.raises(DatabaseUnavailable, match="1 of 1 in use"):
            async with db.acquire(timeout=0.05):
                pass


async def test_exhaustion_names_who_holds_connections_and_since_when(target: ConnectTarget) -> None:
    async with pool(target, pool_max=2, acquire_timeout=0.1) as db, db.acquire(), db.transaction():
        await asyncio.sleep(0.1)
        with pytest.raises(DatabaseUnavailable) as caught:
            await db.fetchval("SELECT 1")
    held = r"tests/database/test_pool\.py:\d+ test_exhaustion_names_who_holds_connections_and_since_when for 0\.[1-9] s"
    assert re.search(rf"2 of 2 in use, held by {held}, {held}", str(caught.value))
    assert not db.holders


async def test_statistics_count_destroyed_connections(target: ConnectTarget) -> None:
    db = Pool(target, pool_max=2, connect_timeout=10)
    await db.connect()
    async with db.acquire() as conn:
        await conn.close()
    await asyncio.sleep(0)  # the listeners run in the next turn of the loop
    assert db.pool_stats()["destroyed"] == 1
    assert await db.fetchval("SELECT 1") == 1
    await db.close()
    await asyncio.sleep(0)
    stats = db.pool_stats()
    assert stats["created"] == stats["destroyed"] >= 2


async def test_idle_connections_are_closed(target: ConnectTarget) -> None:
    async with pool(target, pool_min=0, idle_seconds=0.1) as db:
        assert await db.fetchval("SELECT 1") == 1
        async with asyncio.timeout(10):
            while db.pool_stats()["size"]:  # noqa: ASYNC110 - asyncpg announces nothing
                await asyncio.sleep(0.02)


async def test_waiting_for_the_server_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    nowhere = ConnectTarget(("/nowhere",), (5432,), user="u", is_declared=True)
    db = Pool(nowhere, connect_timeout=0.5, retry_seconds=0.01, retry_max_seconds=0.02)
    with caplog.at_level(logging.INFO), pytest.raises(DatabaseUnavailable, match="could not be reached"):
        await db.connect()
    assert len([record for record in caplog.records if "waiting for the database" in record.getMessage()]) == 1


async def test_a_missing_certificate_file_is_not_retried() -> None:
    target = parse_url("postgresql://u@localhost/d?sslmode=verify-full&sslrootcert=/nowhere/ca.pem")
    with pytest.raises(SettingsError, match=r"sslrootcert: /nowhere/ca\.pem cannot be read"):
        await asyncio.wait_for(Pool(target, connect_timeout=3600).connect(), 10)


async def test_driver_errors_are_translated(database: Pool) -> None:
    await database.execute("INSERT INTO users (id) VALUES (1)")
    with pytest.raises(DatabaseError, match="duplicate key") as caught:
        await database.execute("INSERT INTO users (id) VALUES (1)")
    assert caught.value.sqlstate == "23505"
    assert isinstance(caught.value.__cause__, asyncpg.UniqueViolationError)
    assert not isinstance(caught.value, DatabaseUnavailable)
    assert not is_transient(caught.value)


async def test_driver_errors_can_be_caught_inside_the_block(database: Pool) -> None:
    async with database.transaction() as conn:
        with contextlib.suppress(asyncpg.UndefinedTableError):
            async with conn.transaction():
                await conn.execute("SELECT FROM nowhere")
        assert await conn.fetchval("SELECT 1") == 1


async def test_file_errors_are_not_translated(database: Pool) -> None:
    with pytest.raises(FileNotFoundError):
        async with database.acquire():
            raise FileNotFoundError("members.csv")


async def test_a_statement_timeout_leaves_the_pool_usable(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1, command_timeout=0.2) as db:
        with pytest.raises(DatabaseUnavailable, match="did not answer in time"):
            await db.fetchval("SELECT pg_sleep(30)")
        assert await db.fetchval("SELECT 1") == 1
        assert await db.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(30)%'") == 1


async def test_a_cancelled_task_returns_its_connection(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1) as db:
        inside = asyncio.Event()

        async def work() -> None:
            async with db.transaction() as conn:
                await conn.execute("INSERT INTO users (id) VALUES (1)")
                inside.set()
                await conn.execute("SELECT pg_sleep(30)")

        task = asyncio.create_task(work())
        await inside.wait()
        other = await asyncio.wait_for(asyncpg.connect(**target.connect_kwargs()), 10)
        asleep = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = $1)"
        while not await other.fetchval(asleep, target.database):  # the server ignores a cancellation that comes before
            pass
        await other.close()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await db.fetchval("SELECT count(*) FROM users") == 0


@pytest.mark.direct("it ends the backend of a session")
async def test_a_killed_connection_is_transient_and_replaced(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1) as db:
        other = await asyncpg.connect(**target.connect_kwargs())

        async def be_killed() -> None:
            async with db.acquire() as conn:
                await other.execute("SELECT pg_terminate_backend($1)", conn.get_server_pid())
                await conn.fetchval("SELECT 1")

        with pytest.raises(DatabaseUnavailable) as caught:
            await be_killed()
        assert is_transient(caught.value)
        assert await db.fetchval("SELECT 1") == 1
        await other.close()


@pytest.mark.direct("it compares the backends of sessions")
async def test_renew_after_ddl_of_another_session(target: ConnectTarget) -> None:
    async with pool(target, pool_max=1) as db:
        query = "SELECT * FROM users"
        await db.fetch(query)
        pid = await db.fetchval("SELECT pg_backend_pid()")
        other = await asyncpg.connect(**target.connect_kwargs())
        await other.execute("ALTER TABLE users ADD COLUMN extra int")
        await other.close()
        await db.renew()
        async with db.transaction() as conn:
            await conn.fetch(query)
        assert await db.fetchval("SELECT pg_backend_pid()") != pid


async def test_now_follows_the_clock_of_the_database(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await database.fetchval("SELECT clock_timestamp()")
    now = database.now()
    after = await database.fetchval("SELECT clock_timestamp()")
    slack = timedelta(seconds=0.25)
    assert before - slack <= now <= after + slack
    # A host that was asleep: its monotonic clock stood still, the database's went on. check() sets it right.
    database._clock = (datetime(2000, 1, 1, tzinfo=UTC), database._clock[1])  # type: ignore[index]
    assert database.now().year == 2000
    assert await database.check()
    assert database.now() >= before


async def test_server_version(database: Pool, server: EmbeddedServer) -> None:
    assert database.server_version_num // 10_000 == server.version


async def test_connect_waits_for_a_late_server(
    server: EmbeddedServer, target: ConnectTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """A port where nobody listens at first, then a proxy to the real server."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    late = ConnectTarget(("127.0.0.1",), (port,), user="postgres", database=target.database, sslmode="disable")
    db = Pool(late, connect_timeout=30)
    waiting = asyncio.Event()

    class Notice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for the database" in record.getMessage():
                waiting.set()

    notice = Notice()
    logging.getLogger("utils.database.pool").addHandler(notice)
    task = asyncio.create_task(db.connect())
    await asyncio.wait_for(waiting.wait(), 20)
    async with door(port, server):
        await asyncio.wait_for(task, 20)
        assert await db.fetchval("SELECT 1") == 1
        await db.close()
    logging.getLogger("utils.database.pool").removeHandler(notice)
    assert "no connection to the database" in caplog.text


async def test_connect_gives_up_with_advice() -> None:
    nowhere = ConnectTarget(("/nowhere",), (5432,), user="amy", password="s3cr3t", database="guilds")
    db = Pool(nowhere, connect_timeout=0.3)
    with pytest.raises(DatabaseUnavailable) as caught:
        await db.connect()
    assert "No such file or directory" in str(caught.value)
    assert "DB_CONNECT_TIMEOUT" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(DatabaseUnavailable, match="not connected"):
        await db.fetchval("SELECT 1")
    assert not await db.check()


async def test_permanent_errors_end_connect_at_once(server: EmbeddedServer) -> None:
    db = Pool(server.target("nobody_made_this"), connect_timeout=3600)
    with pytest.raises(DatabaseError, match="does not exist") as caught:
        await asyncio.wait_for(db.connect(), 20)
    assert not isinstance(caught.value, DatabaseUnavailable)
    assert "create it" in str(caught.value)


async def test_missing_tls_ends_connect_at_once(server: EmbeddedServer, target: ConnectTarget) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    demanding = ConnectTarget(("127.0.0.1",), (port,), user="postgres", database=target.database, sslmode="require")
    async with door(port, server):
        with pytest.raises(DatabaseError, match="has no TLS") as caught:
            await asyncio.wait_for(Pool(demanding, connect_timeout=3600).connect(), 20)
    assert not isinstance(caught.value, DatabaseUnavailable)


async def test_close_terminates_connections_in_use(target: ConnectTarget) -> None:
    db = Pool(target)
    await db.connect()
    async with contextlib.AsyncExitStack() as stack:
        conn = await stack.enter_async_context(db.acquire())
        await db.close(timeout=0.1)
        with pytest.raises(asyncpg.InterfaceError):
            await conn.fetchval("SELECT 1")
    assert not db.is_connected
    await db.close()


async def test_pooled_connections_name_no_statements(target: ConnectTarget) -> None:
    async with pool(replace(target, pooled=True), pool_max=1) as db:
        assert await db.fetchval("SELECT $1::int", 4) == 4
        assert await db.fetchval("SELECT $1::jsonb", {"a": 1}) == {"a": 1}
        assert await db.fetchval("SELECT count(*) FROM pg_prepared_statements") <= 1
        assert await db.fetchval("SELECT current_setting('application_name')") == ""


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionRefusedError(111, "Connection refused"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (socket.gaierror(-2, "Name or service not known"), True),
        (TimeoutError(), True),
        (asyncpg.CannotConnectNowError("the database system is starting up"), True),
        (asyncpg.AdminShutdownError("terminating connection"), True),
        (asyncpg.CrashShutdownError("terminating connection"), True),
        (asyncpg.TooManyConnectionsError("too many clients"), True),
        (asyncpg.SerializationError("could not serialize"), True),
        (asyncpg.DeadlockDetectedError("deadlock detected"), True),
        (asyncpg.ReadOnlySQLTransactionError("read-only"), True),
        (asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.InterfaceError("pool is closing"), True),
        (asyncpg.InternalClientError("cannot switch to state 11; another operation (2) is in progress"), True),
        (asyncpg.InternalClientError("got result for unknown protocol state 3"), False),
        (asyncpg.InterfaceError("cannot perform operation: another operation is in progress"), False),
        (asyncpg.UniqueViolationError("duplicate key"), False),
        (asyncpg.InvalidPasswordError("password authentication failed"), False),
        (asyncpg.DataError("invalid input"), False),
        (PermissionError(13, "Permission denied"), False),
    ],
)
def test_is_transient(error: Exception, transient: bool) -> None:
    assert is_transient(error) is transient
    ours = translate(error)
    assert isinstance(ours, DatabaseError)
    assert isinstance(ours, DatabaseUnavailable) is transient
    wrapped = RuntimeError("somewhere above")
    wrapped.__cause__ = error
    assert is_transient(wrapped) is transient


def test_other_errors_are_not_translated() -> None:
    assert translate(ValueError("x")) is None
    assert not is_transient(ValueError("x"))


@contextlib.asynccontextmanager
async def door(port: int, server: EmbeddedServer) -> AsyncIterator[None]:
    """Let TCP connections on a port through to the server's unix socket."""
    path = f"{server.target().hosts[0]}/.s.PGSQL.5432"

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    listener = await asyncio.start_server(through, "127.0.0.1", port)
    async with listener:
        yield


LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout")


async def limits(connection: Connection) -> list[str]:
    return [await connection.fetchval("SELECT current_setting($1)", name) for name in LIMITS]


@pytest.mark.direct("it reads settings of a session")
@pytest.mark.parametrize("pooled", [False, True])
async def test_sessions_replace_the_time_limits_of_a_role(target: ConnectTarget, pooled: bool) -> None:
    async with pool(target) as admin:
        for name in LIMITS:
            await admin.execute(f"ALTER DATABASE {target.database} SET {name} = '150ms'")
    async with pool(replace(target, pooled=pooled), pool_max=1) as db:
        for _ in range(2):  # also after the connection was reset
            async with db.transaction() as connection:
                assert await limits(connection) == ["0", "0", "1h", "0"]
                await connection.execute("SELECT pg_sleep(0.3)")
                await asyncio.sleep(0.3)
        if pooled:  # nothing leaks to other clients of the pooler
            async with db.acquire() as connection:
                assert await limits(connection) == ["150ms"] * 4


@pytest.mark.parametrize("pooled", [False, True])
async def test_sqlalchemy_replaces_the_time_limits_of_a_role(target: ConnectTarget, pooled: bool) -> None:
    async with pool(target) as admin:
        await admin.execute(f"ALTER DATABASE {target.database} SET statement_timeout = '150ms'")
    orm = Orm(
        lambda: replace(target, pooled=pooled), connections=1, queue_timeout=5, idle_seconds=0,
        slow=SlowLog(5_000), on_committed=lambda _: None, on_doubt=lambda _: None,
    )  # fmt: skip
    try:
        async with orm.session(None) as session:
            await session.execute(text("SELECT pg_sleep(0.3)"))
    finally:
        await orm.close()


async def test_lease_and_migrations_replace_the_time_limits_of_a_role(target: ConnectTarget) -> None:
    async with pool(target) as admin:
        await admin.execute(f"ALTER DATABASE {target.database} SET statement_timeout = '150ms'")
    lease = Lease(target, "a test")
    connection = await lease._connect()
    assert await connection.fetchval("SHOW statement_timeout") == "0"
    await connection.close()
    found = await run_on_connection(target, lambda found: found.exec_driver_sql("SHOW statement_timeout").scalar_one())
    assert found == "0"


async def test_refuses_a_database_that_is_not_utf8(target: ConnectTarget) -> None:
    name = f"{target.database}_latin"
    async with pool(target) as admin:
        await admin.execute(
            f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE_PROVIDER libc LC_COLLATE 'C' LC_CTYPE 'C'"
            " TEMPLATE template0"
        )
        try:
            with pytest.raises(DatabaseError, match="encoding LATIN1"):
                await Pool(target.with_database(name), connect_timeout=10).connect()
        finally:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

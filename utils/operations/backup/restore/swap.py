"""Puts a restored database in the place of the live one, by renaming both in one transaction.

Until its commit the old database is live, afterwards the new one, whatever is killed in between. The rows of schema
`ops` are copied from the old to the new database first, so nothing may be written meanwhile: every writing transaction
of a bot locks a row of `ops.leases`, so a lock on the tables of `ops` keeps all of them waiting. Then their sessions
are terminated, which a bot treats as a short outage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import stamina

from utils.database import ConnectTarget
from utils.database.placement import placement_on
from utils.database.sessions import Connection, connect
from utils.database.sql import quote_identifier, quote_literal
from utils.exceptions import BackupError, DatabaseError, DatabaseUnavailable, translate, translate_errors
from utils.operations.backup.archive.objects import find_drawn_columns, qualified
from utils.operations.backup.scratch.databases import copy_settings, maintenance_target
from utils.operations.backup.scratch.locks import RESTORE_LOCK, lock
from utils.service import lease

_log = logging.getLogger(__name__)

#: Attempts, and seconds of the first and longest pause between two.
ATTEMPTS = 6
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 3.0
#: Seconds to wait for the transactions that are writing.
LOCK_SECONDS = 5
#: Seconds after which the server releases the lock on `ops` by itself if this process has died.
IDLE_SECONDS = 60
#: Seconds between two looks at who is still connected.
POLL_SECONDS = 0.02
#: Seconds for one rename: the server itself waits 5 s for other sessions to end (CountOtherDBBackends).
RENAME_SECONDS = 15.0
#: insufficient_privilege (PostgreSQL manual, appendix A).
_INSUFFICIENT_PRIVILEGE = "42501"

_SESSIONS = """
SELECT pid, usename, application_name FROM pg_stat_activity
WHERE datname = ANY($1::text[]) AND pid <> ALL($2::int[]) AND usename IS NOT NULL
"""
_HAS_RENAME_LOCK = """
SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND granted AND locktype = 'object' AND mode = 'AccessExclusiveLock'
    AND classid = 'pg_database'::regclass AND objid = (SELECT oid FROM pg_database WHERE datname = $2))
"""
#: Sessions whose login waits for the end of the renaming.
_WAITING_LOGINS = """
SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'object' AND classid = 'pg_database'::regclass
    AND objid = (SELECT oid FROM pg_database WHERE datname = $1)
"""
_OPS_COLUMNS = """
SELECT c.relname AS table, a.attname AS column, format_type(a.atttypid, a.atttypmod) AS type
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = to_regnamespace('ops') AND c.relkind IN ('r', 'p') AND NOT c.relispartition
    AND a.attgenerated = '' ORDER BY c.relname, a.attnum
"""
_OPS_SEQUENCES = "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('ops') AND relkind = 'S'"


@dataclass(slots=True)
class SwapResult:
    """What a swap did."""

    attempts: int = 1
    #: Number of rows copied to the new database, by table of `ops`.
    ops_rows: dict[str, int] = field(default_factory=dict)
    #: True if the live database began anew since the backup, so that the backup's rows of `ops` were kept too.
    has_diverged: bool = False
    #: Settings of the old database and grants on it that could not be copied, one line each.
    not_copied: list[str] = field(default_factory=list)


async def swap(
    live: ConnectTarget,
    database: str,
    scratch: str,
    before: str,
    *,
    comment: str,
    revoke_lease: bool = False,
    attempts: int = ATTEMPTS,
    lock_seconds: float = LOCK_SECONDS,
) -> SwapResult:
    """Rename `database` to `before` and `scratch` to `database`, after copying the rows of `ops`.

    All sessions of both are terminated. `comment` is attached to the old one. With `revoke_lease`, the holder of the
    lease loses it, starts over and reconciles everything. `lock_seconds` is how long each attempt waits for
    transactions that are writing. Raises `BackupError` after the last attempt, naming the sessions in the way or that
    another restore is running; then nothing was changed.
    """
    maintenance = await maintenance_target(live, database)
    async with connect(maintenance) as connection:
        with translate_errors("the database's settings"):
            new_oid = await connection.fetchval("SELECT oid FROM pg_database WHERE datname = $1", scratch)
            not_copied = await copy_settings(connection, database, scratch)
    result = SwapResult(not_copied=not_copied)
    try:
        async for attempt in stamina.retry_context(
            on=_is_retryable, attempts=attempts, timeout=None,
            wait_initial=MIN_PAUSE_SECONDS, wait_max=MAX_PAUSE_SECONDS, wait_jitter=MIN_PAUSE_SECONDS,
        ):  # fmt: skip
            with attempt:
                result.attempts = attempt.num
                try:
                    result.ops_rows, result.has_diverged = await _attempt(
                        live, maintenance, database, scratch, before, comment, revoke_lease, lock_seconds
                    )
                except (DatabaseError, TimeoutError) as error:
                    if await _has_oid(maintenance, database, new_oid):  # committed, but the answer was lost
                        return result
                    _log.warning("the databases could not be swapped in attempt %d: %s", attempt.num, error)
                    raise
    except (DatabaseError, TimeoutError) as error:
        raise BackupError(
            f"{database} could not be swapped in {result.attempts}"
            f" {'attempt' if result.attempts == 1 else 'attempts'}:"
            f" {error}{await _remaining_sessions(maintenance, database, scratch)}. Nothing was changed"
        ) from error
    return result


def _is_retryable(error: Exception) -> bool:
    if isinstance(error, DatabaseError):
        return error.sqlstate != _INSUFFICIENT_PRIVILEGE
    return isinstance(error, TimeoutError)


async def _attempt(
    live: ConnectTarget,
    maintenance: ConnectTarget,
    database: str,
    scratch: str,
    before: str,
    comment: str,
    revoke_lease: bool,
    lock_seconds: float,
) -> tuple[dict[str, int], bool]:
    async with connect(maintenance) as killer, connect(maintenance) as renamer, connect(live) as locker:
        if not await lock(locker, RESTORE_LOCK):  # until it ends, with the last session of the old database
            raise DatabaseUnavailable("another restore of this database is running")
        with translate_errors("the rows of ops"):
            copied = await _transfer_ops(locker, live.with_database(scratch), revoke_lease, lock_seconds)
        with translate_errors("renaming"):
            async with asyncio.timeout(2 * RENAME_SECONDS):
                await _rename(killer, renamer, locker, database, scratch, before, comment)
    return copied


# --- the rows of ops


async def _transfer_ops(
    locker: Connection, target: ConnectTarget, revoke_lease: bool, lock_seconds: float
) -> tuple[dict[str, int], bool]:
    """Lock the tables of `ops` until `locker` is closed, and copy their rows to the database `target`."""
    tables = await columns_of_ops(locker)
    live_leases = await lease.list_live(locker)
    await locker.execute(
        f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{lock_seconds:g}s';"
        f" SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
    )
    if tables:
        # Blocks writers of these tables, and everyone who checks the lease before writing to others; readers go on.
        # Writers lock their lease first, so it is locked first here too.
        ordered = sorted(tables, key=lambda table: table != "leases")
        await locker.execute(f"LOCK TABLE {', '.join(map(_in_ops, ordered))} IN EXCLUSIVE MODE")
    live_leases |= await lease.list_live(locker)
    async with connect(target) as other, other.transaction():
        has_diverged = lease.has_diverged(await lease.list_epochs(locker), await lease.list_epochs(other))
        copied = await copy_ops(locker, other, tables, add=has_diverged)
        if has_diverged or (revoke_lease and "leases" in copied):
            # Later stamps must exceed those in the restored rows. Nobody holds the new epoch, so the current holder
            # finds that it has lost the lease.
            await lease.depose(other)
        elif live_leases and "leases" in copied:  # the blocked holder must not lose its lease meanwhile
            await lease.revive(other, live_leases)
    return copied, has_diverged


async def columns_of_ops(connection: Connection) -> dict[str, dict[str, str]]:
    """Return the tables of `ops` with the types of their columns; generated columns are left out."""
    tables: dict[str, dict[str, str]] = {}
    for row in await connection.fetch(_OPS_COLUMNS):
        tables.setdefault(row["table"], {})[row["column"]] = row["type"]
    return tables


async def copy_ops(
    source: Connection, target: Connection, tables: dict[str, dict[str, str]], *, add: bool = False
) -> dict[str, int]:
    """Replace the rows of the target's tables of `ops` by the source's, set its sequences, and return row counts.

    With `add` the rows are added, except those whose key exists. Tables and columns that only one database has are left
    alone: they belong to another revision of the schema.
    """
    target_tables = await columns_of_ops(target)
    common = [table for table in tables if table in target_tables]
    copied: dict[str, int] = {}
    if common and not add:
        await target.execute(f"TRUNCATE {', '.join(map(_in_ops, common))}")
    for table in common:
        columns = [column for column in tables[table] if column in target_tables[table]]
        if add:
            copied[table] = await _add_rows(source, target, table, columns)
        else:
            has_same_types = all(tables[table][column] == target_tables[table][column] for column in columns)
            copied[table] = await _copy_rows(source, target, table, columns, "binary" if has_same_types else "text")
    if add:
        return copied
    for row in await source.fetch(_OPS_SEQUENCES):
        name = _in_ops(row["relname"])
        state = await source.fetchrow(f"SELECT last_value, is_called FROM {name}")  # noqa: S608 - from the catalogue
        assert state is not None, "a sequence has one row"
        await target.execute(
            "SELECT setval(found, $2, $3) FROM to_regclass($1) AS found WHERE found IS NOT NULL",
            qualified((placement_on(target).ops, row["relname"])),  # a parameter, which the connection does not adapt
            *state.values(),
        )
    return copied


async def _add_rows(source: Connection, target: Connection, table: str, columns: list[str]) -> int:
    """Add the rows whose key the target does not have; keys from sequences are drawn anew."""
    drawn = await find_drawn_columns(target, qualified((placement_on(target).ops, table)))
    columns = [column for column in columns if column not in drawn]
    names = ", ".join(map(quote_identifier, columns))
    await target.execute(
        f"CREATE TEMP TABLE added ON COMMIT DROP AS SELECT {names} FROM {_in_ops(table)} WITH NO DATA"  # noqa: S608
    )
    await _copy_rows(source, target, table, columns, "text", into="added")
    status = await target.execute(
        f"INSERT INTO {_in_ops(table)} ({names}) SELECT {names} FROM added ON CONFLICT DO NOTHING"  # noqa: S608
    )
    await target.execute("DROP TABLE added")
    return int(status.split()[-1])


async def _copy_rows(
    source: Connection, target: Connection, table: str, columns: list[str], copy_format: Any, *, into: str | None = None
) -> int:
    """COPY a table of `ops` from one connection to another, in bounded memory; return the number of rows."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=16)

    async def read() -> None:
        names = ", ".join(map(quote_identifier, columns))
        query = f"SELECT {names} FROM {_in_ops(table)}"  # noqa: S608 - names from the catalogue
        await source.copy_from_query(query, output=queue.put, format=copy_format, timeout=None)
        await queue.put(None)

    async def chunks() -> AsyncIterator[bytes]:
        while (chunk := await queue.get()) is not None:
            yield chunk

    reading = asyncio.create_task(read())
    writing = asyncio.create_task(
        target.copy_to_table(
            into or table,
            schema_name=None if into else "ops",
            columns=columns,
            source=chunks(),
            format=copy_format,
            timeout=None,
        )
    )
    try:
        await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (reading, writing):
            if task.done():
                task.result()
        return int(writing.result().split()[-1])
    finally:
        reading.cancel()
        writing.cancel()
        await asyncio.wait({reading, writing}, timeout=5)


def _in_ops(name: str) -> str:
    return f"ops.{quote_identifier(name)}"


# --- renaming


async def _rename(
    killer: Connection, renamer: Connection, locker: Connection, database: str, scratch: str, before: str, comment: str
) -> None:
    """Rename both databases in one transaction, while `killer` ends all sessions, that of `locker` last."""
    former_comment = await killer.fetchval(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", database
    )
    renamer_pid: int = renamer.get_server_pid()
    await renamer.execute("BEGIN")
    # The rename's lock keeps new sessions out from here on, so terminated clients cannot return.
    renaming = asyncio.create_task(
        renamer.execute(
            f"ALTER DATABASE {quote_identifier(database)} RENAME TO {quote_identifier(before)}", timeout=RENAME_SECONDS
        )
    )
    try:
        while not renaming.done():
            await _end_sessions(killer, renamer_pid, locker, database, scratch)
            await asyncio.wait({renaming}, timeout=POLL_SECONDS)
        await renaming
    finally:
        renaming.cancel()
    comment_now = "NULL" if former_comment is None else quote_literal(former_comment)
    await renamer.execute(
        f"ALTER DATABASE {quote_identifier(scratch)} RENAME TO {quote_identifier(database)};"
        f" COMMENT ON DATABASE {quote_identifier(before)} IS {quote_literal(comment)};"
        f" COMMENT ON DATABASE {quote_identifier(database)} IS {comment_now}",
        timeout=RENAME_SECONDS,
    )
    # Waiting logins would get "database does not exist", which looks permanent; a terminated one is retried.
    for row in await killer.fetch(_WAITING_LOGINS, database):
        await _terminate(killer, row["pid"])
    await renamer.execute("COMMIT")


async def _end_sessions(killer: Connection, renamer_pid: int, locker: Connection, database: str, scratch: str) -> None:
    """Terminate every session in both databases once nobody else can log in; those blocked by `locker` go first."""
    if not await killer.fetchval(_HAS_RENAME_LOCK, renamer_pid, database):
        return
    spared = [] if locker.is_closed() else [locker.get_server_pid()]
    sessions = await killer.fetch(_SESSIONS, [database, scratch], spared)
    for row in sessions:
        await _terminate(killer, row["pid"])
    if not sessions and not locker.is_closed():
        locker.terminate()


async def _terminate(killer: Connection, pid: int) -> None:
    with contextlib.suppress(asyncpg.InsufficientPrivilegeError):  # reported if the session stays in the way
        await killer.execute("SELECT pg_terminate_backend($1)", pid)


async def _has_oid(maintenance: ConnectTarget, database: str, oid: int) -> bool:
    """Return whether the database with this name has this OID, that is, whether the swap was committed."""
    try:
        async with connect(maintenance) as connection:
            return bool(await connection.fetchval("SELECT oid = $2 FROM pg_database WHERE datname = $1", database, oid))
    except (DatabaseError, asyncpg.PostgresError) as error:
        _log.warning("could not find out whether the databases were swapped: %s", translate(error))
        return False


async def _remaining_sessions(maintenance: ConnectTarget, database: str, scratch: str) -> str:
    """Return the end of an error message that names who is still connected; empty if nobody is."""
    try:
        async with connect(maintenance) as connection:
            rows = await connection.fetch(_SESSIONS, [database, scratch], [])
            prepared = await connection.fetchval(
                "SELECT count(*) FROM pg_prepared_xacts WHERE database = ANY($1::name[])", [database, scratch]
            )
    except (DatabaseError, asyncpg.PostgresError):
        return ""
    names = [
        f"user {row['usename']} ({row['application_name'] or 'unnamed'}, process {row['pid']})" for row in rows[:5]
    ]
    if prepared:
        names.append(f"{prepared} prepared transactions (ROLLBACK PREPARED ends them)")
    return f"; still connected: {', '.join(names)}: end these sessions" if names else ""

"""Put a restored database in the place of the live one, by renaming both in one transaction.

Until its commit the old database is the live one, afterwards the new one, whatever is killed in between. Before it the
rows of schema `ops` go from the one to the other, so nothing may be written meanwhile: every writing transaction of a
bot has a row of `ops.leases` locked, and a lock on the tables of `ops` keeps them all waiting; then their sessions are
ended. A bot takes that for a short outage.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from utils.database import ConnectTarget
from utils.exceptions import BackupError, DatabaseError, translate, translate_errors
from utils.operations.backup.scratch import Connection, carry_over, connected, home, literal, quoted
from utils.service import lease

_log = logging.getLogger(__name__)

#: Tries, and the pause before the second, which grows by as much with each.
ATTEMPTS = 6
PAUSE_SECONDS = 0.5
#: Seconds to wait for the transactions that write just now.
LOCK_SECONDS = 5
#: Seconds after which the server by itself lets the writers go on when we have fallen silent.
SILENT_SECONDS = 60
#: Seconds between two looks at who is still connected.
LOOK_SECONDS = 0.02
#: Seconds for one renaming: the server itself waits 5 s for others to leave (CountOtherDBBackends).
RENAME_SECONDS = 15.0

_SESSIONS = """
SELECT pid, usename, application_name FROM pg_stat_activity
WHERE datname = ANY($1::text[]) AND pid <> ALL($2::int[]) AND usename IS NOT NULL
"""
_HAS_LOCK = """
SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND granted AND locktype = 'object' AND mode = 'AccessExclusiveLock'
    AND classid = 'pg_database'::regclass AND objid = (SELECT oid FROM pg_database WHERE datname = $2))
"""
#: Who is logging in and waits for the renaming's end, only to learn that the database is another one by then.
_AT_THE_DOOR = """
SELECT pid FROM pg_locks WHERE NOT granted AND locktype = 'object' AND classid = 'pg_database'::regclass
    AND objid = (SELECT oid FROM pg_database WHERE datname = $1)
"""


@dataclass(slots=True)
class Swapped:
    """What a swap did."""

    attempts: int = 1
    #: Rows of `ops` that were taken over, by table.
    kept_rows: dict[str, int] = field(default_factory=dict)
    #: True: the live database is not the one that the backup continues, so the backup's rows of `ops` count too.
    is_other: bool = False
    #: What of the old database's settings and grants could not be given to the new one, as lines.
    not_carried: list[str] = field(default_factory=list)


async def swap(
    live: ConnectTarget, database: str, scratch: str, before: str, *, comment: str, depose: bool = False
) -> Swapped:
    """Rename `database` to `before` and `scratch` to `database`, with the newest rows of `ops`.

    All sessions of both are ended. `comment` goes to the old one. `depose`: whoever holds the lease loses it, and with
    it begins anew as if it had just been started, which reconciles everything. Tried up to `ATTEMPTS` times; raises
    `BackupError` with who is in the way when none succeeds: then everything is as it was.
    """
    at = await home(live, database)
    async with connected(at) as connection:
        with translate_errors("the database's settings"):
            new = await connection.fetchval("SELECT oid FROM pg_database WHERE datname = $1", scratch)
            not_carried = await carry_over(connection, database, scratch)
    done = Swapped(not_carried=not_carried)
    attempt = 0
    while True:
        attempt += 1
        done.attempts = attempt
        try:
            done.kept_rows, done.is_other = await _try(live, at, database, scratch, before, comment, depose)
        except (DatabaseError, TimeoutError) as error:
            if await _is_in_place(at, database, new):  # only the answer was lost
                return done
            permanent = isinstance(error, DatabaseError) and error.sqlstate == "42501"
            if attempt >= ATTEMPTS or permanent:
                raise BackupError(
                    f"{database} could not be swapped in {attempt} {'try' if attempt == 1 else 'tries'}:"
                    f" {error}{await _in_the_way(at, database, scratch)}. Nothing was changed"
                ) from error
            _log.warning("the databases could not be swapped, trying again: %s", error)
        else:
            return done
        await asyncio.sleep(PAUSE_SECONDS * attempt)


async def _try(
    live: ConnectTarget, at: ConnectTarget, database: str, scratch: str, before: str, comment: str, depose: bool
) -> tuple[dict[str, int], bool]:
    async with connected(at) as ender, connected(at) as renamer, connected(live) as keeper:
        with translate_errors("the rows of ops"):
            kept = await _take_ops_over(keeper, live.with_database(scratch), depose)
        with translate_errors("renaming"):
            async with asyncio.timeout(2 * RENAME_SECONDS):
                await _rename(ender, renamer, keeper, database, scratch, before, comment)
    return kept


# --- the rows of ops


async def _take_ops_over(keeper: Connection, target: ConnectTarget, depose: bool) -> tuple[dict[str, int], bool]:
    """Lock the tables of `ops` for as long as `keeper` is open, and put their rows in the place of `target`'s."""
    tables = await columns_of_ops(keeper)
    alive = await lease.list_live(keeper)
    await keeper.execute(
        f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_SECONDS}s';"
        f" SET LOCAL idle_in_transaction_session_timeout = '{SILENT_SECONDS}s'"
    )
    if tables:
        # Readers go on; whoever writes there, or checks the lease to write elsewhere, waits. Leases first: so do they.
        ordered = sorted(tables, key=lambda table: table != "leases")
        await keeper.execute(f"LOCK TABLE {', '.join(map(_in_ops, ordered))} IN EXCLUSIVE MODE")
    alive |= await lease.list_live(keeper)
    async with connected(target) as other, other.transaction():
        is_other = await _is_other(keeper, other)
        kept = await copy_ops(keeper, other, tables, add=is_other)
        if is_other or (depose and "leases" in kept):
            # Every later stamp has to be greater than those in the rows; nobody has this epoch, so whoever acts finds
            # that it does no more.
            await lease.depose(other)
        elif alive and "leases" in kept:  # who held it when we made them wait holds it afterwards
            await lease.revive(other, alive)
    return kept, is_other


async def _is_other(live: Connection, restored: Connection) -> bool:
    """Return whether the live database began anew since the backup: its leases are not later ones of the same row.

    What the bot wrote there has lower stamps than the rows of the backup, and what people asked for before is not in
    its `ops`.
    """
    now = await lease.list_epochs(live)
    for shard, (epoch, taken_at) in (await lease.list_epochs(restored)).items():
        at, when = now.get(shard, (0, None))
        if at < epoch or (at == epoch and when != taken_at):
            return True
    return False


async def columns_of_ops(connection: Connection) -> dict[str, dict[str, str]]:
    """Return the tables of `ops` with their columns and the columns' types, but for generated ones."""
    rows = await connection.fetch(
        "SELECT c.relname AS table, a.attname AS column, format_type(a.atttypid, a.atttypmod) AS type"
        " FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE c.relnamespace = to_regnamespace('ops') AND c.relkind IN ('r', 'p') AND NOT c.relispartition"
        " AND a.attgenerated = '' ORDER BY c.relname, a.attnum"
    )
    tables: dict[str, dict[str, str]] = {}
    for row in rows:
        tables.setdefault(row["table"], {})[row["column"]] = row["type"]
    return tables


async def copy_ops(
    source: Connection, target: Connection, tables: dict[str, dict[str, str]], *, add: bool = False
) -> dict[str, int]:
    """Replace the rows of `target`'s tables of `ops` by those of `source`, and set its sequences; return the numbers.

    `add`: they come in addition, where there is none of the same key. What only one of the two has is left alone: it
    belongs to another revision of the schema.
    """
    others = await columns_of_ops(target)
    both = [table for table in tables if table in others]
    copied: dict[str, int] = {}
    if both and not add:
        await target.execute(f"TRUNCATE {', '.join(map(_in_ops, both))}")
    for table in both:
        columns = [column for column in tables[table] if column in others[table]]
        same = all(tables[table][column] == others[table][column] for column in columns)
        if add:
            copied[table] = await _add(source, target, table, columns)
        else:
            copied[table] = await _pipe(source, target, table, columns, "binary" if same else "text")
    if add:
        return copied
    for row in await source.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('ops') AND relkind = 'S'"
    ):
        name = _in_ops(row["relname"])
        at = await source.fetchrow(f"SELECT last_value, is_called FROM {name}")  # noqa: S608 - out of the catalogue
        assert at is not None, "a sequence has one row"
        await target.execute(
            "SELECT setval(found, $2, $3) FROM to_regclass($1) AS found WHERE found IS NOT NULL", name, *at.values()
        )
    return copied


async def _add(source: Connection, target: Connection, table: str, columns: list[str]) -> int:
    """Add the rows that `target` has none of the same key for; keys that sequences give are given anew."""
    drawn = await target.fetch(
        "SELECT a.attname FROM pg_attrdef AS d JOIN pg_attribute AS a ON a.attrelid = d.adrelid AND a.attnum = d.adnum"
        " WHERE d.adrelid = $1::text::regclass AND pg_get_expr(d.adbin, d.adrelid) LIKE 'nextval(%'",
        _in_ops(table),
    )
    columns = [column for column in columns if column not in {row["attname"] for row in drawn}]
    names = ", ".join(map(quoted, columns))
    await target.execute(
        f"CREATE TEMP TABLE added ON COMMIT DROP AS SELECT {names} FROM {_in_ops(table)} WITH NO DATA"  # noqa: S608
    )
    await _pipe(source, target, table, columns, "text", into="added")
    word = await target.execute(
        f"INSERT INTO {_in_ops(table)} ({names}) SELECT {names} FROM added ON CONFLICT DO NOTHING"  # noqa: S608
    )
    await target.execute("DROP TABLE added")
    return int(word.split()[-1])


async def _pipe(
    source: Connection, target: Connection, table: str, columns: list[str], kind: Any, *, into: str | None = None
) -> int:
    """COPY a table of `ops` from one connection to another, a few pieces in memory at a time; return the rows."""
    pieces: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=16)

    async def take() -> None:
        names = ", ".join(map(quoted, columns))
        query = f"SELECT {names} FROM {_in_ops(table)}"  # noqa: S608 - names out of the catalogue
        await source.copy_from_query(query, output=pieces.put, format=kind, timeout=None)
        await pieces.put(None)

    async def give() -> AsyncIterator[bytes]:
        while (piece := await pieces.get()) is not None:
            yield piece

    taking = asyncio.create_task(take())
    giving = asyncio.create_task(
        target.copy_to_table(
            into or table,
            schema_name=None if into else "ops",
            columns=columns,
            source=give(),
            format=kind,
            timeout=None,
        )
    )
    try:
        await asyncio.wait({taking, giving}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (taking, giving):
            if task.done():
                task.result()
        return int(giving.result().split()[-1])
    finally:
        taking.cancel()
        giving.cancel()
        await asyncio.wait({taking, giving}, timeout=5)


def _in_ops(name: str) -> str:
    return f"ops.{quoted(name)}"


# --- the renaming


async def _rename(
    ender: Connection, renamer: Connection, keeper: Connection, database: str, scratch: str, before: str, comment: str
) -> None:
    """Rename both in one transaction; `ender` sees to it that nobody is connected, `keeper` leaves as the last."""
    former = await ender.fetchval(
        "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = $1", database
    )
    pid: int = renamer.get_server_pid()
    await renamer.execute("BEGIN")
    # From here on the lock that the renaming takes lets nobody log in, so that who is ended does not come back.
    renaming = asyncio.create_task(
        renamer.execute(f"ALTER DATABASE {quoted(database)} RENAME TO {quoted(before)}", timeout=RENAME_SECONDS)
    )
    try:
        while not renaming.done():
            await _end_sessions(ender, pid, keeper, database, scratch)
            await asyncio.wait({renaming}, timeout=LOOK_SECONDS)
        await renaming
    finally:
        renaming.cancel()
    await renamer.execute(
        f"ALTER DATABASE {quoted(scratch)} RENAME TO {quoted(database)};"
        f" COMMENT ON DATABASE {quoted(before)} IS {literal(comment)};"
        f" COMMENT ON DATABASE {quoted(database)} IS {'NULL' if former is None else literal(former)}",
        timeout=RENAME_SECONDS,
    )
    # They would be told that the database does not exist, which sounds final; being cut off sounds like trying again.
    for row in await ender.fetch(_AT_THE_DOOR, database):
        await _end(ender, row["pid"])
    await renamer.execute("COMMIT")


async def _end_sessions(ender: Connection, pid: int, keeper: Connection, database: str, scratch: str) -> None:
    """End every session in both databases once nobody else can log in, those first that wait for the keeper's lock."""
    if not await ender.fetchval(_HAS_LOCK, pid, database):
        return
    others = []
    if not keeper.is_closed():
        others.append(keeper.get_server_pid())
    rest = await ender.fetch(_SESSIONS, [database, scratch], others)
    for row in rest:
        await _end(ender, row["pid"])
    if not rest and not keeper.is_closed():
        keeper.terminate()


async def _end(ender: Connection, pid: int) -> None:
    with contextlib.suppress(asyncpg.InsufficientPrivilegeError):  # said when it stays in the way
        await ender.execute("SELECT pg_terminate_backend($1)", pid)


async def _is_in_place(at: ConnectTarget, database: str, oid: int) -> bool:
    try:
        async with connected(at) as connection:
            return bool(await connection.fetchval("SELECT oid = $2 FROM pg_database WHERE datname = $1", database, oid))
    except (DatabaseError, asyncpg.PostgresError) as error:
        _log.warning("the server does not say whether the databases were swapped: %s", translate(error))
        return False


async def _in_the_way(at: ConnectTarget, database: str, scratch: str) -> str:
    """Say who is connected still, for people."""
    try:
        async with connected(at) as connection:
            rows = await connection.fetch(_SESSIONS, [database, scratch], [])
            prepared = await connection.fetchval(
                "SELECT count(*) FROM pg_prepared_xacts WHERE database = ANY($1::name[])", [database, scratch]
            )
    except (DatabaseError, asyncpg.PostgresError):
        return ""
    who = [f"user {row['usename']} ({row['application_name'] or 'unnamed'}, process {row['pid']})" for row in rows[:5]]
    if prepared:
        who.append(f"{prepared} prepared transactions (ROLLBACK PREPARED ends them)")
    return f"; still connected: {', '.join(who)}: end these sessions" if who else ""

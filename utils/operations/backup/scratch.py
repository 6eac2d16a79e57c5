"""Databases beside the live one, on the same server: where a backup is restored before anybody relies on it.

Their names tell what they are: `guildbook_restore_20260102_030405_9f3c` and `…_drill_…` are scratch ones,
`…_before_…` is what a restore put aside. Who makes a scratch database holds an advisory lock of its name in the
maintenance database: one that nobody holds was left by a process that was killed, and is dropped by the next restore
or drill.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import asyncpg

from utils.database import ConnectTarget
from utils.exceptions import BackupError, DatabaseError, ForbiddenHere, translate, translate_errors

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection

_log = logging.getLogger(__name__)

RESTORE, DRILL, BEFORE = "restore", "drill", "before"
#: Databases that every server has, to work from: nobody may be connected to one that is renamed (PostgreSQL manual,
#: 23.3).
_HOMES = ("postgres", "template1")
#: PostgreSQL cuts longer names off, in bytes (manual, 4.1.1).
_NAME_BYTES = 63
_STAMP = r"\d{8}_\d{6}_[0-9a-f]{4}"
#: Seconds: to connect, and for a statement that may have to wait for a checkpoint.
CONNECT_SECONDS = 10.0
STATEMENT_SECONDS = 300.0
#: SQLSTATEs of a server that has the database but not for us (PostgreSQL manual, appendix A).
_NOT_FOR_US = ("3D000", "28000", "28P01", "42501", "55000", "08P01")

_PROPERTIES = """
SELECT d.oid, pg_encoding_to_char(d.encoding) AS encoding, d.datcollate, d.datctype, d.datconnlimit,
    to_jsonb(d) ->> 'datlocprovider' AS provider,
    coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') AS locale,
    pg_get_userbyid(d.datdba) AS owner, t.spcname AS tablespace, pg_database_size(d.oid) AS bytes,
    pg_has_role(d.datdba, 'USAGE') AS is_ours, r.rolcreatedb OR r.rolsuper AS may_create, current_user::text AS us
FROM pg_database AS d JOIN pg_tablespace AS t ON t.oid = d.dattablespace
JOIN pg_roles AS r ON r.rolname = current_user WHERE d.datname = $1
"""

#: Settings whose value is a list of names; the catalogue has them quoted each (pg_dump's variable_is_guc_list_quote).
_LISTS = frozenset(
    ("local_preload_libraries", "search_path", "session_preload_libraries", "shared_preload_libraries",
     "temp_tablespaces", "unix_socket_directories")
)  # fmt: skip

_SETTINGS = """
SELECT s.setting, r.rolname AS role FROM pg_db_role_setting AS d
JOIN pg_database AS b ON b.oid = d.setdatabase CROSS JOIN unnest(d.setconfig) AS s(setting)
LEFT JOIN pg_roles AS r ON r.oid = d.setrole WHERE b.datname = $1
"""
_GRANTS = """
SELECT r.rolname AS role, a.privilege_type AS privilege, a.is_grantable
FROM pg_database AS b CROSS JOIN aclexplode(b.datacl) AS a LEFT JOIN pg_roles AS r ON r.oid = a.grantee
WHERE b.datname = $1 AND a.grantee <> b.datdba
"""


@dataclass(frozen=True, slots=True)
class Scratch:
    """A scratch database, for as long as the block that made it."""

    name: str
    target: ConnectTarget


def quoted(name: str) -> str:
    """Return an identifier as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: str) -> str:
    """Return a text as SQL takes it, for statements that take no parameters."""
    text = value.replace("'", "''")
    return f"E'{text.replace(chr(92), chr(92) * 2)}'" if "\\" in text else f"'{text}'"


def stamp() -> str:
    """Return what tells one restore or drill from all others: the time, UTC, and four letters."""
    return f"{datetime.now(UTC):%Y%m%d_%H%M%S}_{secrets.token_hex(2)}"


def beside(database: str, purpose: str, mark: str) -> str:
    """Return the name of a database of `database`'s, at most 63 bytes long."""
    return f"{_base(database)}_{purpose}_{mark}"


def _base(database: str) -> str:
    room = _NAME_BYTES - len("_restore_20260102_030405_9f3c")
    if len(database.encode()) <= room:
        return database
    # Two long names that begin alike must not take each other's databases for their own.
    return (
        database.encode()[: room - 7].decode(errors="ignore") + "_" + hashlib.sha256(database.encode()).hexdigest()[:6]
    )


async def there(connection: Connection, database: str, *purposes: str) -> list[str]:
    """Return the databases beside `database` that serve one of these purposes, oldest first."""
    fits = re.compile(rf"{re.escape(_base(database))}_(?:{'|'.join(purposes)})_({_STAMP})")
    found = [fits.fullmatch(row["datname"]) for row in await connection.fetch("SELECT datname FROM pg_database")]
    return [match[0] for match in sorted(filter(None, found), key=lambda match: match[1])]


@contextlib.asynccontextmanager
async def connected(target: ConnectTarget) -> AsyncIterator[Connection]:
    """Lend a connection of our own to a database; an error in the block cuts it off, open transaction and all."""
    with translate_errors(f"database {target.database}"):
        async with asyncio.timeout(CONNECT_SECONDS):
            connection: Connection = await asyncpg.connect(
                **target.connect_kwargs(), timeout=CONNECT_SECONDS, command_timeout=STATEMENT_SECONDS
            )
        try:
            yield connection
            await connection.close(timeout=5)
        finally:
            if not connection.is_closed():
                connection.terminate()


async def home(live: ConnectTarget, database: str) -> ConnectTarget:
    """Return the address of a database of the same server to work from. Raises `ForbiddenHere` when there is none."""
    refused = ""
    for name in _HOMES:
        if name == database:
            continue
        target = live.with_database(name)
        try:
            async with connected(target) as connection:
                await connection.fetchval("SELECT 1")
        except DatabaseError as error:
            if error.sqlstate is None or error.sqlstate not in _NOT_FOR_US:
                raise
            refused = str(error)
        else:
            return target
    raise ForbiddenHere(f"the server lets us into no database but our own ({refused})")


async def permitted(connection: Connection, database: str, *, to_rename: bool) -> asyncpg.Record:
    """Return what the server says of a database. Raises `ForbiddenHere` when we may not make one like it.

    `to_rename`: neither when we may not rename it.
    """
    found = await connection.fetchrow(_PROPERTIES, database)
    if found is None:
        raise BackupError(f"database {database} is gone from the server: was it renamed?")
    if not found["may_create"]:
        raise ForbiddenHere(
            f"the database user {found['us']} may not make databases (ALTER ROLE {quoted(found['us'])} CREATEDB allows"
            " it)"
        )
    if to_rename and not found["is_ours"]:
        raise ForbiddenHere(
            f"database {database} belongs to {found['owner']}, and {found['us']} may not rename it"
            f" (ALTER DATABASE {quoted(database)} OWNER TO {quoted(found['us'])} allows it)"
        )
    return found


async def allowed(live: ConnectTarget, database: str, *, to_rename: bool) -> None:
    """Raise `ForbiddenHere` when the server does not allow what `scratch` and, `to_rename`, the swap need."""
    async with connected(await home(live, database)) as connection:
        await permitted(connection, database, to_rename=to_rename)


@contextlib.asynccontextmanager
async def scratch(live: ConnectTarget, database: str, purpose: str, mark: str) -> AsyncIterator[Scratch]:
    """Make an empty database like `database` beside it, and drop it after the block unless it has another name by then.

    First those are dropped that killed processes left. Raises `ForbiddenHere` when the server does not allow a second
    database, and `BackupError` while another restore of `database` is under way.
    """
    at = await home(live, database)
    name = beside(database, purpose, mark)
    async with connected(at) as connection:
        if purpose == RESTORE and not await _lock(connection, f"restore of {database}"):
            raise BackupError(f"another restore of {database} is under way: wait for its end")
        found = await permitted(connection, database, to_rename=purpose == RESTORE)
        await sweep(connection, database)
        await _lock(connection, name)
        try:
            await connection.execute(_create(name, found, connection.get_server_version().major))
            yield Scratch(name, live.with_database(name))
        finally:
            await _drop_at_last(at, connection, name)


async def sweep(connection: Connection, database: str) -> list[str]:
    """Drop the scratch databases that killed processes left beside `database`; return their names."""
    dropped: list[str] = []
    for name in await there(connection, database, RESTORE, DRILL):
        if not await _lock(connection, name):
            continue  # somebody works in it
        try:
            await drop(connection, name)
        except asyncpg.PostgresError as error:  # the next one may have more luck
            _log.warning("database %s, which a killed restore left, could not be dropped: %s", name, translate(error))
        else:
            _log.info("database %s, which a killed restore or drill left, was dropped", name)
            dropped.append(name)
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", _key(name))
    return dropped


async def drop(connection: Connection, name: str) -> None:
    """Drop a database, whoever is connected to it."""
    await connection.execute(f"DROP DATABASE IF EXISTS {quoted(name)} WITH (FORCE)")


async def _drop_at_last(at: ConnectTarget, connection: Connection, name: str) -> None:
    try:
        if not connection.is_closed():
            await drop(connection, name)
            return
        async with connected(at) as fresh:  # it has been idle for a while: a firewall may have forgotten it
            await drop(fresh, name)
    except (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        _log.warning("database %s could not be dropped, the next restore or drill does it: %s", name, translate(error))


async def _lock(connection: Connection, what: str) -> bool:
    """Take the advisory lock of a name for as long as the connection lives; False when another session has it."""
    return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", _key(what)))


def _key(what: str) -> int:
    digest = hashlib.sha256(f"guildbook {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _create(name: str, like: asyncpg.Record, major: int) -> str:
    """Return the statement that makes an empty database with the encoding, sorting, place and owner of another."""
    parts = [f"CREATE DATABASE {quoted(name)} TEMPLATE template0 OWNER {quoted(like['owner'])}"]
    parts.append(f"ENCODING {literal(like['encoding'])}")
    parts.append(f"LC_COLLATE {literal(like['datcollate'])} LC_CTYPE {literal(like['datctype'])}")
    provider, locale = like["provider"], like["locale"]
    if provider == "i" and locale:
        parts.append(f"LOCALE_PROVIDER icu ICU_LOCALE {literal(locale)}")
    elif provider == "b" and locale:
        parts.append(f"LOCALE_PROVIDER builtin BUILTIN_LOCALE {literal(locale)}")
    elif provider == "c" and major >= 15:
        parts.append("LOCALE_PROVIDER libc")
    if like["tablespace"] != "pg_default":
        parts.append(f"TABLESPACE {quoted(like['tablespace'])}")
    if like["datconnlimit"] >= 0:
        parts.append(f"CONNECTION LIMIT {like['datconnlimit']}")
    return " ".join(parts)


async def carry_over(connection: Connection, database: str, scratch: str) -> list[str]:
    """Give `scratch` the settings and grants of `database`; return what could not be given, as lines."""
    statements = [_setting(scratch, row) for row in await connection.fetch(_SETTINGS, database)]
    if await connection.fetchval("SELECT datacl IS NOT NULL FROM pg_database WHERE datname = $1", database):
        statements.append(f"REVOKE ALL ON DATABASE {quoted(scratch)} FROM PUBLIC")
        statements += [_grant(scratch, row) for row in await connection.fetch(_GRANTS, database)]
    failed: list[str] = []
    for statement in statements:
        try:
            await connection.execute(statement)
        except asyncpg.PostgresError as error:
            failed.append(f"{statement.replace(quoted(scratch), quoted(database))}: {translate(error)}")
    return failed


def _setting(scratch: str, row: asyncpg.Record) -> str:
    name, _, value = row["setting"].partition("=")
    at = f"DATABASE {quoted(scratch)}"
    who = f"ALTER {at}" if row["role"] is None else f"ALTER ROLE {quoted(row['role'])} IN {at}"
    return f"{who} SET {name} TO {_listed(value) if name in _LISTS else literal(value)}"


def _listed(value: str) -> str:
    """Take a list of names apart as the catalogue has it, and put it together as SQL takes it."""
    names, name, is_quoted = [], "", False
    for letter in value:
        if letter == '"':
            is_quoted = not is_quoted
        elif letter == "," and not is_quoted:
            names.append(name.strip())
            name = ""
        else:
            name += letter
    return ", ".join(literal(name) for name in [*names, name.strip()])


def _grant(scratch: str, row: asyncpg.Record) -> str:
    role = "PUBLIC" if row["role"] is None else quoted(row["role"])
    option = " WITH GRANT OPTION" if row["is_grantable"] else ""
    return f"GRANT {row['privilege']} ON DATABASE {quoted(scratch)} TO {role}{option}"

"""Scratch databases: databases next to the live one, which a restore of the whole database puts in its place.

Their names tell their purpose: `guildbook_restore_20260102_030405_9f3c` is a scratch database, `…_before_…` the former
live database that a restore replaced. The creator of a scratch database holds an advisory lock on its name in the
maintenance database. One that nobody holds belonged to a killed process; the next such restore drops it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg

from utils.database import ConnectTarget
from utils.database.sessions import Connection, connect
from utils.database.sql import quote_identifier, quote_literal
from utils.exceptions import BackupError, DatabaseError, ForbiddenHere, translate
from utils.operations.backup.scratch.locks import drop_abandoned, lock, try_to_drop

_log = logging.getLogger(__name__)

RESTORE, BEFORE = "restore", "before"
#: Databases that every server has. A session in one of them can rename the live database; a session in the live one
#: cannot (PostgreSQL manual, 23.3).
_MAINTENANCE_DATABASES = ("postgres", "template1")
#: PostgreSQL truncates longer identifiers, in bytes (manual, 4.1.1).
_MAX_NAME_BYTES = 63
_SUFFIX = r"\d{8}_\d{6}_[0-9a-f]{4}"
#: SQLSTATEs of a server that refuses us one database (PostgreSQL manual, appendix A).
_DATABASE_REFUSED = ("3D000", "28000", "28P01", "42501", "55000", "08P01")

_PROPERTIES = """
SELECT d.oid, pg_encoding_to_char(d.encoding) AS encoding, d.datcollate, d.datctype, d.datconnlimit,
    to_jsonb(d) ->> 'datlocprovider' AS provider,
    coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale') AS locale,
    pg_get_userbyid(d.datdba) AS owner, t.spcname AS tablespace, pg_database_size(d.oid) AS bytes,
    pg_has_role(d.datdba, 'USAGE') AS is_owner, r.rolcreatedb OR r.rolsuper AS can_create, current_user::text AS role
FROM pg_database AS d JOIN pg_tablespace AS t ON t.oid = d.dattablespace
JOIN pg_roles AS r ON r.rolname = current_user WHERE d.datname = $1
"""

#: Settings whose value is a list of names, each quoted in the catalogue (pg_dump's variable_is_guc_list_quote).
_LIST_SETTINGS = frozenset(
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
class ScratchDatabase:
    """A scratch database, inside the block that created it."""

    name: str
    target: ConnectTarget


# --- names


def scratch_name(database: str, purpose: str, suffix: str) -> str:
    """Return the name of a database next to `database`, at most 63 bytes long."""
    return f"{_name_prefix(database)}_{purpose}_{suffix}"


def _name_prefix(database: str) -> str:
    limit = _MAX_NAME_BYTES - len("_restore_20260102_030405_9f3c")
    if len(database.encode()) <= limit:
        return database
    # A hash keeps databases apart whose long names start alike.
    digest = hashlib.sha256(database.encode()).hexdigest()[:6]
    return f"{database.encode()[: limit - 7].decode(errors='ignore')}_{digest}"


async def list_databases(connection: Connection, database: str, *purposes: str) -> list[str]:
    """Return the names of the databases next to `database` with one of these purposes, oldest first."""
    pattern = re.compile(rf"{re.escape(_name_prefix(database))}_(?:{'|'.join(purposes)})_({_SUFFIX})")
    matches = [pattern.fullmatch(row["datname"]) for row in await connection.fetch("SELECT datname FROM pg_database")]
    return [match[0] for match in sorted(filter(None, matches), key=lambda match: match[1])]


# --- connections and privileges


async def maintenance_target(live: ConnectTarget, database: str) -> ConnectTarget:
    """Return the address of another database on the same server. Raises `ForbiddenHere` if we may enter none."""
    reason = ""
    for name in _MAINTENANCE_DATABASES:
        if name == database:
            continue
        target = live.with_database(name)
        try:
            async with connect(target) as connection:
                await connection.fetchval("SELECT 1")
        except DatabaseError as error:
            if error.sqlstate is None or error.sqlstate not in _DATABASE_REFUSED:
                raise
            reason = str(error)
        else:
            return target
    raise ForbiddenHere(f"the server allows connections to no database but {database} ({reason})")


async def check_privileges(live: ConnectTarget, database: str) -> None:
    """Raise `ForbiddenHere` unless we may create a database like `database` and rename it."""
    async with connect(await maintenance_target(live, database)) as connection:
        await _read_properties(connection, database)


async def _read_properties(connection: Connection, database: str) -> asyncpg.Record:
    """Return the properties of a database that a scratch one copies. Raises as `check_privileges` does."""
    properties = await connection.fetchrow(_PROPERTIES, database)
    if properties is None:
        raise BackupError(f"database {database} no longer exists: was it renamed?")
    role = properties["role"]
    if not properties["can_create"]:
        raise ForbiddenHere(
            f"the database user {role} may not create databases (to allow it: ALTER ROLE {quote_identifier(role)}"
            " CREATEDB)"
        )
    if not properties["is_owner"]:
        raise ForbiddenHere(
            f"database {database} belongs to {properties['owner']}, and {role} may not rename it (to allow it: ALTER"
            f" DATABASE {quote_identifier(database)} OWNER TO {quote_identifier(role)})"
        )
    return properties


# --- creating and dropping


@contextlib.asynccontextmanager
async def scratch_database(live: ConnectTarget, database: str, suffix: str) -> AsyncIterator[ScratchDatabase]:
    """Create an empty database like `database`, and drop it after the block unless it has been renamed.

    Leftovers of killed processes are dropped first. Raises `ForbiddenHere` if the server does not allow a second
    database, and `BackupError` while another restore of `database` is running.
    """
    maintenance = await maintenance_target(live, database)
    name = scratch_name(database, RESTORE, suffix)
    async with connect(maintenance) as connection:
        if not await lock(connection, f"restore of {database}"):
            raise BackupError(f"another restore of {database} is running: wait until it ends")
        properties = await _read_properties(connection, database)
        await drop_leftovers(connection, database)
        await lock(connection, name)
        try:
            await connection.execute(_create_statement(name, properties, connection.get_server_version().major))
            yield ScratchDatabase(name, live.with_database(name))
        finally:
            await try_to_drop(maintenance, connection, name, _drop_statement(name))


async def drop_leftovers(connection: Connection, database: str) -> None:
    """Drop the scratch databases that killed processes left next to `database`."""
    names = await list_databases(connection, database, RESTORE)
    await drop_abandoned(connection, {name: _drop_statement(name) for name in names})


async def drop(connection: Connection, name: str) -> None:
    """Drop a database and end the sessions in it."""
    await connection.execute(_drop_statement(name))


def _drop_statement(name: str) -> str:
    return f"DROP DATABASE IF EXISTS {quote_identifier(name)} WITH (FORCE)"


def _create_statement(name: str, properties: asyncpg.Record, major: int) -> str:
    """Return the statement that creates an empty database with the properties of another."""
    parts = [f"CREATE DATABASE {quote_identifier(name)} TEMPLATE template0"]
    parts.append(f"OWNER {quote_identifier(properties['owner'])} ENCODING {quote_literal(properties['encoding'])}")
    collate, ctype = quote_literal(properties["datcollate"]), quote_literal(properties["datctype"])
    parts.append(f"LC_COLLATE {collate} LC_CTYPE {ctype}")
    provider, locale = properties["provider"], properties["locale"]
    if provider == "i" and locale:
        parts.append(f"LOCALE_PROVIDER icu ICU_LOCALE {quote_literal(locale)}")
    elif provider == "b" and locale:
        parts.append(f"LOCALE_PROVIDER builtin BUILTIN_LOCALE {quote_literal(locale)}")
    elif provider == "c" and major >= 15:
        parts.append("LOCALE_PROVIDER libc")
    if properties["tablespace"] != "pg_default":
        parts.append(f"TABLESPACE {quote_identifier(properties['tablespace'])}")
    if properties["datconnlimit"] >= 0:
        parts.append(f"CONNECTION LIMIT {properties['datconnlimit']}")
    return " ".join(parts)


# --- settings and grants


async def copy_settings(connection: Connection, database: str, scratch: str) -> list[str]:
    """Copy the settings of `database` and the grants on it to `scratch`; return one line for each that failed."""
    statements = [_setting_statement(scratch, row) for row in await connection.fetch(_SETTINGS, database)]
    if await connection.fetchval("SELECT datacl IS NOT NULL FROM pg_database WHERE datname = $1", database):
        statements.append(f"REVOKE ALL ON DATABASE {quote_identifier(scratch)} FROM PUBLIC")
        statements += [_grant_statement(scratch, row) for row in await connection.fetch(_GRANTS, database)]
    failed: list[str] = []
    for statement in statements:
        try:
            await connection.execute(statement)
        except asyncpg.PostgresError as error:
            shown = statement.replace(quote_identifier(scratch), quote_identifier(database))
            failed.append(f"{shown}: {translate(error)}")
    return failed


def _setting_statement(scratch: str, row: asyncpg.Record) -> str:
    name, _, value = row["setting"].partition("=")
    database = f"DATABASE {quote_identifier(scratch)}"
    subject = database if row["role"] is None else f"ROLE {quote_identifier(row['role'])} IN {database}"
    return f"ALTER {subject} SET {name} TO {_list_value(value) if name in _LIST_SETTINGS else quote_literal(value)}"


def _list_value(value: str) -> str:
    """Return a list of names, quoted as identifiers in the catalogue, as the literals that SET takes."""
    names, name, is_quoted = [], "", False
    for character in value:
        if character == '"':
            is_quoted = not is_quoted
        elif character == "," and not is_quoted:
            names.append(name.strip())
            name = ""
        else:
            name += character
    return ", ".join(quote_literal(name) for name in [*names, name.strip()])


def _grant_statement(scratch: str, row: asyncpg.Record) -> str:
    role = "PUBLIC" if row["role"] is None else quote_identifier(row["role"])
    option = " WITH GRANT OPTION" if row["is_grantable"] else ""
    return f"GRANT {row['privilege']} ON DATABASE {quote_identifier(scratch)} TO {role}{option}"

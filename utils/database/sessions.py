"""What every session of ours begins with, sessions outside of a pool, and whether a pooler is before the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import asyncpg
import orjson

from utils.database.target import ConnectTarget
from utils.exceptions import DRIVER_ERRORS, translate_errors

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection

#: Seconds for one attempt to connect.
ATTEMPT_SECONDS = 10.0
#: Seconds for a statement of a session outside of a pool, which may have to wait for a checkpoint.
STATEMENT_SECONDS = 300.0
#: Seconds after which the server ends a transaction that its process left idle: one that was suspended holds locks.
IDLE_IN_TRANSACTION_SECONDS = 3_600


@contextlib.asynccontextmanager
async def connect(target: ConnectTarget) -> AsyncIterator[Connection]:
    """Yield a session outside of any pool; an error in the block terminates it, with any open transaction."""
    with translate_errors(f"database {target.database}"):
        async with asyncio.timeout(ATTEMPT_SECONDS):
            connection: Connection = await asyncpg.connect(
                **target.connect_kwargs(), timeout=ATTEMPT_SECONDS, command_timeout=STATEMENT_SECONDS
            )
        try:
            await apply_settings(connection)
            yield connection
            await connection.close(timeout=5)
        finally:
            if not connection.is_closed():
                connection.terminate()


async def is_behind_pooler(target: ConnectTarget) -> bool:
    """Connect, and return whether a pooler answered the handshake. Raises the driver's errors.

    Nothing is prepared under a name: the backend may have a statement of that name from somebody else.
    """
    # A pooler refuses a search_path as a start-up parameter.
    settings = {key: value for key, value in target.server_settings.items() if key != "search_path"}
    bare = replace(target, schema=None, placement=None, server_settings=settings)
    connection: asyncpg.Connection[asyncpg.Record] = await asyncpg.connect(
        **bare.connect_kwargs() | {"statement_cache_size": 0}, timeout=ATTEMPT_SECONDS, command_timeout=ATTEMPT_SECONDS
    )
    try:
        return bool(await connection.fetchval("SELECT pg_backend_pid()") != connection.get_server_pid())
    finally:
        with contextlib.suppress(*DRIVER_ERRORS):
            await connection.close(timeout=1.0)


def session_settings(conn: Any, *, local: bool = False) -> str:
    """Return the statement that replaces settings which a role or a database may have for its sessions.

    Statements have time limits of their own, on our side. Types that the catalog's functions return are not quoted,
    because SQLAlchemy does not know them with quotes. `local`: for the current transaction alone.
    """
    settings: dict[str, int | str] = {"statement_timeout": 0, "lock_timeout": 0, "quote_all_identifiers": "off"}
    settings["idle_in_transaction_session_timeout"] = IDLE_IN_TRANSACTION_SECONDS * 1000
    if conn.get_server_version().major >= 14:
        settings["idle_session_timeout"] = 0
    if conn.get_server_version().major >= 17:
        settings["transaction_timeout"] = 0
    calls = (f"set_config('{name}', '{value}', {local})" for name, value in settings.items())
    return f"SELECT {', '.join(calls)};"


async def apply_settings(conn: Any) -> None:
    """Replace settings which a role or a database may have, for a session."""
    await conn.execute(session_settings(conn))


async def set_codecs(conn: Any) -> None:
    """Convert json and jsonb to and from Python objects (in binary, the only format that COPY uses)."""
    await conn.set_type_codec(
        "jsonb", schema="pg_catalog", format="binary",
        encoder=lambda value: b"\x01" + orjson.dumps(value), decoder=lambda data: orjson.loads(data[1:]),
    )  # fmt: skip
    await conn.set_type_codec(
        "json", schema="pg_catalog", format="binary", encoder=orjson.dumps, decoder=orjson.loads
    )  # fmt: skip

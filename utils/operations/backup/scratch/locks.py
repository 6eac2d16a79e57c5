"""Advisory locks: one restore at a time, and what a killed process left is told from what a living one uses."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime

import asyncpg

from utils.database import ConnectTarget
from utils.database.sessions import ATTEMPT_SECONDS, Connection, connect
from utils.exceptions import DRIVER_ERRORS, BackupError, DatabaseError, translate

_log = logging.getLogger(__name__)

#: The advisory lock in the live database that restores in place share, and that one of the whole database has alone.
RESTORE_LOCK = "restore"


def new_suffix() -> str:
    """Return a unique end for the name of something scratch: the time in UTC, and random digits."""
    return f"{datetime.now(UTC):%Y%m%d_%H%M%S}_{secrets.token_hex(2)}"


async def lock(connection: Connection, name: str, *, is_shared: bool = False) -> bool:
    """Take the advisory lock of a name until the connection ends; False if another session holds it.

    Sessions with `is_shared` keep only those without from taking it.
    """
    function = "pg_try_advisory_lock_shared" if is_shared else "pg_try_advisory_lock"
    return bool(await connection.fetchval(f"SELECT {function}($1)", _lock_key(name)))


async def lock_for_restore(connection: Connection, main: str | None = None) -> None:
    """Keep other restores of the database of a connection out until it ends.

    main: the schema of the main tables, if only their rows are replaced; other Guildbooks in the database may then
    be restored meanwhile. None: the whole database. Raises `BackupError` while another restore is running.
    """
    is_free = await lock(connection, RESTORE_LOCK, is_shared=main is not None)
    if not is_free or (main is not None and not await lock(connection, f"restore of {main}")):
        raise BackupError("another restore of this database is running: wait until it ends")


@contextlib.asynccontextmanager
async def without_other_restores(live: ConnectTarget) -> AsyncIterator[None]:
    """Keep all other restores of a database out during the block. Raises `BackupError` while one is running."""
    async with connect(live) as connection:
        await lock_for_restore(connection)
        try:
            yield
        finally:
            # A firewall may have closed the idle connection: then the lock is gone, and nobody answers.
            with contextlib.suppress(*DRIVER_ERRORS):
                async with asyncio.timeout(ATTEMPT_SECONDS):
                    await unlock(connection, RESTORE_LOCK)
            connection.terminate()


async def unlock(connection: Connection, name: str) -> None:
    """Release the advisory lock of a name."""
    await connection.execute("SELECT pg_advisory_unlock($1)", _lock_key(name))


def _lock_key(name: str) -> int:
    digest = hashlib.sha256(f"guildbook {name}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


async def drop_abandoned(connection: Connection, statements: Mapping[str, str]) -> None:
    """Run the statements that drop what killed processes left, by the name that a living one would have locked.

    A failure is logged: the next restore tries again.
    """
    for name, statement in statements.items():
        if not await lock(connection, name):
            continue  # its owner is alive
        try:
            await connection.execute(statement)
        except asyncpg.PostgresError as error:
            _log.warning("could not drop %s, left by a killed process: %s", name, translate(error))
        else:
            _log.info("dropped %s, left by a killed process", name)
        finally:
            await unlock(connection, name)


async def try_to_drop(target: ConnectTarget, connection: Connection, name: str, statement: str) -> None:
    """Run the statement that drops what this process made. A failure is logged: the next restore tries again."""
    try:
        if not connection.is_closed():
            await connection.execute(statement)
            return
        async with connect(target) as fresh:  # a firewall may have closed the idle connection
            await fresh.execute(statement)
    except (DatabaseError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        _log.warning("could not drop %s, the next restore will: %s", name, translate(error))

"""Which Discord application the database belongs to.

All SQL on `ops.application` is in this module.
"""

from __future__ import annotations

from typing import Any

from utils.database import Connection, Pool
from utils.exceptions import MISSING_TABLE, DatabaseError

_EXISTS = "SELECT to_regclass('ops.application') IS NOT NULL"
_OWNER = "SELECT id FROM ops.application LIMIT 1"
#: Returns the application that the database belongs to: $1 if it belonged to none.
_CLAIM = """
WITH claimed AS (INSERT INTO ops.application (id) VALUES ($1) ON CONFLICT DO NOTHING RETURNING id)
SELECT id FROM claimed UNION ALL SELECT id FROM ops.application LIMIT 1
"""
#: Returns the application that it belonged to.
_TRANSFER = """
WITH former AS (SELECT id FROM ops.application FOR UPDATE),
transferred AS (
    INSERT INTO ops.application (id) SELECT $1 FROM (SELECT count(*) FROM former) AS locked
    ON CONFLICT (is_only) DO UPDATE SET id = excluded.id, since = excluded.since
)
SELECT id FROM former
"""


async def has_table(pool: Pool | Connection | Any) -> bool:
    """Return whether `ops.application` exists; schemas older than revision 0006 lack it."""
    return bool(await pool.fetchval(_EXISTS))


async def fetch_owner(connection: Pool | Connection | Any) -> int | None:
    """Return the application that the database belongs to; None before its first login. Safe in a transaction."""
    if not await has_table(connection):
        return None
    owner: int | None = await connection.fetchval(_OWNER)
    return owner


async def claim(pool: Pool, application_id: int) -> int:
    """Record whose database it is, unless it belongs to an application already, and return that application."""
    try:
        owner: int = await pool.fetchval(_CLAIM, application_id)
    except DatabaseError as error:
        if error.sqlstate not in MISSING_TABLE:  # AUTO_MIGRATE is paused at an older revision
            raise
        return application_id
    return owner


async def transfer(pool: Pool, application_id: int) -> int | None:
    """Give the database to an application, and return the one that it belonged to."""
    former: int | None = await pool.fetchval(_TRANSFER, application_id)
    return former

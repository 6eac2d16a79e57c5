"""Which Discord application the database belongs to.

All SQL on `ops.application` is in this module.
"""

from __future__ import annotations

from typing import Any

from utils.database import Connection, Pool
from utils.exceptions import DatabaseError

_EXISTS = "SELECT to_regclass('ops.application') IS NOT NULL"
_OWNER = "SELECT id FROM ops.application LIMIT 1"
#: Returns the application that the database belongs to: $1 if it belonged to none.
_CLAIM = """
WITH claimed AS (INSERT INTO ops.application (id) VALUES ($1) ON CONFLICT DO NOTHING RETURNING id)
SELECT id FROM claimed UNION ALL SELECT id FROM ops.application LIMIT 1
"""
#: SQLSTATE of a missing table (PostgreSQL manual, appendix A).
_UNDEFINED_TABLE = "42P01"


async def fetch_owner(connection: Pool | Connection | Any) -> int | None:
    """Return the application that the database belongs to; None before its first login. Safe in a transaction."""
    if not await connection.fetchval(_EXISTS):
        return None
    owner: int | None = await connection.fetchval(_OWNER)
    return owner


async def claim(pool: Pool, application_id: int) -> int:
    """Record whose database it is, unless it belongs to an application already, and return that application."""
    try:
        owner: int = await pool.fetchval(_CLAIM, application_id)
    except DatabaseError as error:
        if error.sqlstate != _UNDEFINED_TABLE:  # AUTO_MIGRATE is paused at an older revision
            raise
        return application_id
    return owner

"""Indexes that a failed CREATE INDEX CONCURRENTLY left behind: every write keeps them up, and no query uses them.

PostgreSQL's manual (CREATE INDEX, "Building Indexes Concurrently"): such an index is marked as invalid, and the
recommended recovery is to drop it and to try again. What is being built this very moment is invalid too; whoever
builds it holds a lock on the table that a DROP INDEX has to wait for, and we do not wait long.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from utils.database import Pool
from utils.exceptions import translate

#: How long a drop waits for whoever uses the table; readers and writers wait behind it for as long.
LOCK_TIMEOUT = "3s"

#: Those of tables of ours: in the schema that tables are made in, and in `ops`. Indexes of partitioned tables are
#: invalid until each partition has its own, and are no leftovers; one that a constraint stands on goes with it.
_FIND = """
SELECT i.indexrelid::regclass::text AS name, i.indrelid::regclass::text AS "table"
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE NOT i.indisvalid AND c.relkind = 'i' AND NOT c.relispartition AND n.nspname IN (current_schema(), 'ops')
    AND pg_has_role(c.relowner, 'USAGE')
    AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conindid = i.indexrelid)
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What became of the invalid indexes, by name (quoted where SQL needs it)."""

    gone: tuple[str, ...] = ()
    #: Name and reason of those that stay.
    left: tuple[tuple[str, str], ...] = ()


async def find(database: Pool) -> list[str]:
    """Return the invalid indexes of our tables by name, quoted where SQL needs it. Raises `DatabaseError`."""
    return [row["name"] for row in await database.fetch(_FIND, timeout=10.0)]


def drop(connection: Connection) -> Dropped:
    """Drop the invalid indexes of our tables, each in a transaction of its own, and say which.

    One that somebody is building, or whose table is busy, is left; that is no error. Only under the migration lock.
    """
    names = [row.name for row in connection.execute(text(_FIND))]
    connection.commit()
    gone: list[str] = []
    left: list[tuple[str, str]] = []
    for name in names:
        try:
            connection.execute(text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": LOCK_TIMEOUT})
            connection.exec_driver_sql("DROP INDEX IF EXISTS " + name)  # quoted by the server (regclass)
            connection.commit()
        except DBAPIError as exc:
            connection.rollback()
            left.append((name, str(translate(exc) or exc)))
        else:
            gone.append(name)
    return Dropped(tuple(gone), tuple(left))

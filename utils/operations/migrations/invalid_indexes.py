"""Indexes that a failed CREATE INDEX CONCURRENTLY left behind: every write maintains them, and no query uses them.

PostgreSQL's manual (CREATE INDEX, "Building Indexes Concurrently") recommends to drop such an index and to try again.
An index that is being built is invalid too: its builder holds a lock on the table, for which DROP INDEX would wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from utils.database import Pool, ownership
from utils.database.placement import placement_of
from utils.exceptions import translate

#: How long a drop waits for the table's lock. Readers and writers queue behind it for as long.
LOCK_TIMEOUT = "3s"

#: Indexes of our tables ({schemas} and {names}). Left out: indexes of partitioned tables, which are invalid until every
#: partition has one, and indexes of constraints.
_FIND = """
SELECT i.indexrelid::regclass::text AS name, i.indrelid::regclass::text AS "table"
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
JOIN pg_class AS t ON t.oid = i.indrelid JOIN pg_namespace AS n ON n.oid = t.relnamespace
JOIN unnest(CAST({schemas} AS text[]), CAST({names} AS text[])) AS ours (schema, name)
    ON ours.schema = n.nspname AND ours.name = t.relname
WHERE NOT i.indisvalid AND c.relkind = 'i' AND NOT c.relispartition AND pg_has_role(c.relowner, 'USAGE')
    AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conindid = i.indexrelid)
ORDER BY 1
"""
_FIND_BY_POOL = _FIND.format(schemas="$1", names="$2")
_FIND_BY_CONNECTION = _FIND.format(schemas=":schemas", names=":names")


@dataclass(frozen=True, slots=True)
class DroppedIndexes:
    """The invalid indexes that an upgrade found, by name (quoted where SQL needs it)."""

    dropped: tuple[str, ...] = ()
    #: Name and error of those that could not be dropped.
    remaining: tuple[tuple[str, str], ...] = ()


async def find(pool: Pool) -> list[str]:
    """Return the names of our tables' invalid indexes, quoted where SQL needs it. Raises `DatabaseError`."""
    tables = ownership.owned().qualified(pool.placement)
    names = [schema for schema, _ in tables], [name for _, name in tables]
    return [row["name"] for row in await pool.fetch(_FIND_BY_POOL, *names, timeout=10.0)]


def drop(connection: Connection, *, lock_timeout: str = LOCK_TIMEOUT) -> DroppedIndexes:
    """Drop our tables' invalid indexes, each in its own transaction. The caller holds the migration lock.

    An index that is being built, or whose table stays locked, is left and reported; that is no error.
    """
    tables = ownership.owned().qualified(placement_of(connection))
    ours = {"schemas": [schema for schema, _ in tables], "names": [name for _, name in tables]}
    names = [row.name for row in connection.execute(text(_FIND_BY_CONNECTION), ours)]
    connection.commit()
    dropped: list[str] = []
    remaining: list[tuple[str, str]] = []
    for name in names:
        try:
            connection.execute(text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": lock_timeout})
            connection.exec_driver_sql("DROP INDEX IF EXISTS " + name)  # quoted by the server (regclass)
            connection.commit()
        except DBAPIError as exc:
            connection.rollback()
            remaining.append((name, str(translate(exc) or exc)))
        else:
            dropped.append(name)
    return DroppedIndexes(tuple(dropped), tuple(remaining))

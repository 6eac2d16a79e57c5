"""Which sessions hold the locks that a statement waited for in vain."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Literal

import asyncpg

from utils.database.sessions import ATTEMPT_SECONDS, apply_settings
from utils.database.target import ConnectTarget
from utils.exceptions import GuildbookError, translate_errors

_log = logging.getLogger(__name__)

#: SQLSTATEs of a lock that was not available in time, and of a deadlock (PostgreSQL manual, appendix A).
LOCK_STATES = ("55P03", "40P01")
#: Sessions that a message names.
SHOWN = 3

Mode = Literal["ACCESS SHARE", "SHARE UPDATE EXCLUSIVE", "SHARE", "EXCLUSIVE", "ACCESS EXCLUSIVE"]
_STRONG = ("ShareRowExclusiveLock", "ExclusiveLock", "AccessExclusiveLock")
#: The modes that conflict with a mode (PostgreSQL manual, table 13.2).
_CONFLICTS: dict[Mode, tuple[str, ...]] = {
    "ACCESS SHARE": ("AccessExclusiveLock",),
    "SHARE UPDATE EXCLUSIVE": ("ShareUpdateExclusiveLock", "ShareLock", *_STRONG),
    "SHARE": ("RowExclusiveLock", "ShareUpdateExclusiveLock", *_STRONG),
    "EXCLUSIVE": ("RowShareLock", "RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock", *_STRONG),
    "ACCESS EXCLUSIVE": (
        "AccessShareLock", "RowShareLock", "RowExclusiveLock", "ShareUpdateExclusiveLock", "ShareLock", *_STRONG,
    ),
}  # fmt: skip
#: One line a session, the oldest transaction first. A lock without a process belongs to a prepared transaction.
_HOLDERS = """
WITH RECURSIVE asked AS (
    SELECT DISTINCT to_regclass(name)::oid AS oid FROM unnest($1::text[]) AS name WHERE to_regclass(name) IS NOT NULL
    UNION
    SELECT related.oid FROM asked, LATERAL (
        SELECT inhrelid FROM pg_inherits WHERE inhparent = asked.oid
        UNION ALL SELECT indrelid FROM pg_index WHERE indexrelid = asked.oid
    ) AS related (oid)
)
SELECT format('%s is locked by %s', (array_agg(l.relation::regclass::text ORDER BY l.relation))[1],
    CASE WHEN l.pid IS NULL THEN 'a prepared transaction (see pg_prepared_xacts)'
    ELSE format('process %s (%s)%s', l.pid, coalesce(nullif(a.application_name, ''), a.usename, 'unnamed'),
        CASE WHEN a.xact_start IS NOT NULL THEN format(', whose transaction began %s s ago (%s)',
            floor(extract(epoch FROM greatest(clock_timestamp() - a.xact_start, interval '0'))), a.state) END
    ) END) AS line
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.granted AND l.locktype = 'relation' AND l.mode = ANY ($2::text[])
    AND l.pid IS DISTINCT FROM pg_backend_pid()
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND l.relation IN (SELECT oid FROM asked)
GROUP BY l.pid, l.virtualtransaction, a.application_name, a.usename, a.state, a.xact_start
ORDER BY a.xact_start NULLS LAST, l.pid LIMIT $3
"""
#: The session that holds an advisory lock, whose key is {key}.
ADVISORY_HOLDER = """
SELECT format('process %s (%s)', l.pid, coalesce(nullif(a.application_name, ''), a.usename, 'unnamed'))
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.granted AND l.locktype = 'advisory' AND l.objsubid = 1
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (CAST(l.classid AS bigint) << 32 | CAST(l.objid AS bigint)) = {key} LIMIT 1
"""


async def find_lock_holders(
    target: ConnectTarget, relations: Iterable[str], mode: Mode = "ACCESS EXCLUSIVE"
) -> list[str]:
    """Return one line for each session with a lock that conflicts with a mode, the oldest transaction first.

    `relations`: names of tables, indexes and views, quoted as in SQL; partitions count with their table, and the table
    of an index with that. Returns nothing if the database does not answer: this is for messages about something else.
    """
    try:
        with translate_errors("looking for locks"):
            connection = await asyncpg.connect(
                **target.connect_kwargs(), timeout=ATTEMPT_SECONDS, command_timeout=ATTEMPT_SECONDS
            )
            try:
                if not target.pooled:
                    await apply_settings(connection)
                rows = await connection.fetch(_HOLDERS, list(relations), list(_CONFLICTS[mode]), SHOWN)
            finally:
                await connection.close(timeout=1.0)
    except (GuildbookError, asyncpg.PostgresError) as exc:
        _log.debug("could not look for locks: %s", exc)
        return []
    return [row["line"] for row in rows]


async def describe_lock_holders(
    target: ConnectTarget, relations: Iterable[str], mode: Mode = "ACCESS EXCLUSIVE"
) -> str:
    """Return the end of an error message that names these sessions and says what to do; empty if there are none."""
    found = await find_lock_holders(target, relations, mode)
    which = "that session" if len(found) == 1 else "these sessions"
    return f"; {'; '.join(found)}: end {which}, or try again later" if found else ""

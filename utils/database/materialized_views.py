"""Materialized views, refreshed in the order in which they depend on one another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from asyncpg import Record

from utils.database import ownership
from utils.database.placement import Placement
from utils.exceptions import MISSING_TABLE, DatabaseError

if TYPE_CHECKING:
    from utils.database.access import Database

_log = logging.getLogger(__name__)

#: Seconds for the refresh of one view.
REFRESH_SECONDS = 1_800.0

#: Schema, name, both together, both quoted, whether it is populated, and whether it can be refreshed concurrently: then
#: it also has a unique index over all rows on plain columns (PostgreSQL manual, REFRESH MATERIALIZED VIEW). Views that
#: others depend on come first.
VIEWS = """
WITH RECURSIVE found AS (
    SELECT c.oid, n.nspname AS schema, c.relname, n.nspname || '.' || c.relname AS name,
           format('%I.%I', n.nspname, c.relname) AS quoted,
           c.relispopulated AS is_populated, c.relispopulated AND EXISTS (
               SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
               AND i.indpred IS NULL AND i.indexprs IS NULL
           ) AS can_refresh_concurrently
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'm'
),
builds_on AS (
    SELECT DISTINCT r.ev_class AS view, d.refobjid AS base
    FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
    AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
),
depth AS (
    SELECT oid AS view, oid AS top, 0 AS steps FROM found
    UNION
    SELECT b.base, d.top, d.steps + 1 FROM depth d JOIN builds_on b USING (view) WHERE d.steps < 50
)
SELECT schema, relname, name, quoted, is_populated, can_refresh_concurrently, max(steps) AS steps
FROM found JOIN depth ON depth.top = found.oid
GROUP BY schema, relname, name, quoted, is_populated, can_refresh_concurrently ORDER BY steps, name
"""


#: When a view was refreshed. PostgreSQL records that nowhere: `last_analyze` is another matter, the file of a view
#: stays the same when it is refreshed concurrently, and comments belong to those who made a view. So it is a row of
#: `ops.positions`, as the change feed has one.
_RECORD = """
INSERT INTO ops.positions AS p (journal, position)
SELECT name, (extract(epoch FROM clock_timestamp()) * 1000)::bigint FROM unnest($1::text[]) AS name
ON CONFLICT (journal) DO UPDATE SET position = excluded.position, updated_at = clock_timestamp()
"""
#: Seconds since views were refreshed, by the names of their rows; below zero if the clock was set back since.
AGES = """
SELECT journal, extract(epoch FROM clock_timestamp() - updated_at)::float8 AS seconds
FROM ops.positions WHERE journal = ANY($1::text[])
"""


def record_name(placement: Placement, schema: str, name: str) -> str:
    """Return the name of the row of `ops.positions` that says when a view was refreshed."""
    return f"refresh of {placement.shown(schema, name)}"


async def record_refreshed(execute: Callable[[str, list[str]], Awaitable[object]], names: list[str]) -> None:
    """Record that views were refreshed just now. A failure is logged: they are refreshed all the same.

    execute: runs a statement with one argument. names: of `record_name`.
    """
    try:
        if names:
            await execute(_RECORD, names)
    except DatabaseError as error:
        if error.sqlstate not in MISSING_TABLE:  # there is no schema of ours yet
            _log.warning("could not record that materialized views were refreshed: %s", error)


async def refresh_each(
    views: Iterable[Record], execute: Callable[[str], Awaitable[object]]
) -> tuple[dict[str, float], dict[str, DatabaseError]]:
    """Refresh views, rows of `VIEWS`, concurrently where possible; return the seconds or the error of each by name."""
    seconds: dict[str, float] = {}
    failed: dict[str, DatabaseError] = {}
    for view in views:
        started = time.perf_counter()
        how = "CONCURRENTLY " if view["can_refresh_concurrently"] else ""
        try:
            await execute(f"REFRESH MATERIALIZED VIEW {how}{view['quoted']}")
        except DatabaseError as error:
            _log.warning("materialized view %s was not refreshed: %s", view["name"], error)
            failed[view["name"]] = error
        else:
            seconds[view["name"]] = time.perf_counter() - started
    return seconds, failed


async def refresh(db: Database, names: Iterable[str] | None) -> dict[str, float]:
    """Refresh views as `Database.refresh_materialized_views` documents it."""
    placement = db.pool.placement
    ours = set((await asyncio.to_thread(ownership.owned)).qualified_relations(placement))
    views = await db.fetch(VIEWS, use_cache=False)
    if names is None:
        views = [view for view in views if (view["schema"], view["relname"]) in ours]
    else:
        split = (name.rpartition(".") for name in names)
        asked = {f"{placement.resolve(schema or None)}.{name}" for schema, _, name in split}
        unknown = asked - {view["name"] for view in views}
        if unknown:
            raise DatabaseError(f"there is no materialized view {', '.join(sorted(unknown))}")
        views = [view for view in views if view["name"] in asked]
    seconds, failed = await refresh_each(views, lambda sql: db.execute(sql, timeout=REFRESH_SECONDS))
    done = [(view["schema"], view["relname"]) for view in views if view["name"] in seconds]
    await record_refreshed(db.execute, [record_name(placement, *view) for view in done if view in ours])
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise DatabaseError(f"{len(failed)} of {len(views)} materialized views were not refreshed: {reasons}")
    return seconds

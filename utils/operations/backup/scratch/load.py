"""Loads the rows of an archive into tables that nobody uses yet, and counts them there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import asyncpg

from utils.database import ConnectTarget, materialized_views, ownership
from utils.database.ownership import VERSION_TABLE
from utils.database.partitions import month_start, partitioned_tables
from utils.database.placement import Placement
from utils.database.sessions import Connection, connect
from utils.database.sql import quote_identifier
from utils.exceptions import BackupError, DatabaseError, DatabaseUnavailable, translate_errors
from utils.operations import migrations
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive.objects import Name, OwnTable, find_sequences, find_tables, owned_names, qualified
from utils.operations.backup.archive.reading import differences
from utils.operations.backup.archive.script import (
    Archive,
    Script,
    SequenceState,
    list_items,
    longest,
    open_script,
    table_of,
)
from utils.text import format_count

#: Fewest and most connections for loading and counting.
MIN_JOBS, MAX_JOBS = 2, 4
#: Seconds to count the rows of a table, or to analyze it.
TABLE_SECONDS = 3_600.0
#: Seconds to load one table with its indexes, and to check its foreign keys.
LOAD_SECONDS = 6 * 3_600.0
#: Rows from which a table is loaded frozen.
FREEZE_ROWS = 10_000
#: SQLSTATE class of a server without disk space or memory: that is not the backup's fault.
_NO_RESOURCES = "53"
#: Foreign keys of tables; those of partitions come with their tables.
FOREIGN_KEYS = """
SELECT r.conrelid::regclass::text AS table, quote_ident(r.conname) AS name, pg_get_constraintdef(r.oid) AS definition
FROM pg_constraint AS r WHERE r.contype = 'f' AND r.conparentid = 0
    AND r.conrelid = ANY(SELECT to_regclass(name)::oid FROM unnest($1::text[]) AS name) ORDER BY 1, 2
"""
#: Keys, exclusion constraints and other indexes of tables, with the statements that drop and make them; those of
#: partitions come with their tables. While an index (`index`) is made, others of its table can be made too, so that a
#: constraint (`constraint`) is added afterwards. `is_only_for_speed`: nothing is refused without it.
_INDEXES = """
SELECT number, name AS table, format('ALTER TABLE %s DROP CONSTRAINT %I', name, r.conname) AS drop,
    CASE WHEN uses_index THEN pg_get_indexdef(r.conindid) END AS index,
    format('ALTER TABLE %s ADD CONSTRAINT %I %s', name, r.conname, CASE WHEN uses_index THEN
        format('%s USING INDEX %I%s%s', CASE r.contype WHEN 'p' THEN 'PRIMARY KEY' ELSE 'UNIQUE' END, x.relname,
            CASE WHEN r.condeferrable THEN ' DEFERRABLE' END, CASE WHEN r.condeferred THEN ' INITIALLY DEFERRED' END)
        ELSE pg_get_constraintdef(r.oid) END) AS constraint,
    false AS is_only_for_speed
FROM unnest($1::text[]) WITH ORDINALITY AS t (name, number)
    JOIN pg_constraint AS r ON r.conrelid = to_regclass(name) AND r.contype IN ('p', 'u', 'x')
    JOIN pg_class AS c ON c.oid = r.conrelid JOIN pg_class AS x ON x.oid = r.conindid JOIN pg_am AS m ON m.oid = x.relam
    CROSS JOIN LATERAL (SELECT r.contype <> 'x' AND c.relkind = 'r' AND m.amname = 'btree' AS uses_index) AS how
UNION ALL
SELECT number, name, format('DROP INDEX %s', i.indexrelid::regclass),
    regexp_replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON '), NULL, NOT i.indisunique
FROM unnest($1::text[]) WITH ORDINALITY AS t (name, number) JOIN pg_index AS i ON i.indrelid = to_regclass(name)
WHERE NOT EXISTS (SELECT FROM pg_constraint AS r WHERE r.conindid = i.indexrelid AND r.contype IN ('p', 'u', 'x'))
ORDER BY number, is_only_for_speed
"""
_WITH_TRIGGERS = """
SELECT name FROM unnest($1::text[]) AS name
WHERE EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = to_regclass(name) AND NOT t.tgisinternal)
"""
ValueT = TypeVar("ValueT")
_ITEM = re.compile(r"\d+; \d+ \d+ TABLE DATA (.+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Tables of ours that nobody uses, in which an archive is loaded."""

    target: ConnectTarget
    schemas: Placement


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded and counted."""

    #: The loaded tables: the name that each has in its place, by that in the archive.
    tables: dict[Name, Name]
    #: The columns that the archive has of each, by the name in its place.
    columns: dict[Name, tuple[str, ...]]
    #: Number of rows in them.
    rows: int
    #: Tables of the archive that were left out because no revision known here makes them.
    left_out: list[str]


def describe_restored(
    archive: Archive,
    loaded: Loaded,
    database: str,
    revisions: Sequence[str],
    safety_id: str | None,
    why_none: str,
    *,
    what: str | None = None,
) -> list[str]:
    """Return what a restore says of the rows that are live now (`what`; None: all), and of the backup made before."""
    if what is None:
        what = f"{format_count(loaded.rows, 'row')} in {format_count(len(loaded.tables), 'table')}"
    lines = [
        f"Backup {archive.id} of {archive.made_at:%Y-%m-%d %H:%M} UTC is live in database {database}: {what}, all"
        " counted.",
        f"The database was backed up first: {safety_id}." if safety_id else why_none,
    ]
    if revisions:
        lines.append(f"The backup was migrated from revision {archive.revision} to {revisions[-1]}.")
    if loaded.left_out:
        lines.append(f"Left out, because no revision here makes them: {', '.join(loaded.left_out)}.")
    return lines


def jobs() -> int:
    """Return the number of connections to load with: one per core, within bounds."""
    return max(MIN_JOBS, min(MAX_JOBS, os.cpu_count() or MIN_JOBS))


async def make_place(
    archive: Archive,
    target: ConnectTarget,
    schemas: Placement,
    options: migrations.MigrationOptions = migrations.DEFAULTS,
) -> Place:
    """Make our tables as the revision of an archive has them, where there are none. Raises `MigrationError`."""
    for revision in (archive.revision or "").split(", "):
        await migrations.upgrade(target, revision, options=options)
    return Place(target, schemas)


def translated_names(names: Sequence[Name], schemas: Placement, into: Placement) -> dict[Name, Name]:
    """Return the names that tables of ours have in other schemas, by those that they have in `schemas`."""
    return {(schema, name): (into.resolve(schemas.spell(schema)), name) for schema, name in names}


def translated(values: Mapping[Name, ValueT], schemas: Placement, into: Placement) -> dict[Name, ValueT]:
    """Return values by the names that their tables or sequences have in other schemas."""
    names = translated_names(list(values), schemas, into)
    return {names[name]: value for name, value in values.items()}


async def load_and_check(
    archive: Archive,
    place: Place,
    *,
    only: Collection[Name] | None = None,
    with_indexes: bool = True,
    progress: Progress = ignore_progress,
) -> Loaded:
    """Replace the rows of the tables in a place by those of an archive.

    only: the tables of the archive to load; None: all. Without `with_indexes` the tables keep only those indexes that
    refuse rows. Raises `BackupError` unless the counts and the revision match.
    """
    ours = set(owned_names(archive.schemas, archive.revision, archive.packs))
    counts = {name: rows for name, rows in archive.counts.items() if name in ours and (only is None or name in only)}
    names = translated_names(list(counts), archive.schemas, place.schemas)
    progress(Step("restoring", 0, len(names), "tables"))
    async with connect(place.target) as connection:
        with translate_errors("preparing the scratch tables"):
            tables = await find_tables(connection, owned_names(place.schemas, archive.revision, archive.packs))
            has_version = any(name == VERSION_TABLE for _, name in counts)
            emptied = [one for one in tables if has_version or one.name != VERSION_TABLE]
            rows = {into: counts[name] for name, into in names.items()}
            emptied.sort(key=lambda one: -rows.get((one.schema, one.name), 0))  # the longest work first
            preparation = await _prepare(connection, emptied, with_indexes=with_indexes)
    existing = {(table.schema, table.name) for table in tables}
    loadable = {name: into for name, into in names.items() if into in existing}
    columns = await copy_rows(archive, place.target, loadable, progress=progress)
    await _finish(place.target, preparation)
    progress(Step("counting rows", 0, len(loadable), "tables"))
    found = await count(place.target, list(loadable.values()), progress=progress)
    problems = differences(
        {".".join(name): rows for name, rows in counts.items()},
        {".".join(name): found[into] for name, into in loadable.items()},
    )
    version = (place.schemas.main, VERSION_TABLE)
    if version in existing and (revision := await _revision(place)) != archive.revision:
        problems.insert(0, f"the schema is at revision {revision}, expected {archive.revision}")
    if problems:
        raise BackupError(
            f"backup {archive.id} was not restored as it was made: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. Use another backup"
        )
    left_out = [f"{schema}.{name}" for schema, name in archive.counts if (schema, name) not in ours and only is None]
    return Loaded(loadable, columns, sum(counts.values()), left_out)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """What was dropped before rows are loaded: the statements that bring it back, each with its table."""

    indexes: list[tuple[str, str]] = field(default_factory=list)
    #: Once the indexes of all tables are there.
    constraints: list[tuple[str, str]] = field(default_factory=list)
    #: Foreign keys and triggers, once all constraints are there.
    others: list[tuple[str, str]] = field(default_factory=list)


async def _prepare(connection: Connection, tables: Sequence[OwnTable], *, with_indexes: bool) -> _Preparation:
    """Empty tables, and drop what would slow down the loading or keep rows from being loaded in any order.

    What belongs to the first tables is brought back first.
    """
    names = [table.quoted for table in tables]
    found = _Preparation()
    for key in await connection.fetch(FOREIGN_KEYS, names):
        await connection.execute(f"ALTER TABLE {key['table']} DROP CONSTRAINT {key['name']}")
        statement = f"ALTER TABLE {key['table']} ADD CONSTRAINT {key['name']} {key['definition']}"
        found.others.append((key["table"], statement))
    for row in await connection.fetch(_WITH_TRIGGERS, names):
        await connection.execute(f"ALTER TABLE {row['name']} DISABLE TRIGGER USER")
        found.others.append((row["name"], f"ALTER TABLE {row['name']} ENABLE TRIGGER USER"))
    for row in await connection.fetch(_INDEXES, names):
        try:
            await connection.execute(row["drop"])
        except asyncpg.DependentObjectsStillExistError:  # a view groups by the key
            continue
        if row["index"] is not None and (with_indexes or not row["is_only_for_speed"]):
            found.indexes.append((row["table"], row["index"]))
        if row["constraint"] is not None:
            found.constraints.append((row["table"], row["constraint"]))
    await connection.execute(f"TRUNCATE {', '.join(names)}")
    return found


async def _finish(target: ConnectTarget, preparation: _Preparation) -> None:
    """Bring back what `_prepare` dropped, the indexes on several connections."""
    queue: deque[tuple[str, str]] = deque()

    async def work() -> None:
        async with connect(target) as connection:
            while queue:
                table, statement = queue.popleft()
                with _refused(f"the rows of {table} in the backup"):
                    await connection.execute(statement, timeout=LOAD_SECONDS)

    for statements, number in (
        (preparation.indexes, jobs()),
        (preparation.constraints, jobs()),
        (preparation.others, 1),
    ):
        queue.extend(statements)
        await _run_concurrently(work, min(number, len(queue)))


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Raise `BackupError` for rows that the server refuses, but not for a server that is unavailable or full."""
    try:
        with translate_errors(what):
            yield
    except DatabaseUnavailable:
        raise
    except DatabaseError as error:
        if (error.sqlstate or "").startswith(_NO_RESOURCES):
            raise
        raise BackupError(str(error)) from error


async def copy_rows(
    archive: Archive, target: ConnectTarget, names: Mapping[Name, Name], *, progress: Progress = ignore_progress
) -> dict[Name, tuple[str, ...]]:
    """Copy rows into existing tables, on several connections. `names`: where to, by the table's name in the archive.

    Returns the columns that were copied into each. Raises `BackupError` if the archive cannot be read, or the server
    refuses its rows.
    """
    shares = _share(await list_items(archive, "TABLE DATA"), archive.counts, names)
    columns: dict[Name, tuple[str, ...]] = {}

    async def work() -> None:
        items = shares.pop()
        async with connect(target) as connection, open_script(archive.file, archive.tools, items) as script:
            # Asynchronous commits are safe: nobody uses the tables yet, and the last commit syncs all of them.
            await connection.execute("SET synchronous_commit = off; SET xmloption = content")
            while (header := await script.next_table()) is not None:
                name = table_of(header.table, archive.counts)
                if name is None or name not in names:
                    async for _ in script.rows():
                        pass
                    continue
                is_frozen = header.table == name and archive.counts[name] >= FREEZE_ROWS
                await _copy_table(connection, names[name], header.columns, script, is_frozen=is_frozen)
                columns[names[name]] = header.columns
                progress(Step("restoring", len(columns), len(names), "tables"))

    await _run_concurrently(work, len(shares))
    return columns


async def _copy_table(
    connection: Connection, into: Name, columns: Sequence[str], script: Script, *, is_frozen: bool
) -> None:
    """Copy rows into a table, with `is_frozen` into an empty one that is not partitioned.

    Then the rows need not be marked as visible by their first reader, which would write all of the table again.
    """
    schema, name = into
    with _refused(f"loading {qualified(into)}"):
        async with connection.transaction():
            if is_frozen:
                await connection.execute(f"TRUNCATE {qualified(into)}")  # the server wants it in the same transaction
            await connection.copy_to_table(
                name, schema_name=schema, columns=columns, source=script.rows(), freeze=is_frozen, timeout=LOAD_SECONDS
            )


def _share(items: Sequence[str], counts: Mapping[Name, int], names: Mapping[Name, Name]) -> list[list[str]]:
    """Share the items of a table of contents among several readers, so that each has about as many rows."""
    by_table: dict[Name, list[int]] = {}
    for position, item in enumerate(items):
        match = _ITEM.match(item)
        assert match is not None, "it is a line with the rows of a table"
        # Schema and name are separated by a space, and followed by another one and the owner.
        table = longest(name for name in counts if f"{match[1]} ".startswith(" ".join(name)))
        if table is not None and table in names:
            by_table.setdefault(table, []).append(position)
    weighed = sorted(
        ((counts[table] / len(positions), position) for table, positions in by_table.items() for position in positions),
        reverse=True,
    )
    shares: list[tuple[float, list[int]]] = [(0.0, []) for _ in range(min(jobs(), len(weighed)))]
    for weight, position in weighed:
        index = min(range(len(shares)), key=lambda one: (shares[one][0], len(shares[one][1])))
        shares[index] = (shares[index][0] + weight, [*shares[index][1], position])
    return [[items[position] for position in sorted(positions)] for _, positions in shares]


async def list_months(archive: Archive) -> list[datetime]:
    """Return the first days of the months that an archive has partitions for."""
    found = {
        (int(match[1]), int(match[2]))
        for item in await list_items(archive, "TABLE DATA")
        for table in partitioned_tables()
        if (match := re.search(rf" {table}_y(\d{{4}})m(\d{{2}}) ", item)) is not None
    }
    return [month_start(year, month) for year, month in sorted(found)]


async def set_sequences(archive: Archive, place: Place) -> None:
    """Set the sequences of a place, which belong to no other tables, to the states in an archive."""
    states = await read_sequences(archive)
    names = translated_names(list(states), archive.schemas, place.schemas)
    async with connect(place.target) as connection:
        with translate_errors("setting the sequences"):
            tables = await find_tables(connection, owned_names(place.schemas, archive.revision, archive.packs))
            known = set(await find_sequences(connection, tables))
            for name, state in states.items():
                if names[name] in known:
                    await connection.execute(
                        "SELECT setval($1::text::regclass, $2, $3)",
                        qualified(names[name]),
                        state.last_value,
                        state.is_called,
                    )


async def read_sequences(archive: Archive) -> dict[Name, SequenceState]:
    """Return the states of the sequences in an archive."""
    items = await list_items(archive, "SEQUENCE SET")
    if not items:
        return {}
    async with open_script(archive.file, archive.tools, items) as script:
        return {name: state async for name, state in script.sequences()}


async def count(
    target: ConnectTarget,
    tables: Sequence[tuple[str, str]],
    *,
    timeout: float = TABLE_SECONDS,
    progress: Progress = ignore_progress,
) -> dict[tuple[str, str], int | None]:
    """Return the exact row count of each table (schema and name); None if it does not exist.

    Counts on several connections, largest tables first, each within `timeout` seconds.
    """
    async with connect(target) as connection:
        with translate_errors("counting rows"):
            rows = await connection.fetch(
                "SELECT w.schema, w.name, to_regclass(format('%I.%I', w.schema, w.name)) IS NOT NULL AS exists,"
                " pg_table_size(to_regclass(format('%I.%I', w.schema, w.name))) AS bytes"
                " FROM unnest($1::text[], $2::text[]) AS w(schema, name) ORDER BY bytes DESC NULLS LAST",
                [schema for schema, _ in tables],
                [name for _, name in tables],
                timeout=timeout,
            )
    counts: dict[tuple[str, str], int | None] = {}
    queue = deque((row["schema"], row["name"]) for row in rows if row["exists"])
    counts.update({(row["schema"], row["name"]): None for row in rows if not row["exists"]})

    async def work() -> None:
        async with connect(target) as connection:
            while queue:
                schema, name = table = queue.popleft()
                with translate_errors(f"counting {schema}.{name}"):
                    counts[table] = await connection.fetchval(
                        f"SELECT count(*) FROM {quote_identifier(schema)}.{quote_identifier(name)}",  # noqa: S608
                        timeout=timeout,
                    )
                progress(Step("counting rows", len(counts), len(tables), "tables"))

    await _run_concurrently(work, min(jobs(), len(queue)))
    return counts


async def _revision(place: Place) -> str | None:
    table = qualified((place.schemas.main, VERSION_TABLE))
    async with connect(place.target) as connection:
        with translate_errors("reading the revision"):
            rows = await connection.fetch(f"SELECT version_num FROM {table} ORDER BY 1")  # noqa: S608 - quoted
    return ", ".join(row["version_num"] for row in rows) or None


async def refresh_views(
    target: ConnectTarget, schemas: Placement, *, timeout: float = materialized_views.REFRESH_SECONDS
) -> None:
    """Refresh our materialized views, each within `timeout` seconds; concurrently where an index allows it.

    Raises `BackupError` after the last one if some could not be refreshed.
    """
    ours = set(ownership.owned().qualified_relations(schemas))
    async with connect(target) as connection:
        with translate_errors("looking for materialized views"):
            views = await connection.fetch(materialized_views.VIEWS)

        async def execute(sql: str) -> None:
            with translate_errors(sql):
                await connection.execute(sql, timeout=timeout)

        views = [view for view in views if (view["schema"], view["relname"]) in ours]
        seconds, failed = await materialized_views.refresh_each(views, execute)
        with translate_errors("recording the refreshed views"):
            done = [(view["schema"], view["relname"]) for view in views if view["name"] in seconds]
            names = [materialized_views.record_name(schemas, *view) for view in done]
            await materialized_views.record_refreshed(connection.execute, names)
    if failed:
        raise BackupError("; ".join(map(str, failed.values())))


async def analyze(target: ConnectTarget, names: Sequence[Name], *, timeout: float = TABLE_SECONDS) -> None:
    """Gather the planner's statistics of those of these tables that exist: archives do not contain them.

    Works on several connections, largest tables first, each within `timeout` seconds.
    """
    async with connect(target) as connection:
        with translate_errors("gathering statistics"):
            queue = deque(table.quoted for table in await find_tables(connection, names))

    async def work() -> None:
        async with connect(target) as connection:
            while queue:
                with translate_errors("gathering statistics"):
                    await connection.execute("ANALYZE " + queue.popleft(), timeout=timeout)

    await _run_concurrently(work, min(jobs(), len(queue)))


async def _run_concurrently(work: Callable[[], Coroutine[Any, Any, None]], number: int) -> None:
    """Run `number` copies of a coroutine function; the first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(work())
    except BaseExceptionGroup as group_error:
        raise group_error.exceptions[0] from None

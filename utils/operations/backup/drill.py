"""Prove that a backup can be restored, by restoring it beside the live database and dropping it again.

What came of it is kept beside the backup as `<id>.drill.json`: an object with `backup`, `at` (ISO 8601, UTC), `ok`,
`seconds`, `where` ("beside the live database" or "on a server of its own"), `tables` and `rows` (counted and as the
backup says, unless `problems` tells), `rows_read`, `rows_compared`, `rows_changed` (see `Sampled`), and `problems`, a
list of lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import Table

from models import Part, mirrored_tables, part_of
from utils.database import ConnectTarget, Pool
from utils.database.binaries import binaries
from utils.database.embedded import EmbeddedServer
from utils.database.sql import sql_type
from utils.exceptions import BackupError, DatabaseError, ForbiddenHere, translate_errors
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup import loading, scratch
from utils.operations.backup.scratch import Connection, connected, quoted
from utils.operations.backup.source import Archive, Backups

_log = logging.getLogger(__name__)

#: PostgreSQL's majors that the embedded server has (utils.database.binaries.py).
WHEEL = 16, 18
#: Rows of each table that are read, and compared where they can be.
SAMPLE_ROWS = 200


@dataclass(slots=True)
class Sampled:
    """What became of the rows that were looked at."""

    #: Rows that were read whole from the restored database.
    read: int = 0
    #: Those among them that the live database has too, last changed at the same moment by the same observation.
    compared: int = 0
    #: Those that it has in a newer version, or has no more: nothing can be said of them.
    changed: int = 0
    #: One line for each table with rows that differ though nothing changed them.
    different: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drill:
    """What came of a drill, as it is kept."""

    backup: str
    #: ISO 8601, UTC.
    at: str
    ok: bool
    seconds: float
    where: str
    tables: int
    rows: int
    rows_read: int = 0
    rows_compared: int = 0
    rows_changed: int = 0
    problems: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return it for people."""
        told = f"Backup {self.backup} {'came back whole' if self.ok else 'DID NOT COME BACK WHOLE'} {self.where}"
        lines = [f"{told}, in {self.seconds:.1f} s."]
        if self.ok:
            lines.append(f"{self.rows:,} rows in {self.tables} tables were counted, {self.rows_read:,} of them read.")
        if self.rows_compared:
            lines.append(
                f"{self.rows_compared:,} of these are the same in the live database, {self.rows_changed:,} have changed"
                " there since."
            )
        return [*lines, *self.problems]


async def drill(
    database: Pool, backups: Backups, which: str = "latest", *, progress: Progress = ignore_progress
) -> Outcome:
    """Restore a backup (its id, or "latest") where it touches nothing, look at it, and keep what came of it beside it.

    Raises `BackupError` when the backup cannot be had, or there is no place to restore it.
    """
    progress(Step("checking the backup"))
    async with backups.opened(which, database.server_version_num // 10_000, progress) as archive:
        done = await rehearse(database, archive, progress=progress)
    await backups.write_note(_note(done.backup), json.dumps(asdict(done), indent=2).encode())
    return Outcome("\n".join(done.lines()), asdict(done), ok=done.ok)


async def last_drill(backups: Backups, id: str) -> Drill | None:
    """Return what the last drill of a backup said; None: there was none, or its file cannot be read.

    Raises `BackupError` when the place where backups are kept cannot be reached.
    """
    content = await backups.read_note(_note(id))
    if content is None:
        return None
    try:
        values = json.loads(content)
        return Drill(**{**values, "problems": tuple(values["problems"])})
    except (ValueError, TypeError, KeyError) as error:
        _log.warning("the drill of backup %s cannot be read: %s", id, error)
        return None


def _note(id: str) -> str:
    return f"{id}.drill.json"


async def rehearse(database: Pool, archive: Archive, *, progress: Progress = ignore_progress) -> Drill:
    """Restore a backup beside the live database, or where that is forbidden on a server of its own, and look at it.

    Nothing of it is left afterwards. Raises `BackupError` when there is no place to restore it, and
    `DatabaseUnavailable` when the server went away; a backup that does not come back is what the drill tells.
    """
    started = time.monotonic()
    found, problems = Sampled(), []
    async with _place(database, archive) as (target, tools, live, where):
        try:
            await loading.load_and_check(replace(archive, tools=tools), target, progress=progress)
            progress(Step("reading rows"))
            found = await sample(target, live, list(archive.counts))
            problems += found.different
        except BackupError as error:
            problems.append(str(error))
    return Drill(
        backup=archive.id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        ok=not problems,
        seconds=round(time.monotonic() - started, 2),
        where=where,
        tables=len(archive.counts),
        rows=sum(archive.counts.values()),
        rows_read=found.read,
        rows_compared=found.compared,
        rows_changed=found.changed,
        problems=tuple(problems[:10]),
    )


@contextlib.asynccontextmanager
async def _place(
    database: Pool, archive: Archive
) -> AsyncIterator[tuple[ConnectTarget, Path, ConnectTarget | None, str]]:
    """Lend an empty database, the tools for its server, the live database to compare with, and words for the place."""
    live = database.direct
    if not live.pooled:
        name: str = await database.fetchval("SELECT current_database()")
        live = live.with_database(name)
        try:
            await scratch.allowed(live, name, to_rename=False)
        except ForbiddenHere:
            pass
        else:
            async with scratch.scratch(live, name, scratch.DRILL, scratch.stamp()) as made:
                yield made.target, archive.tools, live, "beside the live database"
            return
    async with _server(archive.major) as (target, tools):
        yield target, tools, None if live.pooled else live, "on a server of its own"


@contextlib.asynccontextmanager
async def _server(major: int) -> AsyncIterator[tuple[ConnectTarget, Path]]:
    """Lend a throwaway server that reads archives of this major."""
    fits = [version for version in WHEEL if version >= major]
    if not fits:
        raise BackupError(
            f"the server allows no second database, and there is no embedded PostgreSQL {major} to restore it on:"
            " give the database user CREATEDB"
        )
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="guildbook-drill-"))
    server = EmbeddedServer(directory, fits[0], durable=False)
    try:
        try:
            await server.start()
        except DatabaseError as error:
            raise BackupError(f"the server allows no second database, and one of its own: {error}") from error
        yield server.target(), binaries(fits[0])
    finally:
        await server.stop(force=True)
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


async def sample(restored: ConnectTarget, live: ConnectTarget | None, tables: Sequence[tuple[str, str]]) -> Sampled:
    """Read some rows of each table (schema and name), and compare those of mirrored ones with the live database.

    A mirrored row says which observation changed it last, and when: a row with both the same must be the same in every
    column that both databases have. `live` None: nothing is compared.
    """
    done = Sampled()
    mirrored = mirrored_tables()
    async with connected(restored) as there:
        with translate_errors("reading rows"):
            for schema, name in tables:
                table = mirrored.get(name) if schema == "public" else None
                if table is None or live is None:
                    done.read += len(await _some(there, f"{quoted(schema)}.{quoted(name)}", "t.*"))
                else:
                    async with connected(live) as here:
                        await _compare(there, here, table, done)
    return done


async def _some(connection: Connection, table: str, columns: str) -> list[asyncpg.Record]:
    """Return rows from all over a table: of random pages, or the first ones of a small table."""
    pages = await connection.fetchval(
        "SELECT pg_table_size($1::text::regclass) / current_setting('block_size')::int", table
    )
    share = min(100.0, 100.0 * SAMPLE_ROWS / max(1, pages))
    rows = await connection.fetch(
        f"SELECT {columns} FROM {table} AS t TABLESAMPLE SYSTEM ({share:f}) LIMIT {SAMPLE_ROWS}"  # noqa: S608
    )
    return rows or await connection.fetch(f"SELECT {columns} FROM {table} AS t LIMIT {SAMPLE_ROWS}")  # noqa: S608


async def _compare(there: Connection, here: Connection, table: Table, done: Sampled) -> None:
    name = f"public.{quoted(table.name)}"
    both = await _columns(there, name) & await _columns(here, name)
    keys = [column.name for column in table.primary_key]
    marks = [column.name for column in table.columns if part_of(column) in (Part.STAMP, Part.TOUCHED)]
    listed = ", ".join(f"t.{quoted(column)}" for column in sorted(both))
    version = (
        f"ROW({', '.join(f't.{quoted(mark)}' for mark in marks)})::text AS version, md5(ROW({listed})::text) AS sum"
    )
    known = [f"t.{quoted(key)} AS key_{index}" for index, key in enumerate(keys)]
    rows = await _some(there, name, ", ".join([*known, version, "t.*"]))
    done.read += len(rows)
    if not rows or not both.issuperset([*keys, *marks]):
        return
    arrays = ", ".join(f"${index}::{sql_type(table.columns[key])}[]" for index, key in enumerate(keys, start=1))
    wanted: list[list[Any]] = [[row[f"key_{index}"] for row in rows] for index in range(len(keys))]
    found = {
        tuple(row[f"key_{index}"] for index in range(len(keys))): (row["version"], row["sum"])
        for row in await here.fetch(
            f"SELECT {', '.join([*known, version])} FROM {name} AS t"  # noqa: S608 - names out of the models
            f" WHERE ({', '.join(f't.{quoted(key)}' for key in keys)}) IN (SELECT * FROM unnest({arrays}))",
            *wanted,
        )
    }
    wrong = 0
    for row in rows:
        theirs = found.get(tuple(row[f"key_{index}"] for index in range(len(keys))))
        if theirs is None or theirs[0] != row["version"]:
            done.changed += 1
        else:
            done.compared += 1
            wrong += theirs[1] != row["sum"]
    if wrong:
        done.different.append(f"{table.name}: {wrong} of {len(rows)} rows differ though nothing has changed them")


async def _columns(connection: Connection, table: str) -> set[str]:
    rows = await connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped", table
    )
    return {row["attname"] for row in rows}

"""Proves that a backup can be restored, by restoring it next to the live database, comparing, and dropping it again."""

from __future__ import annotations

import asyncio
import contextlib
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
from utils.database.sql import quote_identifier, sql_type
from utils.exceptions import BackupError, DatabaseError, ForbiddenHere, translate_errors
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup import load, scratch
from utils.operations.backup.archive import Archive
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.manifest import DrillResult
from utils.operations.backup.scratch import Connection, connect

#: Major versions that the embedded server has (utils/database/binaries.py).
EMBEDDED_MAJORS = 16, 18
#: Rows of each table to read, and to compare where possible.
SAMPLE_ROWS = 200


@dataclass(slots=True)
class Sample:
    """The rows that were looked at."""

    #: Rows read completely from the restored database.
    read: int = 0
    #: Those that the live database has too, last changed at the same time by the same observation.
    compared: int = 0
    #: Those that have changed or disappeared in the live database since: they cannot be compared.
    changed: int = 0
    #: One line for each table with rows that differ though nothing has changed them.
    differences: list[str] = field(default_factory=list)


async def drill(
    pool: Pool, catalog: BackupCatalog, id: str = "latest", *, progress: Progress = ignore_progress
) -> Outcome:
    """Restore a backup next to the live database, compare, and store the result with the backup.

    Raises `BackupError` if the backup cannot be opened, or there is no place to restore it.
    """
    progress(Step("checking the backup"))
    async with catalog.open(id, pool.server_version_num // 10_000, progress=progress) as archive:
        result = await rehearse(pool, archive, progress=progress)
    await catalog.write_drill(result)
    return Outcome("\n".join(result.lines()), asdict(result), ok=result.ok)


async def rehearse(pool: Pool, archive: Archive, *, progress: Progress = ignore_progress) -> DrillResult:
    """Restore an archive next to the live database, or where that is forbidden on a temporary server, and compare.

    Leaves nothing behind. A backup that cannot be restored is a result with `problems`. Raises `BackupError` if there
    is no place to restore it, and `DatabaseUnavailable` if the server went away.
    """
    started = time.monotonic()
    sample, problems = Sample(), []
    async with _restore_place(pool, archive) as place:
        try:
            tables = await load.make_place(archive, place.target)
            loaded = await load.load_and_check(replace(archive, tools=place.tools), tables, progress=progress)
            progress(Step("reading rows"))
            sample = await read_sample(place.target, place.live, list(loaded.tables))
            problems += sample.differences
        except BackupError as error:
            problems.append(str(error))
    return DrillResult(
        backup=archive.id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        ok=not problems,
        seconds=round(time.monotonic() - started, 2),
        where=place.description,
        tables=len(archive.counts),
        rows=sum(archive.counts.values()),
        rows_read=sample.read,
        rows_compared=sample.compared,
        rows_changed=sample.changed,
        problems=tuple(problems[:10]),
    )


# --- where to restore


@dataclass(frozen=True, slots=True)
class _Place:
    """An empty database for a drill."""

    target: ConnectTarget
    #: Directory of the client programs for its server.
    tools: Path
    #: The live database to compare with; None if it cannot be compared.
    live: ConnectTarget | None
    description: str


@contextlib.asynccontextmanager
async def _restore_place(pool: Pool, archive: Archive) -> AsyncIterator[_Place]:
    live = pool.direct
    if not live.pooled:
        name: str = await pool.fetchval("SELECT current_database()")
        live = live.with_database(name)
        try:
            await scratch.check_privileges(live, name, to_rename=False)
        except ForbiddenHere:
            pass
        else:
            async with scratch.scratch_database(live, name, scratch.DRILL, scratch.new_suffix()) as database:
                yield _Place(database.target, archive.tools, live, "beside the live database")
            return
    async with _temporary_server(archive.major) as (target, tools):
        yield _Place(target, tools, None if live.pooled else live, "on a temporary server")


@contextlib.asynccontextmanager
async def _temporary_server(major: int) -> AsyncIterator[tuple[ConnectTarget, Path]]:
    """Yield the address of an embedded server that reads archives of this major version, and its client programs."""
    suitable = [version for version in EMBEDDED_MAJORS if version >= major]
    if not suitable:
        raise BackupError(
            f"the server allows no second database, and there is no embedded PostgreSQL {major} to restore on: give the"
            " database user CREATEDB"
        )
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="guildbook-drill-"))
    server = EmbeddedServer(directory, suitable[0], durable=False)
    try:
        try:
            await server.start()
        except DatabaseError as error:
            raise BackupError(
                f"the server allows no second database, and the embedded server does not start: {error}"
            ) from error
        yield server.target(), binaries(suitable[0])
    finally:
        await server.stop(force=True)
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


# --- comparing rows


async def read_sample(restored: ConnectTarget, live: ConnectTarget | None, tables: Sequence[tuple[str, str]]) -> Sample:
    """Read some rows of each table (schema and name), and compare those of mirrored tables with the live database.

    A mirrored row tells when it was last changed, and by which observation: if both are equal, every column that both
    databases have must be equal too. Nothing is compared if `live` is None.
    """
    sample = Sample()
    mirrored = mirrored_tables()
    async with connect(restored) as connection:
        with translate_errors("reading rows"):
            for schema, name in tables:
                table = mirrored.get(name) if schema == "public" else None
                if table is None or live is None:
                    qualified = f"{quote_identifier(schema)}.{quote_identifier(name)}"
                    sample.read += len(await _sample_rows(connection, qualified, "t.*"))
                else:
                    async with connect(live) as live_connection:
                        await _compare(connection, live_connection, table, sample)
    return sample


async def _sample_rows(connection: Connection, table: str, columns: str) -> list[asyncpg.Record]:
    """Return rows from random pages of a table, or the first rows of a small one."""
    pages = await connection.fetchval(
        "SELECT pg_table_size($1::text::regclass) / current_setting('block_size')::int", table
    )
    percentage = min(100.0, 100.0 * SAMPLE_ROWS / max(1, pages))
    rows = await connection.fetch(
        f"SELECT {columns} FROM {table} AS t TABLESAMPLE SYSTEM ({percentage:f}) LIMIT {SAMPLE_ROWS}"  # noqa: S608
    )
    return rows or await connection.fetch(f"SELECT {columns} FROM {table} AS t LIMIT {SAMPLE_ROWS}")  # noqa: S608


async def _compare(restored: Connection, live: Connection, table: Table, sample: Sample) -> None:
    name = f"public.{quote_identifier(table.name)}"
    columns = await _column_names(restored, name) & await _column_names(live, name)
    keys = [column.name for column in table.primary_key]
    stamps = [column.name for column in table.columns if part_of(column) in (Part.STAMP, Part.TOUCHED)]
    version = f"ROW({', '.join(f't.{quote_identifier(stamp)}' for stamp in stamps)})::text"
    content = f"md5(ROW({', '.join(f't.{quote_identifier(column)}' for column in sorted(columns))})::text)"
    selected = [f"t.{quote_identifier(key)} AS key_{index}" for index, key in enumerate(keys)]
    selected += [f"{version} AS version", f"{content} AS content"]
    rows = await _sample_rows(restored, name, ", ".join([*selected, "t.*"]))
    sample.read += len(rows)
    if not rows or not columns.issuperset([*keys, *stamps]):
        return
    arrays = ", ".join(f"${index}::{sql_type(table.columns[key])}[]" for index, key in enumerate(keys, start=1))
    key_values: list[list[Any]] = [[row[f"key_{index}"] for row in rows] for index in range(len(keys))]
    live_rows = {
        tuple(row[f"key_{index}"] for index in range(len(keys))): row
        for row in await live.fetch(
            f"SELECT {', '.join(selected)} FROM {name} AS t"  # noqa: S608 - names out of the models
            f" WHERE ({', '.join(f't.{quote_identifier(key)}' for key in keys)}) IN (SELECT * FROM unnest({arrays}))",
            *key_values,
        )
    }
    different = 0
    for row in rows:
        live_row = live_rows.get(tuple(row[f"key_{index}"] for index in range(len(keys))))
        if live_row is None or live_row["version"] != row["version"]:
            sample.changed += 1
        else:
            sample.compared += 1
            different += live_row["content"] != row["content"]
    if different:
        sample.differences.append(
            f"{table.name}: {different} of {len(rows)} rows differ though nothing has changed them"
        )


async def _column_names(connection: Connection, table: str) -> set[str]:
    rows = await connection.fetch(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped", table
    )
    return {row["attname"] for row in rows}

"""Proves that a backup can be restored: it is loaded into scratch tables, counted, compared, and dropped again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import asyncpg
from sqlalchemy import Table

from models import Part, mirrored_tables, part_of
from utils.database import ConnectTarget, Pool
from utils.database.placement import Placement
from utils.database.sessions import Connection, connect
from utils.database.sql import quote_identifier, sql_type
from utils.exceptions import BackupError, MigrationError, translate_errors
from utils.operations.action import Outcome, Progress, Step, ignore_progress
from utils.operations.backup.archive.manifest import DrillResult
from utils.operations.backup.archive.objects import Name, qualified
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.scratch.load import Place, translated_names
from utils.operations.backup.scratch.tables import open_scratch_tables

#: Rows of each table to read, and to compare where possible.
SAMPLE_ROWS = 200
#: Where a drill restores, for its report.
WHERE = "in scratch schemas of the live database"


@dataclass(slots=True)
class Sample:
    """The rows that were looked at."""

    #: Rows read completely from the restored tables.
    read: int = 0
    #: Those that the live tables have too, last changed at the same time by the same observation.
    compared: int = 0
    #: Those that have changed or disappeared in the live tables since: they cannot be compared.
    changed: int = 0
    #: One line for each table with rows that differ though nothing has changed them.
    differences: list[str] = field(default_factory=list)


async def drill(
    pool: Pool, catalog: BackupCatalog, id: str = "latest", *, progress: Progress = ignore_progress
) -> Outcome:
    """Restore a backup next to the live tables, compare, and store the result with the backup.

    Raises `BackupError` if the backup cannot be opened, or there is no place to restore it.
    """
    progress(Step("checking the backup"))
    catalog = await catalog.serving(pool)
    async with catalog.open(id, pool.server_version_num // 10_000, from_other=True, progress=progress) as archive:
        result = await rehearse(pool, archive, progress=progress)
    await catalog.write_drill(result)
    return Outcome("\n".join(result.lines()), asdict(result), ok=result.ok)


async def rehearse(pool: Pool, archive: Archive, *, progress: Progress = ignore_progress) -> DrillResult:
    """Do everything that a restore does, except to replace the rows of the live tables.

    Leaves nothing behind. A backup that cannot be restored is a result with `problems`. Raises `BackupError` if there
    is no place to restore it, and `DatabaseUnavailable` if the server went away.
    """
    started = time.monotonic()
    sample, problems, rows, tables = Sample(), [], sum(archive.counts.values()), len(archive.counts)
    async with open_scratch_tables(pool, is_restore=False) as scratch:
        try:
            loaded = await scratch.load(archive, progress=progress)
            rows, tables = loaded.rows, len(loaded.tables)
            progress(Step("reading rows"))
            names = list(loaded.tables.values())
            sample = await read_sample(scratch.place, names, scratch.live, scratch.schemas)
            problems += sample.differences
            await scratch.migrate(archive, progress=progress)
        except (BackupError, MigrationError) as error:
            problems.append(str(error))
    return DrillResult(
        backup=archive.id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        ok=not problems,
        seconds=round(time.monotonic() - started, 2),
        where=WHERE,
        tables=tables,
        rows=rows,
        rows_read=sample.read,
        rows_compared=sample.compared,
        rows_changed=sample.changed,
        problems=tuple(problems[:10]),
    )


# --- comparing rows


async def read_sample(place: Place, tables: Sequence[Name], live: ConnectTarget, schemas: Placement) -> Sample:
    """Read some rows of each table of a place, and compare those of mirrored tables with the live ones.

    A mirrored row tells when it was last changed, and by which observation: if both are equal, every column that both
    tables have must be equal too. `schemas` are those of the live tables.
    """
    sample = Sample()
    mirrored = mirrored_tables()
    live_names = translated_names(tables, place.schemas, schemas)
    async with connect(place.target) as connection, connect(live) as live_connection:
        with translate_errors("reading rows"):
            for name in tables:
                table = mirrored.get(name[1]) if name[0] == place.schemas.main else None
                if table is None:
                    sample.read += len(await _sample_rows(connection, qualified(name), "t.*"))
                else:
                    names = qualified(name), qualified(live_names[name])
                    await _compare(connection, live_connection, table, *names, sample)
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


async def _compare(
    restored: Connection, live: Connection, table: Table, name: str, live_name: str, sample: Sample
) -> None:
    columns = await _column_names(restored, name) & await _column_names(live, live_name)
    keys = [column.name for column in table.primary_key]
    stamps = [column.name for column in table.columns if part_of(column) in (Part.STAMP, Part.TOUCHED)]
    version = f"ROW({', '.join(f't.{quote_identifier(stamp)}' for stamp in stamps)})::text"
    content = f"md5(ROW({', '.join(f't.{quote_identifier(column)}' for column in sorted(columns))})::text)"
    selected = [f"t.{quote_identifier(key)} AS key_{index}" for index, key in enumerate(keys)]
    if not columns.issuperset([*keys, *stamps]):  # of another revision, or not there
        sample.read += len(await _sample_rows(restored, name, "t.*"))
        return
    selected += [f"{version} AS version", f"{content} AS content"]
    rows = await _sample_rows(restored, name, ", ".join([*selected, "t.*"]))
    sample.read += len(rows)
    if not rows:
        return
    arrays = ", ".join(f"${index}::{sql_type(table.columns[key])}[]" for index, key in enumerate(keys, start=1))
    key_values: list[list[Any]] = [[row[f"key_{index}"] for row in rows] for index in range(len(keys))]
    live_rows = {
        tuple(row[f"key_{index}"] for index in range(len(keys))): row
        for row in await live.fetch(
            f"SELECT {', '.join(selected)} FROM {live_name} AS t"  # noqa: S608 - names out of the models
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

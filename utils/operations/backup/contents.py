"""Counts the rows in an archive, by decompressing all of it without a database."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path

from utils.exceptions import BackupError
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup.archive import open_script, table_of
from utils.operations.backup.manifest import Manifest
from utils.operations.backup.objects import Name
from utils.text import format_count

#: Seconds between two progress reports.
PROGRESS_SECONDS = 0.25
#: Tables that an error message names; the others are counted.
LISTED_TABLES = 5


async def check_rows(manifest: Manifest, file: Path, tools: Path, *, progress: Progress = ignore_progress) -> None:
    """Decompress an archive, and check that every table has the rows that the manifest counts.

    file: the archive, not encrypted. tools: the directory of pg_restore. Raises `BackupError` that names the tables
    which differ, with both numbers.
    """
    found = await count_rows(file, tools, manifest.rows, total=manifest.total_rows, progress=progress)
    expected = dict.fromkeys(found, 0) | manifest.rows
    problems = differences(expected, {name: found.get(name, 0) for name in expected})
    if problems:
        raise BackupError(
            f"{manifest.file} does not have the rows that its manifest counts:"
            f" {'; '.join(problems[:LISTED_TABLES])}"
            f"{f' and {len(problems) - LISTED_TABLES} more' if len(problems) > LISTED_TABLES else ''}:"
            " use another backup"
        )


async def count_rows(
    file: Path,
    tools: Path,
    tables: Collection[str] = (),
    *,
    total: int | None = None,
    progress: Progress = ignore_progress,
) -> dict[str, int]:
    """Return the exact number of rows in an archive by `schema.table`, in bounded memory.

    file: the archive, not encrypted. tools: the directory of pg_restore. tables: those that partitions count with;
    otherwise a partition counts as a table. total: how many rows are expected, for the progress. Raises `BackupError`
    if the archive cannot be read to its end.
    """
    names: set[Name] = {(schema, table) for schema, _, table in (name.partition(".") for name in tables)}
    counts: dict[str, int] = {}
    rows, reported = 0, time.monotonic()
    progress(Step("counting rows", 0, total))
    async with open_script(file, tools) as script:
        while (header := await script.next_table()) is not None:
            name = ".".join(table_of(header.table, names) or header.table)
            counts.setdefault(name, 0)
            async for chunk in script.rows():
                number = chunk.count(b"\n")  # a line break in a value is escaped
                counts[name] += number
                rows += number
                if time.monotonic() - reported > PROGRESS_SECONDS:
                    reported = time.monotonic()
                    progress(Step("counting rows", rows, total))
    progress(Step("counting rows", rows, total))
    return counts


def differences(expected: Mapping[str, int], found: Mapping[str, int | None]) -> list[str]:
    """Return one line for each table, by `schema.table`, whose row count differs; None: there is no such table."""
    lines = []
    for name, rows in expected.items():
        actual = found.get(name)
        if actual != rows:
            lines.append(f"{name}: {'no table' if actual is None else format_count(actual, 'row')}, expected {rows:,}")
    return lines

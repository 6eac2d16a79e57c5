"""Loads an archive into a database that nobody uses yet, and counts its rows there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from utils.database import ConnectTarget, ownership
from utils.database.sql import quote_identifier
from utils.exceptions import BackupError, translate_errors
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import client_tools
from utils.operations.backup.catalog import Archive
from utils.operations.backup.scratch import connect

#: Fewest and most connections for loading and counting.
MIN_JOBS, MAX_JOBS = 2, 4
#: Seconds without output after which pg_restore is stopped; one index of a very large table is the longest step.
STALL_SECONDS = 6 * 3600.0
#: Seconds to count the rows of a table, or to analyze it.
TABLE_SECONDS = 3600.0
#: Seconds for pg_restore to end on SIGTERM before it is killed.
TERMINATE_SECONDS = 10.0
#: Tables to analyze, largest first; partitions with their table.
_TABLES_BY_SIZE = """
SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND n.nspname <> 'information_schema'
    AND n.nspname NOT LIKE 'pg\\_%'
ORDER BY (SELECT sum(l.relpages) FROM pg_class AS l
    WHERE l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid))) DESC
"""


def jobs() -> int:
    """Return the number of connections to load with: one per core, within bounds."""
    return max(MIN_JOBS, min(MAX_JOBS, os.cpu_count() or MIN_JOBS))


async def load_and_check(archive: Archive, target: ConnectTarget, *, progress: Progress = ignore_progress) -> None:
    """Load an archive into an empty database. Raises `BackupError` unless its row counts and revision match."""
    progress(Step("restoring", 0, len(archive.counts), "tables"))
    await load(archive, target, progress=progress)
    progress(Step("counting rows", 0, len(archive.counts), "tables"))
    problems = differences(archive.counts, await count(target, list(archive.counts), progress=progress))
    revision = await _revision(target)
    if revision != archive.revision:
        problems.insert(0, f"the schema is at revision {revision}, expected {archive.revision}")
    if problems:
        raise BackupError(
            f"backup {archive.id} was not restored as it was made: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}. Use another backup"
        )


async def load(archive: Archive, target: ConnectTarget, *, progress: Progress = ignore_progress) -> None:
    """Load an archive into an empty database with pg_restore, which is stopped when the caller is cancelled.

    Raises `BackupError` with pg_restore's last error messages if it fails.
    """
    command = [
        str(archive.tools / "pg_restore"),
        "--no-owner",
        "--no-privileges",
        "--exit-on-error",
        "--verbose",
        f"--jobs={jobs()}",
    ]
    command += ["--dbname", target.libpq_url(), str(archive.file)]
    environment = client_tools.environment()
    # Asynchronous commits are safe: nobody uses the database yet, and the commit of the swap syncs all of it.
    environment["PGOPTIONS"] = "-c statement_timeout=0 -c lock_timeout=0 -c synchronous_commit=off"
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**environment, "LC_ALL": "C", **target.libpq_environment()},
        start_new_session=True,  # so that Ctrl-C reaches only us; we stop it
    )
    errors: deque[str] = deque(maxlen=3)
    done = 0
    assert process.stderr is not None
    try:
        while True:
            async with asyncio.timeout(STALL_SECONDS):
                line = (await process.stderr.readline()).decode(errors="replace").rstrip()
            if not line and process.stderr.at_eof():
                break
            # pg_restore reports progress and errors on standard error only; LC_ALL=C keeps the messages in English.
            if "finished item " in line and " TABLE DATA " in line:
                done += 1
                progress(Step("restoring", done, len(archive.counts), "tables"))
            elif "error:" in line or "detail:" in line or "hint:" in line:
                errors.append(line.removeprefix("pg_restore: "))
        async with asyncio.timeout(TERMINATE_SECONDS):
            code = await process.wait()
    except TimeoutError:
        raise BackupError(f"pg_restore produced no output for {STALL_SECONDS / 3600:g} hours and was stopped") from None
    finally:
        await _stop(process)
    if code:
        raise BackupError(f"pg_restore could not load the backup: {' '.join(errors) or f'exit code {code}'}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Stop a process if it is still running; it is killed if it does not end, or the caller is cancelled."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(TERMINATE_SECONDS):
                await process.wait()
        except BaseException:
            process.kill()
            raise


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


def differences(expected: Mapping[tuple[str, str], int], found: Mapping[tuple[str, str], int | None]) -> list[str]:
    """Return one line for each table whose row count differs."""
    lines = []
    for (schema, name), rows in expected.items():
        actual = found.get((schema, name))
        if actual != rows:
            lines.append(f"{schema}.{name}: {'no table' if actual is None else f'{actual:,} rows'}, expected {rows:,}")
    return lines


async def _revision(target: ConnectTarget) -> str | None:
    async with connect(target) as connection:
        with translate_errors("reading the revision"):
            return ", ".join((await ownership.fetch_version(connection)).revisions) or None


async def analyze(target: ConnectTarget, *, timeout: float = TABLE_SECONDS) -> None:
    """Gather the planner's statistics, which archives do not contain.

    Works on several connections, largest tables first, each within `timeout` seconds.
    """
    async with connect(target) as connection:
        with translate_errors("gathering statistics"):
            queue = deque(row["name"] for row in await connection.fetch(_TABLES_BY_SIZE, timeout=timeout))

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


def in_place_command(archive: Archive, target: ConnectTarget) -> str:
    """Return the shell command that restores an archive over the live database, except `ops`, without a second one.

    Not `pg_restore --clean`: it fails on the keys of partitions (cannot drop inherited constraint).
    """
    program, file = shlex.quote(str(archive.tools / "pg_restore")), shlex.quote(str(archive.file))
    psql, url = shlex.quote(str(archive.tools / "psql")), shlex.quote(target.libpq_url())
    return (
        f"(echo 'DROP SCHEMA public CASCADE; CREATE SCHEMA public;'; {program} -l {file} | grep -v ' ops ' |"
        f" {program} --no-owner --no-privileges -L /dev/stdin -f - {file}) |"
        f" {psql} --quiet --single-transaction --set ON_ERROR_STOP=1 --output /dev/null {url}"
    )

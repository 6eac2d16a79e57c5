"""Load an archive into a database that nobody uses yet, and count what is in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from utils.database import ConnectTarget
from utils.exceptions import BackupError, translate_errors
from utils.operations.action import Progress, Step, ignore_progress
from utils.operations.backup import tools
from utils.operations.backup.scratch import connected, quoted
from utils.operations.backup.source import Archive

#: Connections that pg_restore loads with, and that rows are counted with: at least, and at most.
JOBS = 2, 4
#: Seconds without a word of pg_restore after which it is given up: one index of a very large table is the longest step.
SILENT_SECONDS = 6 * 3600.0
#: Seconds for a table's rows to be counted, or for statistics to be gathered.
COUNT_SECONDS = 3600.0
#: Seconds for pg_restore to end when it was asked to, before it is killed.
END_SECONDS = 10.0
#: Tables whose statistics are gathered, the largest first; partitions with their table.
_LARGE = """
SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND n.nspname <> 'information_schema'
    AND n.nspname NOT LIKE 'pg\\_%'
ORDER BY (SELECT sum(l.relpages) FROM pg_class AS l
    WHERE l.oid = c.oid OR l.oid IN (SELECT relid FROM pg_partition_tree(c.oid))) DESC
"""
_FINISHED = "finished item "
_TABLE_DATA = " TABLE DATA "


def jobs() -> int:
    """Return how many connections to load with: one a core, within bounds."""
    fewest, most = JOBS
    return max(fewest, min(most, os.cpu_count() or fewest))


async def load_and_check(archive: Archive, target: ConnectTarget, *, progress: Progress = ignore_progress) -> None:
    """Load an archive into an empty database. Raises `BackupError` unless each table has the rows that it should."""
    progress(Step("restoring", 0, len(archive.counts), "tables"))
    await load(archive, target, progress=progress)
    progress(Step("counting rows", 0, len(archive.counts), "tables"))
    wrong = unlike(archive.counts, await count(target, list(archive.counts), progress=progress))
    revision = await _revision(target)
    if revision != archive.revision:
        wrong.insert(0, f"the schema is at revision {revision}, expected {archive.revision}")
    if wrong:
        raise BackupError(
            f"backup {archive.id} did not come back as it was made: {'; '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Use another backup"
        )


async def _revision(target: ConnectTarget) -> str | None:
    async with connected(target) as connection:
        with translate_errors("reading the revision"):
            if await connection.fetchval("SELECT to_regclass('public.alembic_version') IS NULL"):
                return None
            revision: str | None = await connection.fetchval("SELECT version_num FROM public.alembic_version")
            return revision


async def load(archive: Archive, target: ConnectTarget, *, progress: Progress = ignore_progress) -> None:
    """Load an archive into an empty database with pg_restore.

    Raises `BackupError` with its last words when it fails; it is ended when the caller is cancelled.
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
    environment = tools.environment()
    # Nothing of it is the database's yet; the renaming's commit makes all of it durable at once.
    environment["PGOPTIONS"] = "-c statement_timeout=0 -c lock_timeout=0 -c synchronous_commit=off"
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**environment, "LC_ALL": "C", **target.libpq_environment()},
        start_new_session=True,  # Ctrl-C is for us, who end it
    )
    last: deque[str] = deque(maxlen=3)
    done = 0
    assert process.stderr is not None
    try:
        while True:
            async with asyncio.timeout(SILENT_SECONDS):
                line = (await process.stderr.readline()).decode(errors="replace").rstrip()
            if not line and process.stderr.at_eof():
                break
            if _FINISHED in line and _TABLE_DATA in line:
                done += 1
                progress(Step("restoring", done, len(archive.counts), "tables"))
            elif "error:" in line or "detail:" in line or "hint:" in line:
                last.append(line.removeprefix("pg_restore: "))
        async with asyncio.timeout(END_SECONDS):
            code = await process.wait()
    except TimeoutError:
        raise BackupError(f"pg_restore said nothing for {SILENT_SECONDS / 3600:g} hours and was ended") from None
    finally:
        await _end(process)
    if code:
        raise BackupError(f"pg_restore could not load the backup: {' '.join(last) or f'exit code {code}'}")


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a program that may run still; it is not left behind whatever happens to us."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
        except BaseException:
            process.kill()
            raise


async def count(
    target: ConnectTarget, tables: Sequence[tuple[str, str]], *, progress: Progress = ignore_progress
) -> dict[tuple[str, str], int | None]:
    """Return how many rows each table (schema and name) has, exactly; None: there is no such table.

    Large ones first, on a few connections.
    """
    async with connected(target) as connection:
        with translate_errors("counting rows"):
            rows = await connection.fetch(
                "SELECT w.schema, w.name, to_regclass(format('%I.%I', w.schema, w.name)) IS NOT NULL AS is_there,"
                " pg_table_size(to_regclass(format('%I.%I', w.schema, w.name))) AS bytes"
                " FROM unnest($1::text[], $2::text[]) AS w(schema, name) ORDER BY bytes DESC NULLS LAST",
                [schema for schema, _ in tables],
                [name for _, name in tables],
                timeout=COUNT_SECONDS,
            )
    counts: dict[tuple[str, str], int | None] = {}
    waiting = deque((row["schema"], row["name"]) for row in rows if row["is_there"])
    counts.update({(row["schema"], row["name"]): None for row in rows if not row["is_there"]})

    async def work() -> None:
        async with connected(target) as connection:
            while waiting:
                schema, name = table = waiting.popleft()
                with translate_errors(f"counting {schema}.{name}"):
                    counts[table] = await connection.fetchval(
                        f"SELECT count(*) FROM {quoted(schema)}.{quoted(name)}",  # noqa: S608 - quoted
                        timeout=COUNT_SECONDS,
                    )
                progress(Step("counting rows", len(counts), len(tables), "tables"))

    await _side_by_side(work, min(jobs(), len(waiting)))
    return counts


def unlike(wanted: Mapping[tuple[str, str], int], found: Mapping[tuple[str, str], int | None]) -> list[str]:
    """Return one line for each table whose number of rows is not the one that the backup was made with."""
    lines = []
    for (schema, name), rows in wanted.items():
        have = found.get((schema, name))
        if have != rows:
            lines.append(f"{schema}.{name}: {'no table' if have is None else f'{have:,} rows'}, expected {rows:,}")
    return lines


async def analyse(target: ConnectTarget) -> None:
    """Gather the planner's statistics, which no archive has: without them it reads whole tables for one row.

    The largest tables first, on a few connections.
    """
    async with connected(target) as connection:
        with translate_errors("gathering statistics"):
            waiting = deque(row["name"] for row in await connection.fetch(_LARGE, timeout=COUNT_SECONDS))

    async def work() -> None:
        async with connected(target) as connection:
            while waiting:
                with translate_errors("gathering statistics"):
                    await connection.execute("ANALYZE " + waiting.popleft(), timeout=COUNT_SECONDS)

    await _side_by_side(work, min(jobs(), len(waiting)))


async def _side_by_side(work: Callable[[], Coroutine[Any, Any, None]], number: int) -> None:
    """Do something so many times at once; the first that fails ends the others, and raises what it raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(work())
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None


def by_hand(archive: Archive, target: ConnectTarget) -> str:
    """Return the line that restores an archive over the live database, but for `ops`, without a second one.

    Not `pg_restore --clean`: it fails on the keys of partitions (cannot drop inherited constraint).
    """
    program, file = shlex.quote(str(archive.tools / "pg_restore")), shlex.quote(str(archive.file))
    psql, url = shlex.quote(str(archive.tools / "psql")), shlex.quote(target.libpq_url())
    return (
        f"(echo 'DROP SCHEMA public CASCADE; CREATE SCHEMA public;'; {program} -l {file} | grep -v ' ops ' |"
        f" {program} --no-owner --no-privileges -L /dev/stdin -f - {file}) |"
        f" {psql} --quiet --single-transaction --set ON_ERROR_STOP=1 --output /dev/null {url}"
    )

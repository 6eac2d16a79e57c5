"""Backups and restores of a few million rows against plain pg_dump and pg_restore, and event-loop stalls."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import Figure, ratio
from utils.database import ConnectTarget, Pool
from utils.database.partitions import ensure_partitions
from utils.database.sessions import connect
from utils.database.sql import quote_identifier
from utils.operations.action import Outcome
from utils.operations.backup.archive import client_tools
from utils.operations.backup.archive.manifest import ARCHIVE_SUFFIX
from utils.operations.backup.archive.reading import count_rows
from utils.operations.backup.create import COMPRESSION, BackupRequest, create
from utils.operations.backup.restore.restore import restore_archive
from utils.operations.backup.restore.whole_database import replace_database
from utils.operations.backup.scratch import load
from utils.operations.backup.service import BackupService
from utils.settings import Settings

#: Rows of the tables that hold nearly all of a mirror.
USERS, MEMBERS, CHANGES = 1_100_000, 1_200_000, 200_000
#: Seconds within which every program must end.
TIMEOUT = 900.0
_FILL = (
    "INSERT INTO guilds (id, name) SELECT n::bigint << 22, 'guild ' || n FROM generate_series(1, 20) AS n",
    "INSERT INTO users (id, username, discriminator, global_name, avatar, bot, public_flags, stamp)"
    " SELECT (n::bigint * 7919) << 22, 'member_' || n, '0', CASE WHEN n % 4 > 0 THEN 'Member number ' || n END,"
    " CASE WHEN n % 3 > 0 THEN md5(n::text) END, false, n % 512, n FROM generate_series(1, $1::int) AS n",
    "INSERT INTO members (guild_id, user_id, nick, roles, joined_at, pending, flags, stamp)"
    " SELECT ((n + n / 1100000) % 20 + 1)::bigint << 22, ((n % 1100000 + 1)::bigint * 7919) << 22,"
    " CASE WHEN n % 5 = 0 THEN 'nick of ' || n END, ARRAY(SELECT (r * 31 + n % 60)::bigint << 22"
    " FROM generate_series(1, n % 6) AS r), timestamptz '2019-01-01' + n * interval '97 s', false, 0, n"
    " FROM generate_series(1, $1::int) AS n",
    "INSERT INTO changes (guild_id, table_name, key, action, user_id, before, after)"
    " SELECT (n % 20 + 1)::bigint << 22, 'members', jsonb_build_object('user_id', n), 'update', n,"
    " jsonb_build_object('nick', md5(n::text)), jsonb_build_object('nick', md5((n + 1)::text))"
    " FROM generate_series(1, $1::int) AS n",
)


class LoopMonitor:
    """Measures the longest event-loop stall and the growth of memory during a block."""

    def __init__(self) -> None:
        #: Seconds.
        self.stall = 0.0
        #: Megabytes.
        self.growth = 0.0

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._monitor())
        try:
            await asyncio.sleep(0.01)
            yield
        finally:
            task.cancel()

    async def _monitor(self) -> None:
        process = psutil.Process()
        initial = process.memory_info().rss
        last = time.perf_counter()
        for turn in range(sys.maxsize):
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.stall = max(self.stall, now - last - 0.001)
            if turn % 50 == 0:
                self.growth = max(self.growth, (process.memory_info().rss - initial) / 2**20)
            last = time.perf_counter()


async def _run(*arguments: str, environment: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(*arguments, env={**os.environ, **environment})
    try:
        async with asyncio.timeout(TIMEOUT):
            code = await process.wait()
    finally:
        await client_tools.kill(process)
    if code:
        raise RuntimeError(f"{Path(arguments[0]).name} ended with {code}")


async def _timed(pool: Pool, work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Return the seconds and the result of an operation, which starts with nothing left to flush."""
    await pool.execute("CHECKPOINT")
    await asyncio.to_thread(os.sync)  # in a thread, because it may take longer than the stalls to measure
    started = time.perf_counter()
    result = await work()
    return time.perf_counter() - started, result


async def _checkpoint(pool: Pool) -> float:
    """Return the seconds that a checkpoint takes."""
    started = time.perf_counter()
    await pool.execute("CHECKPOINT")
    return time.perf_counter() - started


async def _restore_plainly(target: ConnectTarget, directory: Path, file: Path) -> None:
    options = ["--no-owner", "--no-privileges", "--exit-on-error", f"--jobs={load.jobs()}"]
    arguments = [*options, "--dbname", target.libpq_url(), str(file)]
    await _run(str(directory / "pg_restore"), *arguments, environment=target.libpq_environment())


@contextlib.asynccontextmanager
async def _empty_database(target: ConnectTarget) -> AsyncIterator[ConnectTarget]:
    """Yield the address of an empty database."""
    fresh = target.with_database("plainly_restored")
    name = quote_identifier(str(fresh.database))
    async with connect(target) as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield fresh
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def _no_safety_backup() -> tuple[None, str]:
    return None, ""


async def measure(pool: Pool, *, rounds: int = 5) -> list[Figure]:
    """Fill the tables, then create and restore backups, alternating with plain `pg_dump` and `pg_restore`."""
    async with pool.acquire() as connection:
        await ensure_partitions(connection, pool.now())  # as the bot does at start
    for statement, number in zip(_FILL, ((), (USERS,), (MEMBERS,), (CHANGES,)), strict=True):
        await pool.execute(statement, *number)
    for table in ("users", "members", "changes"):
        await pool.execute(f"VACUUM ANALYZE {table}")
    directory = Path(tempfile.mkdtemp(prefix="guildbook-bench-backup-"))
    service = BackupService(Settings(_env_file=None, data_dir=directory))  # type: ignore[call-arg]
    tools = await client_tools.find_directory(pool.server_version_num // 10_000)
    major = pool.server_version_num // 10_000
    id, size = "", 0
    created: list[float] = []
    dumped: list[float] = []
    #: Restores of every row into emptied tables, of the whole database, and of a backup that differs from nothing.
    restored: list[float] = []
    replaced: list[float] = []
    unchanged: list[float] = []
    restored_to_disk: list[float] = []
    plainly_restored: list[float] = []
    plainly_restored_to_disk: list[float] = []
    #: Reading a whole archive without a database.
    counted: list[float] = []
    read: list[float] = []
    while_creating, while_restoring, while_drilling = LoopMonitor(), LoopMonitor(), LoopMonitor()

    async def create_backup() -> str:
        return (await create(pool, service.catalog, BackupRequest())).id

    async def dump() -> None:
        target = pool.direct
        options = ["--format=custom", f"--compress={COMPRESSION}", "--no-owner", "--no-privileges"]
        arguments = [*options, "--file", str(directory / "plain.dump"), "--dbname", target.libpq_url()]
        await _run(str(tools / "pg_dump"), *arguments, environment=target.libpq_environment())

    async def restore_backup(how: Callable[..., Awaitable[Outcome]]) -> None:
        async with service.catalog.open(id, major) as archive:
            outcome = await how(pool, archive, safety_backup=_no_safety_backup)
            if not outcome.ok:
                raise RuntimeError(outcome.text)

    async def restore_into_emptied_tables() -> None:
        await pool.execute("TRUNCATE users, members, changes, guilds")
        restored.append((await _timed(pool, lambda: restore_backup(restore_archive)))[0])
        restored_to_disk.append(restored[-1] + await _checkpoint(pool))

    async def restore_without_differences() -> None:
        unchanged.append((await _timed(pool, lambda: restore_backup(restore_archive)))[0])

    async def restore_whole_database() -> None:
        replaced.append((await _timed(pool, lambda: restore_backup(replace_database)))[0])

    async def count_archive() -> None:
        file = service.catalog.local.path / f"{id}{ARCHIVE_SUFFIX}"
        seconds, found = await _timed(pool, lambda: count_rows(file, tools))
        counted.append(seconds)
        if sum(found.values()) < USERS + MEMBERS + CHANGES:
            raise RuntimeError(f"counted {found}")

    async def read_archive() -> None:
        file = service.catalog.local.path / f"{id}{ARCHIVE_SUFFIX}"
        arguments = str(tools / "pg_restore"), "--data-only", "--file=/dev/null", str(file)
        read.append((await _timed(pool, partial(_run, *arguments, environment={})))[0])

    async def restore_plainly() -> None:
        async with _empty_database(pool.direct) as empty:
            work = partial(_restore_plainly, empty, tools, directory / "plain.dump")
            plainly_restored.append((await _timed(pool, work))[0])
            plainly_restored_to_disk.append(plainly_restored[-1] + await _checkpoint(pool))

    try:
        for turn in range(rounds):
            sides: list[tuple[list[float], Callable[[], Awaitable[Any]]]] = [(created, create_backup), (dumped, dump)]
            for seconds, work in sides if turn % 2 else sides[::-1]:
                spent, result = await _timed(pool, work)
                seconds.append(spent)
                id = result or id
            size = (directory / "plain.dump").stat().st_size
        ways = (
            restore_into_emptied_tables,
            restore_plainly,
            restore_without_differences,
            restore_whole_database,
            count_archive,
            read_archive,
        )
        for turn in range(rounds):
            for way in ways if turn % 2 else ways[::-1]:
                await way()
        # Not in the rounds above: a monitor that wakes a thousand times a second would slow down one side only.
        async with while_creating.run():
            id = await create_backup()
        await pool.execute("TRUNCATE users, members, changes, guilds")
        async with while_restoring.run():
            await restore_backup(restore_archive)
        async with while_drilling.run():
            drill_seconds, drilled = await _timed(pool, lambda: service.drill(pool, id))
        if not drilled.ok:
            raise RuntimeError(drilled.text)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rows = USERS + MEMBERS + CHANGES
    return [
        ratio(f"making a backup of {rows:,} rows: time against `pg_dump -Fc`", created, dumped, "≤", 1.15),
        Figure("`pg_dump -Fc` for that", dumped, unit=" s"),
        Figure("its archive", (size / 1e6,), unit=" MB"),
        ratio(
            "restoring it into emptied tables, counted: time against `pg_restore`", restored, plainly_restored, "≤", 5
        ),
        ratio("the same until all is on the disk, on both sides", restored_to_disk, plainly_restored_to_disk),
        ratio("restoring where no row differs, counted", unchanged, plainly_restored, "≤", 4),
        ratio("restoring as the whole database, counted", replaced, plainly_restored, "≤", 1.3),
        Figure(f"`pg_restore -j {load.jobs()}` for that", plainly_restored, unit=" s"),
        Figure("a drill of it", (drill_seconds,), unit=" s"),
        ratio("counting the rows of the archive: time against `pg_restore -f /dev/null`", counted, read, "≤", 2),
        Figure("`pg_restore -f /dev/null` for that", read, unit=" s"),
        Figure("longest loop stall while a backup is made", (while_creating.stall * 1e3,), "≤", 50, " ms"),
        Figure("longest loop stall while one is restored", (while_restoring.stall * 1e3,), "≤", 50, " ms"),
        Figure("longest loop stall during a drill", (while_drilling.stall * 1e3,), "≤", 50, " ms"),
        Figure("memory growth while a backup is made", (while_creating.growth,), unit=" MB"),
        Figure("memory growth while one is restored", (while_restoring.growth,), unit=" MB"),
    ]

"""Backups against PostgreSQL's own programs on a few million rows: making one, bringing it back, and the loop."""

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
from utils.operations.backup import client_tools, load
from utils.operations.backup.create import COMPRESSION, BackupRequest, create
from utils.operations.backup.restore import restore_archive
from utils.operations.backup.scratch import connect, quote_identifier
from utils.operations.backup.service import BackupService
from utils.settings import Settings

#: Rows of the tables that hold nearly all of a mirror.
USERS, MEMBERS, CHANGES = 1_100_000, 1_200_000, 200_000
#: Nothing may take longer than this, in seconds.
PATIENCE = 900.0
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


class Watch:
    """The longest time that the loop was held, and the highest resident size, during a block."""

    def __init__(self) -> None:
        self.stall = 0.0
        self.growth = 0.0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            await asyncio.sleep(0.01)
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        process = psutil.Process()
        began = process.memory_info().rss
        last = time.perf_counter()
        for turn in range(sys.maxsize):
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.stall = max(self.stall, now - last - 0.001)
            if turn % 50 == 0:
                self.growth = max(self.growth, (process.memory_info().rss - began) / 2**20)
            last = time.perf_counter()


async def _run(*arguments: str, environment: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(*arguments, env={**os.environ, **environment})
    try:
        async with asyncio.timeout(PATIENCE):
            code = await process.wait()
    finally:
        await client_tools.kill(process)
    if code:
        raise RuntimeError(f"{Path(arguments[0]).name} ended with {code}")


async def _timed(pool: Pool, work: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    """Return seconds and result; what was written before is on the disk when it begins."""
    await pool.execute("CHECKPOINT")
    await asyncio.to_thread(os.sync)  # in a thread: it may take longer than any stall that is looked for
    started = time.perf_counter()
    result = await work()
    return time.perf_counter() - started, result


async def _forced(pool: Pool) -> float:
    """Return the seconds that it takes until all that was written is on the disk."""
    started = time.perf_counter()
    await pool.execute("CHECKPOINT")
    return time.perf_counter() - started


async def _restored_plainly(target: ConnectTarget, directory: Path, file: Path) -> None:
    options = ["--no-owner", "--no-privileges", "--exit-on-error", f"--jobs={load.jobs()}"]
    arguments = [*options, "--dbname", target.libpq_url(), str(file)]
    await _run(str(directory / "pg_restore"), *arguments, environment=target.libpq_environment())


@contextlib.asynccontextmanager
async def _fresh(target: ConnectTarget) -> AsyncIterator[ConnectTarget]:
    """Lend a database with nothing in it."""
    fresh = target.with_database("plainly_restored")
    name = quote_identifier(str(fresh.database))
    async with connect(target) as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield fresh
        finally:
            await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def _no_safety() -> tuple[None, str]:
    return None, ""


async def measure(pool: Pool, *, rounds: int = 5) -> list[Figure]:
    """Fill the tables, then make and bring back backups in turn with `pg_dump` and `pg_restore`."""
    async with pool.acquire() as connection:
        await ensure_partitions(connection, pool.now())  # as every start of the bot does
    for statement, number in zip(_FILL, ((), (USERS,), (MEMBERS,), (CHANGES,)), strict=True):
        await pool.execute(statement, *number)
    for table in ("users", "members", "changes"):
        await pool.execute(f"VACUUM ANALYZE {table}")
    room = Path(tempfile.mkdtemp(prefix="guildbook-bench-backup-"))
    service = BackupService(Settings(_env_file=None, data_dir=room))  # type: ignore[call-arg]
    directory = await client_tools.find_directory(pool.server_version_num // 10_000)
    id, size = "", 0
    made: list[float] = []
    dumped: list[float] = []
    back: list[float] = []
    restored: list[float] = []
    back_on_disk: list[float] = []
    until_live: list[float] = []
    restored_on_disk: list[float] = []
    while_made, while_back, while_drilled = Watch(), Watch(), Watch()

    async def make() -> str:
        return (await create(pool, service.catalog, BackupRequest())).id

    async def dump() -> None:
        target = pool.direct
        options = ["--format=custom", f"--compress={COMPRESSION}", "--no-owner", "--no-privileges"]
        arguments = [*options, "--file", str(room / "plain.dump"), "--dbname", target.libpq_url()]
        await _run(str(directory / "pg_dump"), *arguments, environment=target.libpq_environment())

    async def bring() -> None:
        async with service.catalog.open(id, pool.server_version_num // 10_000) as one:
            done = await restore_archive(pool, one, safety_backup=_no_safety)
            if not done.ok:
                raise RuntimeError(done.text)
            until_live.append(float(done.data["seconds_until_live"]))

    try:
        for turn in range(rounds):
            ways: list[tuple[list[float], Callable[[], Awaitable[Any]]]] = [(made, make), (dumped, dump)]
            for seconds, work in ways if turn % 2 else ways[::-1]:
                spent, result = await _timed(pool, work)
                seconds.append(spent)
                id = result or id
            size = (room / "plain.dump").stat().st_size
        for turn in range(rounds):
            for is_ours in (True, False) if turn % 2 else (False, True):
                if is_ours:
                    back.append((await _timed(pool, bring))[0])
                    back_on_disk.append(back[-1] + await _forced(pool))
                    continue
                async with _fresh(pool.direct) as fresh:
                    plainly = partial(_restored_plainly, fresh, directory, room / "plain.dump")
                    restored.append((await _timed(pool, plainly))[0])
                    restored_on_disk.append(restored[-1] + await _forced(pool))
        # Not in the rounds before: who looks a thousand times a second takes time from one side only.
        async with while_made.watching():
            id = await make()
        async with while_back.watching():
            await bring()
        async with while_drilled.watching():
            drill_seconds, drilled = await _timed(pool, lambda: service.drill(pool, id))
        if not drilled.ok:
            raise RuntimeError(drilled.text)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    rows = USERS + MEMBERS + CHANGES
    return [
        ratio(f"making a backup of {rows:,} rows: time against `pg_dump -Fc`", made, dumped, "≤", 1.15),
        Figure("`pg_dump -Fc` for that", dumped, unit=" s"),
        Figure("its archive", (size / 1e6,), unit=" MB"),
        ratio("bringing it back, counted: time against `pg_restore`", back, restored, "≤", 1.3),
        ratio("the same until it is live, checksum not counted", until_live[:rounds], restored),
        ratio("the first of these until all is on the disk, on both sides", back_on_disk, restored_on_disk),
        Figure(f"`pg_restore -j {load.jobs()}` for that", restored, unit=" s"),
        Figure("a drill of it", (drill_seconds,), unit=" s"),
        Figure("longest loop stall while a backup is made", (while_made.stall * 1e3,), "≤", 50, " ms"),
        Figure("longest loop stall while one is brought back", (while_back.stall * 1e3,), "≤", 50, " ms"),
        Figure("longest loop stall during a drill", (while_drilled.stall * 1e3,), "≤", 50, " ms"),
        Figure("memory growth while a backup is made", (while_made.growth,), unit=" MB"),
        Figure("memory growth while one is brought back", (while_back.growth,), unit=" MB"),
    ]

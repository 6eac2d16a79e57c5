"""What `python bot.py db …` does: the database from the command line, embedded or not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.database.urls import resolve, resolve_direct
from utils.exceptions import DatabaseError
from utils.settings import Settings

ResultT = TypeVar("ResultT")


def address(settings: Settings, data_dir: Path | None) -> ConnectTarget | None:
    """Return where the database is, past any pooler; None: the embedded one. `data_dir` asks for that one."""
    return None if data_dir is not None else resolve_direct(settings) or resolve(settings)


@contextlib.asynccontextmanager
async def reached(settings: Settings, data_dir: Path | None) -> AsyncIterator[ConnectTarget]:
    """Lend the database's address, with the embedded server running for so long where that is the one."""
    target = address(settings, data_dir)
    if target is not None:
        yield target
        return
    server = EmbeddedServer(data_dir or settings.data_dir)
    await server.start()
    try:
        yield server.target()
    finally:
        await server.stop()


async def on_database(settings: Settings, data_dir: Path | None, work: Callable[[Pool], Awaitable[ResultT]]) -> ResultT:
    """Return what `work` returns, given a small pool on the database."""
    async with reached(settings, data_dir) as target:
        database = Pool(target, pool_max=2)
        await database.connect()
        try:
            return await work(database)
        finally:
            await database.close()


async def upgrade(settings: Settings, data_dir: Path | None) -> str:
    """Bring the schema up to date and say what was done."""
    from utils.operations import migrations

    async with reached(settings, data_dir) as target:
        waiting = await migrations.pending(target)
        await migrations.upgrade(target)
    return f"applied: {', '.join(waiting)}" if waiting else "the schema is up to date"


async def current(settings: Settings, data_dir: Path | None) -> str:
    """Say which revision the database is at, and which ones wait."""
    from utils.operations import migrations

    async with reached(settings, data_dir) as target:
        revision, waiting = await migrations.current(target), await migrations.pending(target)
    state = f"{', '.join(waiting)} not applied (python bot.py db upgrade)" if waiting else "up to date"
    return f"{revision or 'no revision'}: {state}"


async def check(settings: Settings, data_dir: Path | None) -> list[str]:
    """Return what differs between the database and the models, one line each."""
    from utils.operations import migrations

    async with reached(settings, data_dir) as target:
        return await migrations.check_drift(target)


def psql(settings: Settings, data_dir: Path | None, arguments: Sequence[str]) -> int:
    """Run psql on the database and return its exit code. Raises `DatabaseError` when there is none."""
    target = address(settings, data_dir)
    if target is not None:
        program = shutil.which("psql") or str(EmbeddedServer(settings.data_dir).psql)
        command = [program, target.libpq_url(), *arguments]
        os.execve(program, command, {**os.environ, **target.libpq_environment()})
    server = EmbeddedServer(data_dir or settings.data_dir)
    if not (server.cluster / "PG_VERSION").exists():
        raise DatabaseError(f"there is no database under {server.data_dir} yet: make run or make demo makes one")
    asyncio.run(server.start())
    # Ctrl-C is for psql, which cancels its query; a handler, unlike SIG_IGN, is not handed down.
    former = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        return subprocess.run([str(server.psql), server.target().libpq_url(), *arguments], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, former)
        asyncio.run(server.stop())

"""What `python bot.py db …` does: the database from the command line, embedded or not."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from utils.database import Pool
from utils.database.embedded import EmbeddedServer, open_target
from utils.exceptions import DatabaseError
from utils.settings import Settings

ResultT = TypeVar("ResultT")


async def on_database(settings: Settings, data_dir: Path | None, work: Callable[[Pool], Awaitable[ResultT]]) -> ResultT:
    """Return what `work` returns, given a small pool on the database."""
    settings = settings.with_data_dir(data_dir)
    async with open_target(settings.direct_target, settings.data_dir) as target:
        database = Pool(target, pool_max=2)
        await database.connect()
        try:
            return await work(database)
        finally:
            await database.close()


async def upgrade(settings: Settings, data_dir: Path | None) -> str:
    """Bring the schema up to date and say what was done."""
    from utils.operations import migrations

    settings = settings.with_data_dir(data_dir)
    async with open_target(settings.direct_target, settings.data_dir) as target:
        waiting = await migrations.pending(target)
        await migrations.upgrade(target)
    return f"applied: {', '.join(waiting)}" if waiting else "the schema is up to date"


async def current(settings: Settings, data_dir: Path | None) -> str:
    """Say which revision the database is at, and which ones wait."""
    from utils.operations import migrations

    settings = settings.with_data_dir(data_dir)
    async with open_target(settings.direct_target, settings.data_dir) as target:
        revision, waiting = await migrations.current(target), await migrations.pending(target)
    state = f"{', '.join(waiting)} not applied (python bot.py db upgrade)" if waiting else "up to date"
    return f"{revision or 'no revision'}: {state}"


async def check(settings: Settings, data_dir: Path | None) -> list[str]:
    """Return what differs between the database and the models, one line each."""
    from utils.operations import migrations

    settings = settings.with_data_dir(data_dir)
    async with open_target(settings.direct_target, settings.data_dir) as target:
        return await migrations.check_drift(target)


def psql(settings: Settings, data_dir: Path | None, arguments: Sequence[str]) -> int:
    """Run psql on the database and return its exit code. Raises `DatabaseError` when there is none."""
    settings = settings.with_data_dir(data_dir)
    server = EmbeddedServer(settings.data_dir)
    target = settings.direct_target
    if target is not None:
        program = shutil.which("psql") or str(server.psql)
        command = [program, target.libpq_url(), *arguments]
        os.execve(program, command, {**os.environ, **target.libpq_environment()})
    if not server.has_data:
        raise DatabaseError(f"there is no database under {server.data_dir} yet: make run or make demo creates one")

    async def run() -> int:
        async with open_target(None, settings.data_dir) as embedded:
            # Ctrl-C is for psql, which cancels its query. The child does not inherit a handler, but would SIG_IGN.
            former = signal.signal(signal.SIGINT, lambda *_: None)
            try:
                process = await asyncio.create_subprocess_exec(str(server.psql), embedded.libpq_url(), *arguments)
                return await process.wait()
            finally:
                signal.signal(signal.SIGINT, former)

    return asyncio.run(run())

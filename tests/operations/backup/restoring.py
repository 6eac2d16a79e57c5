"""What the tests of restoring share: databases with something in them, and what is in them in a few numbers."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import typer

from utils.cli.restore import register
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.bot_process import environment
from utils.exceptions import BackupError
from utils.operations.action import Progress
from utils.operations.backup import scratch
from utils.operations.backup.source import Archive, Known

ROOT = Path(__file__).parents[3]
#: Tables whose rows a restore brings back; those of `ops` it does not.
_TABLES = (
    "SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class AS c"
    " JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition"
    " AND n.nspname NOT IN ('ops', 'information_schema') AND n.nspname !~ '^pg_' ORDER BY 1"
)


@asynccontextmanager
async def asking(target: ConnectTarget) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Lend a connection of nobody's."""
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10, command_timeout=60)
    try:
        yield connection
    finally:
        connection.terminate()


async def ask(target: ConnectTarget, query: str, *arguments: Any) -> Any:
    """Return what one statement says."""
    async with asking(target) as connection:
        return await connection.fetchval(query, *arguments)


async def tell(target: ConnectTarget, *statements: str) -> None:
    """Run statements."""
    async with asking(target) as connection:
        for statement in statements:
            await connection.execute(statement)


async def sums(target: ConnectTarget, query: str = _TABLES) -> dict[str, str]:
    """Return for each table the number and a checksum of its rows, whatever their order."""
    async with asking(target) as connection:
        names = [row["name"] for row in await connection.fetch(query)]
        return {
            name: await connection.fetchval(
                f"SELECT concat(count(*), ' ', sum(hashtextextended(t::text, 0)::numeric)) FROM {name} AS t"  # noqa: S608
            )
            for name in names
        }


async def databases(target: ConnectTarget, purpose: str) -> list[str]:
    """Return the names of the databases beside one that serve a purpose."""
    async with asking(target.with_database("postgres")) as connection:
        return await scratch.there(connection, str(target.database), purpose)


@asynccontextmanager
async def cleaned(target: ConnectTarget) -> AsyncIterator[None]:
    """Drop what restores have left beside a database after the block."""
    try:
        yield
    finally:
        async with asking(target.with_database("postgres")) as connection:
            for name in await scratch.there(
                connection, str(target.database), scratch.RESTORE, scratch.DRILL, scratch.BEFORE
            ):
                await scratch.drop(connection, name)


@asynccontextmanager
async def pooled(target: ConnectTarget) -> AsyncIterator[Pool]:
    """Lend a pool on a database."""
    database = Pool(target, pool_max=4, connect_timeout=10)
    await database.connect()
    try:
        yield database
    finally:
        await database.close()


async def until_true(target: ConnectTarget, query: str, *arguments: Any) -> None:
    """Wait until a query says so."""
    async with asyncio.timeout(20), asking(target) as connection:
        while not await connection.fetchval(query, *arguments):  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)


async def dumped(server: EmbeddedServer, target: ConnectTarget, file: Path) -> Archive:
    """Make an archive of a database as pg_dump does it, counted."""
    process = await asyncio.create_subprocess_exec(
        str(server.bin_dir / "pg_dump"), "-Fc", "-f", str(file), target.libpq_url()
    )
    assert await process.wait() == 0
    async with asking(target) as connection:
        rows = await connection.fetch(
            "SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE c.relkind = 'r' AND n.nspname IN ('public', 'ops')"
        )
        counts = {
            (schema, name): await connection.fetchval(f'SELECT count(*) FROM "{schema}"."{name}"')  # noqa: S608
            for schema, name in rows
        }
        revision = await connection.fetchval("SELECT version_num FROM alembic_version")
    return Archive("20260101T000000Z-test", file, server.bin_dir, datetime.now(UTC), server.version, revision, counts)


class Shelf:
    """Backups in memory: dumps that were made by `dumped`, and the notes beside them."""

    def __init__(self, *archives: Archive) -> None:
        self.archives = {archive.id: archive for archive in archives}
        self.notes: dict[str, bytes] = {}
        self.saved: list[str] = []

    @asynccontextmanager
    async def opened(self, which: str, server: int, progress: Progress) -> AsyncIterator[Archive]:
        """Lend a backup."""
        if which != "latest" and which not in self.archives:
            raise BackupError(f"there is no backup {which}")
        yield self.archives[which] if which in self.archives else list(self.archives.values())[-1]

    async def save(self, database: Pool, reason: str, progress: Progress) -> str:
        """Say that it was saved."""
        self.saved.append(reason)
        return "safe"

    async def newest(self) -> Known | None:
        """Return the last one."""
        for archive in reversed(self.archives.values()):
            return Known(archive.id, archive.made_at, sum(archive.counts.values()))
        return None

    async def read_note(self, name: str) -> bytes | None:
        """Return a note."""
        return self.notes.get(name)

    async def write_note(self, name: str, content: bytes) -> None:
        """Keep a note."""
        self.notes[name] = content


def put_down(directory: Path, archive: Archive) -> None:
    """Write down what an archive is, for a process of its own."""
    values = {
        "id": archive.id, "file": str(archive.file), "tools": str(archive.tools), "major": archive.major,
        "made_at": archive.made_at.isoformat(), "revision": archive.revision,
        "counts": {".".join(table): rows for table, rows in archive.counts.items()},
    }  # fmt: skip
    (directory / "archive.json").write_text(json.dumps(values))


def shelf(directory: Path) -> Shelf:
    """Return the place with the archive that was put down."""
    values = json.loads((directory / "archive.json").read_text())
    archive = Archive(
        id=values["id"],
        file=Path(values["file"]),
        tools=Path(values["tools"]),
        made_at=datetime.fromisoformat(values["made_at"]),
        major=values["major"],
        revision=values["revision"],
        counts={(schema, name): rows for (schema, name), rows in _split(values["counts"])},
    )
    return Shelf(archive)


def _split(counts: dict[str, int]) -> list[tuple[tuple[str, str], int]]:
    return [((table.split(".")[0], table.split(".")[1]), rows) for table, rows in counts.items()]


def command_line() -> None:
    """Be `python bot.py backup …`, with the archive of the directory in SHELF."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    backup = typer.Typer()
    register(backup, lambda _: shelf(Path(os.environ["SHELF"])))
    app.add_typer(backup, name="backup")
    kill_at = int(os.environ.get("KILL_AT", "-1"))
    if kill_at >= 0:
        _count(kill_at)
    app()


def _count(kill_at: int) -> None:
    """Kill this process just before its n-th statement, or with 0 say at the end how many there are."""
    told = 0

    def counted(name: str) -> None:
        method = getattr(asyncpg.Connection, name)

        async def call(*args: Any, **named: Any) -> Any:
            nonlocal told
            told += 1
            if told == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return await method(*args, **named)

        setattr(asyncpg.Connection, name, call)

    for name in ("execute", "fetch", "fetchval", "fetchrow", "close"):
        counted(name)
    atexit.register(lambda: sys.stderr.write(f"\nstatements: {told}\n"))


class Typed(NamedTuple):
    """How a command line ended."""

    code: int
    out: str
    err: str


async def typed(
    directory: Path, target: ConnectTarget, *arguments: str, kill_after: float | None = None, **variables: str
) -> Typed:
    """Run `backup …` in a process of its own; `kill_after`: seconds from its first statement to a kill -9."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from tests.operations.backup.restoring import command_line; print('begun', flush=True); command_line()",
        "backup",
        *arguments,
        cwd=directory,
        env=environment(DATABASE_URL=target.libpq_url(), SHELF=str(directory), PYTHONPATH=str(ROOT), **variables),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        await process.stdout.readline()
        if kill_after is not None:
            await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=kill_after)
            if process.returncode is None:
                process.kill()
        out, err = await process.communicate()
    return Typed(process.returncode or 0, out.decode(), err.decode())

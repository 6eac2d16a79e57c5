"""Helpers for the tests of backups: services with data, queries and checksums, and the command line in a subprocess."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from tests.forkserver import start_bot
from tests.waiting import until
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.archive.objects import qualified
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.catalog.identity import Identity
from utils.operations.backup.create import BackupRequest, create
from utils.operations.backup.scratch import databases, schemas
from utils.operations.backup.service import BackupService
from utils.settings import Settings

ROOT = Path(__file__).parents[3]
GUILD = "INSERT INTO guilds (id, name) VALUES (1, 'one') ON CONFLICT DO NOTHING"
ROWS = """
INSERT INTO guilds (id, name) SELECT n, 'guild ' || n FROM generate_series(1, 20) AS n;
INSERT INTO users (id, username) SELECT n, 'user ' || n FROM generate_series(1, 3000) AS n;
INSERT INTO members (guild_id, user_id, nick, roles)
    SELECT n % 20 + 1, n, md5(n::text), ARRAY[n] FROM generate_series(1, 3000) AS n;
INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{"c": 1}');
INSERT INTO ops.suppressions (user_id) VALUES (99);
"""
#: Tables whose rows a restore brings back; it leaves those of `ops` alone.
_RESTORED_TABLES = (
    "SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class AS c"
    " JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition"
    " AND n.nspname NOT IN ('ops', 'information_schema') AND n.nspname !~ '^pg_' AND pg_has_role(c.relowner, 'USAGE')"
    " AND n.nspname NOT LIKE 'guildbook\\_scratch\\_%' ORDER BY 1"
)


# --- backups


def make_settings(directory: Path, **values: Any) -> Settings:
    """Return settings with DATA_DIR in a directory."""
    return Settings(_env_file=None, **{"data_dir": directory, **values})  # type: ignore[call-arg]


class Everyone(Identity):
    """Owns every backup: for tests that are not about whose it is."""

    def owns(self, backup: Manifest, *, is_local: bool) -> bool:
        return True


EVERYONE = Everyone(None, "anywhere", "any")


def make_service(directory: Path, identity: Identity = EVERYONE, **values: Any) -> BackupService:
    """Return a backup service with DATA_DIR in a directory; what takes a pool serves the database of that."""
    settings = make_settings(directory, **values)
    return BackupService(settings, catalog=BackupCatalog(settings, identity=identity))


async def make_backup(service: BackupService, pool: Pool, request: BackupRequest | None = None) -> Manifest:
    """Create a backup and return its manifest."""
    return await create(pool, service.catalog, request or BackupRequest())


async def fill(pool: Pool) -> None:
    """Insert rows to back up."""
    async with pool.acquire() as connection:
        await connection.execute(ROWS)


async def dump(server: EmbeddedServer, target: ConnectTarget, file: Path) -> Archive:
    """Return an archive made with plain pg_dump, with its row counts."""
    process = await asyncio.create_subprocess_exec(
        str(server.bin_dir / "pg_dump"), "-Fc", "-f", str(file), target.libpq_url()
    )
    assert await process.wait() == 0
    async with connect(target) as connection:
        rows = await connection.fetch(
            "SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname IN ('public', 'ops')"
        )
        counts = {
            (schema, name): await connection.fetchval(f"SELECT count(*) FROM {qualified((schema, name))}")  # noqa: S608
            for schema, name in rows
        }
        revision = await connection.fetchval("SELECT version_num FROM guildbook_version")
    return Archive("20260101T000000Z-test", file, server.bin_dir, datetime.now(UTC), server.version, revision, counts)


# --- databases


@asynccontextmanager
async def connect(target: ConnectTarget) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Yield a connection that no pool knows."""
    connection = await asyncpg.connect(**target.connect_kwargs(), timeout=10, command_timeout=60)
    try:
        yield connection
    finally:
        connection.terminate()


async def fetchval(target: ConnectTarget, query: str, *arguments: Any) -> Any:
    """Return the value of one query."""
    async with connect(target) as connection:
        return await connection.fetchval(query, *arguments)


async def execute(target: ConnectTarget, *statements: str) -> None:
    """Run statements."""
    async with connect(target) as connection:
        for statement in statements:
            await connection.execute(statement)


async def until_query(target: ConnectTarget, query: str, *arguments: Any) -> None:
    """Wait until a query returns true."""
    async with connect(target) as connection:
        await until(lambda: connection.fetchval(query, *arguments))


async def table_checksums(target: ConnectTarget) -> dict[str, str]:
    """Return the number of rows of each restored table, with a checksum that does not depend on their order."""
    async with connect(target) as connection:
        names = [row["name"] for row in await connection.fetch(_RESTORED_TABLES)]
        return {
            name: await connection.fetchval(
                f"SELECT concat(count(*), ' ', sum(hashtextextended(t::text, 0)::numeric)) FROM {name} AS t"  # noqa: S608
            )
            for name in names
        }


@asynccontextmanager
async def open_pool(target: ConnectTarget) -> AsyncIterator[Pool]:
    """Yield a pool on a database."""
    pool = Pool(target, pool_max=4, connect_timeout=10)
    await pool.connect()
    try:
        yield pool
    finally:
        await pool.close()


async def scratch_databases(target: ConnectTarget, purpose: str) -> list[str]:
    """Return the names of the databases next to one that have a purpose."""
    async with connect(target.with_database("postgres")) as connection:
        return await databases.list_databases(connection, str(target.database), purpose)


async def scratch_schema_names(target: ConnectTarget) -> list[str]:
    """Return the names of the schemas of restores and drills in a database."""
    query = "SELECT array_agg(nspname::text) FROM pg_namespace WHERE starts_with(nspname, $1)"
    return await fetchval(target, query, schemas.PREFIX) or []


@asynccontextmanager
async def dropping_scratch_databases(target: ConnectTarget) -> AsyncIterator[None]:
    """Drop the databases that restores have left next to one after the block."""
    try:
        yield
    finally:
        async with connect(target.with_database("postgres")) as connection:
            for name in await databases.list_databases(
                connection, str(target.database), databases.RESTORE, databases.BEFORE
            ):
                await databases.drop(connection, name)


# --- the command line in a subprocess


class Exit(NamedTuple):
    """How a subprocess ended."""

    code: int
    out: str
    err: str


async def run_backup_command(
    directory: Path, target: ConnectTarget, *arguments: str, kill_after: float | None = None, **variables: str
) -> Exit:
    """Run `python bot.py backup …` with DATA_DIR in a directory.

    `kill_after` is the number of seconds after the start of its work until it is killed with SIGKILL. The variable
    KILL_AT is the number of the database call before which it kills itself; 0 prints their number at the end.
    """
    settings = {"DATABASE_URL": target.libpq_url(), "DATA_DIR": str(directory), **variables}
    process = await start_bot(
        directory, "backup", *arguments, settings=settings, module="tests.operations.backup.killable", is_merged=False
    )
    async with asyncio.timeout(60):
        await process.stdout.readline()
        if kill_after is not None:
            await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=kill_after)
            if process.returncode is None:
                process.kill()
        out, err = await process.communicate()
    return Exit(process.returncode or 0, out.decode(), err.decode())

"""Revisions that run in scratch schemas do not reach the live tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operations.backup.helpers import connect, dump, execute, fetchval, scratch_schema_names
from tests.operations.backup.shared import EXTENSIONS
from tests.operations.migrations.support import EXTRA, with_revision
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.database.placement import Placement
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.backup.scratch.tables import open_scratch_tables

pytestmark = pytest.mark.slow


def upgrade_with(*statements: str) -> str:
    """Return the source of a revision's upgrade that runs statements."""
    return "\n    ".join(["def upgrade() -> None:", *(f"op.execute({statement!r})" for statement in statements)])


REACHING = [
    "DELETE FROM public.guilds",
    'ALTER TABLE "public" . "guilds" ADD extra int',
    "DROP TABLE IF EXISTS\n  Public.guilds",
    "CREATE TABLE public.extra (id int)",
    "CREATE TYPE public.mood AS ENUM ('good')",
    "CREATE INDEX extra ON ONLY public.guilds (name)",
    "SELECT nextval('public.extra')",
    "DO $$ BEGIN EXECUTE 'TRUNCATE public.guilds'; END $$",
    "CREATE FUNCTION extra() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM public.guilds'",
    "SET search_path TO public",
    "SELECT set_config('search_path', 'public', false); DELETE FROM guilds",
    "ALTER TABLE guilds SET SCHEMA public",
    "GRANT SELECT ON ALL TABLES IN SCHEMA public TO pg_monitor",
]
ALLOWED = [
    "DELETE FROM guilds -- not public.guilds",
    "/* public.guilds */ ALTER TABLE guilds ADD extra public.{extension}",
    "ALTER TABLE guilds ADD republic int",
    "SELECT republic.id FROM guilds AS republic",
    "CREATE EXTENSION IF NOT EXISTS {extension} WITH SCHEMA public",
    "DELETE FROM ops.leases",
]


@pytest.mark.parametrize("statement", REACHING)
async def test_refuses_statements_that_name_the_live_schema(
    tmp_path: Path, server: EmbeddedServer, database: Pool, statement: str
) -> None:
    await execute(database.target, "INSERT INTO guilds (id, name) VALUES (1, 'live')")
    options = with_revision(tmp_path, upgrade_with(statement))
    with pytest.raises(MigrationError, match=r"names the schema public \(.*--whole-database") as error:
        await run_in_scratch(server, database, options)
    assert "\n" not in str(error.value)
    assert await fetchval(database.target, "SELECT array_agg(name) FROM guilds") == ["live"]
    assert await scratch_schema_names(database.target) == []


@pytest.mark.parametrize("statement", ALLOWED)
async def test_allows_others(tmp_path: Path, server: EmbeddedServer, database: Pool, statement: str) -> None:
    find = "SELECT name::text FROM pg_available_extensions WHERE name = ANY($1::text[]) LIMIT 1"
    extension = await fetchval(database.target, find, list(EXTENSIONS))  # each has a type of its name
    await execute(database.target, f"CREATE EXTENSION {extension}", "INSERT INTO guilds (id, name) VALUES (1, 'live')")
    await run_in_scratch(server, database, with_revision(tmp_path, upgrade_with(statement.format(extension=extension))))
    assert await fetchval(database.target, "SELECT array_agg(name) FROM guilds") == ["live"]


async def test_a_migration_of_the_live_tables_may_name_their_schema(tmp_path: Path, database: Pool) -> None:
    options = with_revision(tmp_path, upgrade_with("CREATE TABLE public.extra (id int)"))
    await migrations.upgrade(database, options=options)
    assert await migrations.current(database) == EXTRA


async def test_schemas_of_their_own(tmp_path: Path, server: EmbeddedServer, empty_target: ConnectTarget) -> None:
    placed = empty_target.with_placement(Placement.of("Bot-X"))
    await migrations.upgrade(placed)
    pool = Pool(placed)
    await pool.connect()
    try:
        for statement, is_allowed in (
            ('DELETE FROM "Bot-X".guilds', False),
            ('DELETE FROM "Bot-X_ops".leases', False),
            ("DROP TABLE IF EXISTS public.guilds", True),
            ("DELETE FROM ops.leases", True),
        ):
            options = with_revision(tmp_path, upgrade_with(statement))
            if is_allowed:
                await run_in_scratch(server, pool, options)
            else:
                with pytest.raises(MigrationError, match="names the schema Bot-X"):
                    await run_in_scratch(server, pool, options)
    finally:
        await pool.close()


async def run_in_scratch(server: EmbeddedServer, pool: Pool, options: migrations.MigrationOptions) -> None:
    """Run every revision in scratch schemas, as a restore of an older backup does into an upgraded database."""
    archive = await dump(server, pool.target, options.scripts / "dump")
    async with open_scratch_tables(pool, is_restore=True, options=options) as place:
        async with connect(pool.direct) as connection:
            await place._run_revisions(connection, archive)
        assert await place.migrate(archive) == [EXTRA]

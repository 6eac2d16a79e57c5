"""What operators do follows the tables to the schema that the user decided on, and stays out of the others."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from models import Base
from tests.bot.running import embedded_server, run_cli
from tests.conftest import cloned
from tests.database.placements import WAYS, list_relations, placed
from tests.operations.backup.helpers import make_backup, make_service
from tests.operations.migrations.support import HEAD, KNOWN
from tests.operations.migrations.test_preview import run_psql, save_preview
from tests.service.test_lease_takeover import QUICK
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.database.cache import Channel, QueryCache
from utils.database.embedded import EmbeddedServer
from utils.database.partitions import ensure_partitions
from utils.database.placement import Placement
from utils.demo.bot_process import environment
from utils.exceptions import MigrationError
from utils.operations import migrations
from utils.operations.backup.create import BackupRequest
from utils.operations.development.seed import reset, seed
from utils.operations.migrations import admin, schema_catalog
from utils.operations.migrations.environment import LOCK_KEY
from utils.operations.upkeep import describe, maintain, statistics
from utils.service.lease import Lease

pytestmark = pytest.mark.slow

MEMBERS = 20
ROOT = Path(__file__).parents[2]


async def connected(target: ConnectTarget) -> Pool:
    pool = Pool(target, pool_max=4, connect_timeout=10, acquire_timeout=10)
    await pool.connect()
    return pool


@pytest.fixture(params=list(WAYS))
async def pool(request: pytest.FixtureRequest, target: ConnectTarget) -> AsyncIterator[Pool]:
    """A populated Guildbook in a schema of its own, beside an empty one in `public`."""
    async with placed(target, request.param) as (ours, _):
        await migrations.upgrade(ours)
        pool = await connected(ours)
        await seed(pool, guilds=1, members=MEMBERS)
        yield pool
        await pool.close()


async def count_of_public(target: ConnectTarget) -> int:
    connection = await asyncpg.connect(**target.connect_kwargs())
    try:
        return int(await connection.fetchval("SELECT count(*) FROM public.members"))
    finally:
        await connection.close()


async def test_everything_follows(pool: Pool, target: ConnectTarget, tmp_path: Path) -> None:
    main, ops = pool.placement.main, pool.placement.ops
    status = await admin.status(pool)
    assert status.ok, status.text
    assert status.data["schemas"] == [main, ops]
    assert f"schemas: {main}, {ops}" in status.text

    described = {(table["schema"], table["label"]): table for table in await describe.describe(pool)}
    assert {schema for schema, _ in described} == {main, ops}
    assert all((pool.placement.resolve(table.schema), str(table)) in described for table in Base.metadata.sorted_tables)
    assert described[main, "members"]["comment"]
    (leases,) = await describe.describe(pool, "ops.leases")
    assert (leases["schema"], leases["label"]) == (ops, "ops.leases")
    assert "ops.leases (table" in describe.plain([leases])

    await statistics.sample_sizes(pool)
    names = set(await pool.fetchval("SELECT array_agg(table_name) FROM ops.table_sizes"))
    assert {"members", "ops.leases"} < names
    assert not any(name.startswith(("public.", f"{main}.", f"{ops}.")) for name in names)

    for asked in (["ops.leases", "members"], [f"{ops}.leases", f"{main}.members"]):
        manifest = await make_backup(make_service(tmp_path), pool, BackupRequest(tables=asked))
        assert set(manifest.counts) == {(ops, "leases"), (main, "members")}

    await pool.execute("UPDATE members SET nick = 'x'")
    await pool.execute("CREATE MATERIALIZED VIEW everybody AS SELECT count(*) AS n FROM members WITH NO DATA")
    maintained = await maintain.maintain(pool)
    assert maintained.ok, maintained.text
    async with pool.acquire() as connection:
        await ensure_partitions(connection, pool.now(), 4)
    partition = "SELECT relnamespace::regnamespace::text FROM pg_class WHERE relname ~ '^changes_y' GROUP BY 1"
    assert [row[0].strip('"') for row in await pool.fetch(partition)] == [main]
    database = Database(pool)
    try:
        assert list(await database.refresh_materialized_views()) == [], "no revision made it"
        assert list(await database.refresh_materialized_views(["everybody"])) == [f"{main}.everybody"]
    finally:
        await database.close(1.0)
    await pool.execute("DROP MATERIALIZED VIEW everybody")

    assert await pool.fetchval("SELECT count(*) FROM members") == MEMBERS
    await reset(pool, name=None, environment="development", backup=None)
    assert await pool.fetchval("SELECT count(*) FROM members") == 0
    assert await migrations.current(pool) == HEAD
    assert set(await list_relations(target)) == {"public", "ops", main, ops}
    assert await count_of_public(target) == 0


async def test_a_reset_leaves_the_other_guildbook_alone(pool: Pool, target: ConnectTarget) -> None:
    other = await connected(replace(target, schema="public"))
    try:
        await reset(other, name=None, environment="development", backup=None)
        assert await pool.fetchval("SELECT count(*) FROM members") == MEMBERS
        assert (await admin.status(pool)).ok
    finally:
        await other.close()


async def test_another_guildbook_on_the_path_is_not_ours(target: ConnectTarget) -> None:
    behind = replace(target, schema="botx", server_settings={"search_path": "public"})
    assert await migrations.pending(behind) == KNOWN
    await migrations.upgrade(behind)
    await admin.downgrade(pool := await connected(behind), KNOWN[0], backup=None)
    try:
        assert await migrations.find_pause(pool) is not None
        assert await migrations.find_pause(target) is None
        assert await migrations.current(pool) == KNOWN[0]
        assert await migrations.current(target) == HEAD
    finally:
        await pool.close()


async def test_the_file_of_a_preview_makes_the_same(
    server: EmbeddedServer, empty_target: ConnectTarget, target: ConnectTarget, tmp_path: Path
) -> None:
    ours = replace(empty_target, schema="Bot-X")
    await run_psql(server, empty_target, await save_preview(tmp_path, ours, None))
    assert await migrations.current(ours) == HEAD
    assert set(await list_relations(ours)) == {"Bot-X", "Bot-X_ops"}
    assert await schema_catalog.read(ours) == await schema_catalog.read(target)
    await run_psql(server, empty_target, await save_preview(tmp_path, ours, "base", down=True))
    assert await schema_catalog.read(ours) == {}


async def test_a_stamp_is_compared_in_the_same_schema(empty_target: ConnectTarget) -> None:
    pool = await connected(replace(empty_target, schema="botx"))
    try:
        await migrations.upgrade(pool)
        await pool.execute("DELETE FROM guildbook_version")
        outcome = await admin.stamp(pool, "head")
        assert outcome.data["after"] == HEAD
        await pool.execute("DELETE FROM guildbook_version; ALTER TABLE ops.leases ADD COLUMN more int")
        with pytest.raises(MigrationError, match=r"ops\.leases"):
            await admin.stamp(pool, "head")
    finally:
        await pool.close()


async def test_migrations_of_two_guildbooks_do_not_wait_for_one_another(target: ConnectTarget) -> None:
    holder = await asyncpg.connect(**target.connect_kwargs())
    await holder.execute("SELECT pg_advisory_lock($1)", LOCK_KEY)
    await holder.execute("SELECT pg_advisory_lock($1)", maintain.LOCK_KEY)
    try:
        ours = replace(target, schema="botx")
        await migrations.upgrade(ours, timeout=0.5)
        pool = await connected(ours)
        assert (await maintain.maintain(pool)).ok
        await pool.close()
        with pytest.raises(MigrationError, match="another process has been migrating"):
            await migrations.upgrade(target, timeout=0.1)
    finally:
        await holder.close()


@pytest.mark.direct("nothing listens through a pooler")
async def test_caches_of_two_guildbooks_do_not_hear_one_another(target: ConnectTarget) -> None:
    await migrations.upgrade(replace(target, schema="botx"))
    pools = [await connected(target), await connected(replace(target, schema="botx"))]
    caches, channels = [QueryCache(), QueryCache(), QueryCache()], []
    try:
        # Two processes of one Guildbook, and one of the other.
        for pool, cache in zip((pools[0], pools[1], pools[1]), caches, strict=True):
            await cache.load(pool)
            channels.append(Channel(cache, pool.direct, pool))
            await channels[-1].start()
        async with asyncio.timeout(20):
            while not channels[1]._peers or not channels[2]._peers:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0.01)
        assert not channels[0]._peers
        assert caches[1].statement("SELECT * FROM guilds").reads == frozenset({"botx.guilds"})
        assert caches[1].statement("SELECT * FROM ops.leases").reads == frozenset({"botx_ops.leases"})
        assert caches[0].statement("SELECT * FROM ops.leases").reads == frozenset({"ops.leases"})
    finally:
        for channel in channels:
            await channel.stop()
        for cache in caches:
            await cache.close()
        for pool in pools:
            await pool.close()


async def test_each_guildbook_has_a_lease_of_its_own(target: ConnectTarget) -> None:
    await migrations.upgrade(replace(target, schema="botx"))
    pools = [await connected(target), await connected(replace(target, schema="botx"))]
    leases = [Lease(pool.direct, f"bot {number}", timings=QUICK) for number, pool in enumerate(pools)]
    try:
        async with asyncio.timeout(20):
            assert [(await lease.wait()).holder for lease in leases] == ["bot 0", "bot 1"]
        # A suspended holder in the schema is terminated as anywhere.
        connection = await asyncpg.connect(**pools[1].direct.connect_kwargs())
        await leases[1].release(5)
        await connection.execute("BEGIN; SELECT FROM ops.leases FOR KEY SHARE")
        taker = Lease(pools[1].direct, "taker", timings=QUICK)
        leases.append(taker)
        async with asyncio.timeout(20):
            assert (await taker.wait()).holder == "taker"
        connection.terminate()
        assert await pools[0].fetchval("SELECT holder FROM ops.leases") == "bot 0"
    finally:
        for lease in leases:
            await lease.release(5)
        for pool in pools:
            await pool.close()


async def test_a_missing_right_is_one_line_that_says_what_to_do(server: EmbeddedServer) -> None:
    async with cloned(server, "template1") as admin_target:
        connection = await asyncpg.connect(**admin_target.connect_kwargs())
        role = f"guest_{admin_target.database}"
        await connection.execute(f"CREATE ROLE {role} LOGIN")
        try:
            guest = replace(admin_target, user=role)
            for target in (guest, replace(guest, schema="botx")):
                with pytest.raises(MigrationError, match=r"permission denied.*DB_SCHEMA") as caught:
                    await migrations.upgrade(target)
                assert "\n" not in str(caught.value)
        finally:
            await connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
            await connection.close()
    assert Placement.of("botx").lock_key(7) != 7


async def test_alembics_own_command_line_follows_on_the_embedded_server(tmp_path: Path) -> None:
    settings = {"DB_SCHEMA": "botx", "DATA_DIR": str(tmp_path)}
    async with embedded_server(tmp_path):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "alembic", "upgrade", "head", cwd=ROOT, env=environment(**settings),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(60):
            output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        code, text = await run_cli(tmp_path, "db", "status", **settings)
        assert (code, "botx" in text) == (0, True), text

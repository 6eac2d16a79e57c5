"""Where the tables are, how that is decided, and that everything on a connection finds them there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest
from sqlalchemy import text

from models import Base
from tests.database.access import accessed
from tests.database.placements import WAYS, list_relations, placed
from tests.database.pooler import needs_pgbouncer, pgbouncer
from utils.database import ConnectTarget, Pool
from utils.database.address import parse_url, resolve_targets
from utils.database.ownership import VERSION_TABLE
from utils.database.placement import Placement, check_schema, placement_on
from utils.database.target import located
from utils.exceptions import DatabaseError, MigrationError, SettingsError
from utils.operations import migrations
from utils.operations.migrations import admin

MAIN = {table.name for table in Base.metadata.tables.values() if table.schema is None} | {VERSION_TABLE}
#: tests/worlds has schemas behind a pooler.
ONE_USER = pytest.mark.direct("the tests' pooler connects as one user, whatever the role")
OWN = {table.name for table in Base.metadata.tables.values() if table.schema == "ops"}


@pytest.fixture(params=list(WAYS))
async def place(
    request: pytest.FixtureRequest, empty_target: ConnectTarget
) -> AsyncIterator[tuple[ConnectTarget, str]]:
    async with placed(empty_target, request.param) as found:
        yield found


async def connected(target: ConnectTarget) -> Pool:
    pool = Pool(target, pool_max=4, connect_timeout=10, acquire_timeout=10)
    await pool.connect()
    return pool


# --- deciding


@ONE_USER
@pytest.mark.slow
async def test_the_first_migration_decides(place: tuple[ConnectTarget, str]) -> None:
    target, main = place
    await migrations.upgrade(target)
    relations = await list_relations(target)
    assert set(relations) == {main, f"{main}_ops"}
    assert relations[main] >= MAIN
    assert relations[f"{main}_ops"] >= OWN | {"change_ids"}
    pool = await connected(target)
    try:
        assert pool.placement == Placement(main, f"{main}_ops")
        assert await pool.fetchval("SELECT count(*) FROM guilds") == 0
        assert await pool.fetchval("SELECT to_regclass('ops.leases') IS NOT NULL")
        assert await pool.fetchval("SELECT count(*) FROM ops.migrations") == len(migrations.known_revisions())
        assert (await admin.status(pool)).data["problem"] is None
        assert await migrations.check_drift(pool) == []
        await migrations.downgrade(pool, "base")
    finally:
        await pool.close()
    assert await list_relations(target) == {main: {VERSION_TABLE}}


@pytest.mark.slow
async def test_an_existing_installation_stays_where_it_is(empty_target: ConnectTarget) -> None:
    # Before placements were known, a search_path moved the main tables alone.
    former = Placement("botx", "ops")
    await migrations.upgrade(empty_target.with_placement(former))
    target = replace(empty_target, schema="botx")
    assert (await located(target)).placement == former
    assert await migrations.pending(target) == []


@pytest.mark.slow
async def test_a_schema_that_appears_later_changes_nothing(target: ConnectTarget) -> None:
    connection = await asyncpg.connect(**target.connect_kwargs())
    await connection.execute("CREATE SCHEMA AUTHORIZATION postgres")  # which precedes public on the search_path
    await connection.close()
    pool = await connected(target)
    try:
        assert pool.placement == Placement()
        assert await pool.fetchval("SELECT current_schema()") == "public"
        assert not await migrations.pending(pool)
    finally:
        await pool.close()


async def test_a_search_path_that_leads_nowhere_is_one_clear_line(empty_target: ConnectTarget) -> None:
    pool = Pool(replace(empty_target, server_settings={"search_path": "nowhere"}), connect_timeout=10)
    with pytest.raises(DatabaseError, match=r"search_path of the user postgres \(nowhere\) .* set DB_SCHEMA"):
        await pool.connect()


async def test_a_foreign_users_table_names_the_setting(empty_target: ConnectTarget) -> None:
    connection = await asyncpg.connect(**empty_target.connect_kwargs())
    await connection.execute("CREATE TABLE users (id bigint)")
    await connection.close()
    with pytest.raises(MigrationError, match=r"public\.users\. .*DB_SCHEMA=guildbook"):
        await migrations.upgrade(empty_target)
    await migrations.upgrade(replace(empty_target, schema="guildbook"))
    assert (await list_relations(empty_target))["public"] == {"users"}


@ONE_USER
@pytest.mark.slow
async def test_a_guildbook_of_another_user_on_the_path_is_not_ours(target: ConnectTarget) -> None:
    async with placed(target, "schema named like the user") as (ours, main):
        assert (await located(ours)).placement == Placement.of(main)
        assert (await located(target)).placement == Placement()


@ONE_USER
@pytest.mark.slow
async def test_schemas_made_by_an_administrator_are_used(empty_target: ConnectTarget) -> None:
    async with placed(empty_target, "search_path of the role") as (target, main):
        connection = await asyncpg.connect(**empty_target.connect_kwargs())
        await connection.execute(f"REVOKE CREATE ON DATABASE {target.database} FROM {target.user}")
        with pytest.raises(MigrationError, match="permission denied"):
            await migrations.upgrade(target)
        await connection.execute(f"CREATE SCHEMA {main}_ops AUTHORIZATION {target.user}")
        await connection.close()
        await migrations.upgrade(target)
        assert set(await list_relations(target)) == {main, f"{main}_ops"}


# --- settings


def test_the_setting_precedes_the_address() -> None:
    url = "postgresql://u@h/d?schema=botx"
    assert [target.schema for target in resolve_targets({"DATABASE_URL": url}) if target] == ["botx", "botx"]
    assert parse_url(url).search_path == "botx"
    target, direct = resolve_targets({"DATABASE_URL": url, "DB_SCHEMA": "Bot-X"})
    assert target is not None
    assert direct is not None
    assert (target.schema, direct.schema) == ("Bot-X", "Bot-X")
    assert target.connect_kwargs()["server_settings"]["search_path"] == '"Bot-X"'


def test_both_addresses_share_one_schema() -> None:
    urls = {"DATABASE_URL": "postgresql://u@pooler/d", "DATABASE_UNPOOLED_URL": "postgresql://u@h/d?schema=botx"}
    target, _ = resolve_targets(urls)
    assert target is not None
    assert target.schema == "botx"
    with pytest.raises(SettingsError, match="set DB_SCHEMA"):
        resolve_targets(urls | {"DATABASE_URL": "postgresql://u@pooler/d?schema=other"})


def test_further_schemas_of_the_address_follow() -> None:
    target = parse_url("postgresql://u@h/d?schema=botx&search_path=extensions")
    assert target.connect_kwargs()["server_settings"]["search_path"] == "botx, extensions"


@pytest.mark.parametrize("name", ["pg_bot", "information_schema", "ops", "it's", 'a"b', "a%s", "x" * 60, "ü" * 30])
def test_refuses_names_that_cannot_be(name: str) -> None:
    assert check_schema(name)
    with pytest.raises(SettingsError, match="DB_SCHEMA: "):
        resolve_targets({"DATABASE_URL": "postgresql://u@h/d", "DB_SCHEMA": name})


# --- several Guildbooks


@pytest.mark.slow
async def test_guildbooks_in_one_database_do_not_meet(empty_target: ConnectTarget) -> None:
    names = ("public", "a", "My.Bot 2", "öps")
    targets = [replace(empty_target, schema=name) for name in names]
    for target in targets:
        await migrations.upgrade(target)
    pools = [await connected(target) for target in targets]
    try:
        for number, pool in enumerate(pools):
            assert await pool.fetchval("SELECT count(*) FROM guilds") == 0
            await pool.execute("INSERT INTO guilds (id) VALUES ($1)", number)
            await pool.execute("INSERT INTO ops.application (id) VALUES ($1)", number)
            await pool.execute(
                "INSERT INTO changes (guild_id, table_name, key, action) VALUES (1, 'ops.t', '{}', 'update')"
            )
        for number, pool in enumerate(pools):
            assert await pool.fetchval("SELECT id FROM ops.application") == number
            assert await migrations.check_drift(pool) == []
        placements = [pool.placement for pool in pools]
        assert len({placement.lock_key(7) for placement in placements}) == len(names)
        assert len({placement.channel("cache") for placement in placements}) == len(names)
        await migrations.downgrade(pools[1], "base")
        assert [await migrations.pending(pool) for pool in (pools[0], pools[2], pools[3])] == [[], [], []]
    finally:
        for pool in pools:
            await pool.close()


async def test_migrations_run_in_any_placement(target: ConnectTarget) -> None:
    scratch = target.with_placement(Placement.of("guildbook_scratch_20261129"))
    result = await migrations.upgrade(scratch, "0003")
    assert result.revisions == ("0001", "0002", "0003")
    assert await migrations.current(scratch) == "0003"
    await migrations.upgrade(scratch)
    assert await migrations.check_drift(scratch) == []
    assert not await migrations.pending(target)


# --- poolers


@needs_pgbouncer
@pytest.mark.slow
async def test_a_schema_is_found_through_a_pooler(empty_target: ConnectTarget) -> None:
    await migrations.upgrade(replace(empty_target, schema="botx"))
    async with pgbouncer(empty_target, size=2) as behind:
        pool = await connected(replace(behind, schema="botx"))
        try:
            assert pool.target.pooled
            async with accessed(pool) as db:
                await db.execute("INSERT INTO guilds (id) VALUES ($1)", 1)
                await db.execute_many("INSERT INTO guilds (id) VALUES ($1)", [(2,), (3,)])
                async with db.transaction():
                    await db.execute("INSERT INTO ops.suppressions (user_id) VALUES ($1)", 1)
                async with db.session() as session:
                    assert (await session.execute(text("SELECT count(*) FROM guilds"))).scalar() == 3
                assert await db.fetchval("SELECT count(*) FROM ops.suppressions") == 1
                async with db.acquire() as connection:
                    assert await connection.fetchval("SELECT count(*) FROM guilds") == 3
            other = await connected(behind)  # which shares the backends, and must not inherit the search_path
            assert await other.fetchval("SELECT current_setting('search_path')") == '"$user", public'
            await other.close()
        finally:
            await pool.close()


@needs_pgbouncer
async def test_a_schema_that_the_server_leads_to_costs_nothing(target: ConnectTarget) -> None:
    async with pgbouncer(target, size=2) as behind:
        pool = await connected(replace(behind, schema="public"))  # Prisma's default
        try:
            assert pool.target.pooled
            assert pool.target.search_path is None
        finally:
            await pool.close()


# --- adapting SQL


@pytest.mark.parametrize(
    ("sql", "adapted"),
    [
        ("SELECT * FROM ops.leases", "SELECT * FROM x_ops.leases"),
        ("SELECT OPS . leases.epoch FROM ops.leases", "SELECT x_ops . leases.epoch FROM x_ops.leases"),
        ("SELECT shops.a, t.ops.b, $ops.c FROM shops", None),
        ("SELECT 'ops.leases', \"ops\".t -- ops.a\n/* it's ops.b */", None),
        ("SELECT E'\\'ops.a', 'it''s ops.a'", None),
        ("SELECT to_regclass('ops.leases')", "SELECT to_regclass('x_ops.leases')"),
        ("SELECT nextval( 'ops.ids') + currval('ops.ids')", "SELECT nextval( 'x_ops.ids') + currval('x_ops.ids')"),
        ("SELECT 'ops.ids'::regclass, 'ops.ids'::text", "SELECT 'x_ops.ids'::regclass, 'ops.ids'::text"),
        ("SELECT CAST('ops.a' AS regclass)", "SELECT CAST('x_ops.a' AS regclass)"),
        ("SELECT CAST('ops.a' AS text)", None),
        ("SELECT to_regnamespace('ops'), 'ops'", "SELECT to_regnamespace('x_ops'), 'ops'"),
        ("CREATE SCHEMA IF NOT EXISTS ops", "CREATE SCHEMA IF NOT EXISTS x_ops"),
        ("GRANT USAGE ON SCHEMA ops TO ops", "GRANT USAGE ON SCHEMA x_ops TO ops"),
        ("DO $$ BEGIN DELETE FROM ops.a; END $$", "DO $$ BEGIN DELETE FROM x_ops.a; END $$"),
        ("SELECT $tag$ ops.a $tag$, $1, ops.b.c", "SELECT $tag$ ops.a $tag$, $1, x_ops.b.c"),
    ],
)  # fmt: skip
def test_adapts_names_of_relations_only(sql: str, adapted: str | None) -> None:
    assert Placement("x", "x_ops").adapt(sql) == (sql if adapted is None else adapted)
    assert Placement().adapt(sql) == sql


def test_odd_names_are_quoted() -> None:
    odd = Placement.of('B\'s "own"')
    assert odd.adapt("SELECT FROM ops.t") == 'SELECT FROM "B\'s ""own""_ops".t'
    assert odd.adapt("SELECT to_regclass('ops.t')") == 'SELECT to_regclass(\'"B\'\'s ""own""_ops".t\')'


async def test_a_connection_of_somebody_else_says_nothing_of_our_tables(target: ConnectTarget) -> None:
    kwargs = target.connect_kwargs()
    ours = await asyncpg.connect(**kwargs)
    assert placement_on(ours) == Placement()
    await ours.close()
    del kwargs["connection_class"]
    theirs = await asyncpg.connect(**kwargs)
    try:
        with pytest.raises(DatabaseError, match="does not say where Guildbook's tables are"):
            placement_on(theirs)
    finally:
        await theirs.close()

"""A part of a backup is restored: the rows of chosen tables, or the documents of one guild."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.operations.backup.helpers import (
    Exit,
    connect,
    dump,
    execute,
    fetchval,
    fill,
    make_backup,
    make_service,
    open_pool,
    run_backup_command,
    scratch_schema_names,
    table_checksums,
)
from tests.operations.backup.restore.test_replacing import COG_TABLES, LEASE, cog_tables, rows_of
from utils.database import ConnectTarget, Pool
from utils.database.access import Database
from utils.database.cache.channel import Channel
from utils.database.cache.store import QueryCache
from utils.database.embedded import EmbeddedServer
from utils.database.partitions import ensure_partitions
from utils.database.placement import Placement
from utils.documents import Documents
from utils.exceptions import BackupError, DocumentConflict, ValidationError
from utils.operations import migrations
from utils.operations.action import Outcome
from utils.operations.backup.create import BackupRequest
from utils.operations.backup.restore.restore import restore, restore_archive
from utils.operations.backup.restore.selection import select
from utils.operations.backup.service import BackupService

__all__ = ["cog_tables"]

pytestmark = pytest.mark.slow

#: What happens to every table after the backup.
SINCE = """
UPDATE members SET nick = 'since' WHERE user_id > 100;
DELETE FROM members WHERE user_id < 10;
UPDATE guilds SET name = 'since';
DELETE FROM users WHERE id > 2900;
UPDATE documents SET value = '{"c": 2}', version = version + 1;
INSERT INTO documents (guild_id, namespace, key, value) VALUES (5, 'a', 'since', '1');
INSERT INTO ops.suppressions (user_id) VALUES (7);
"""


@pytest.fixture
def service(tmp_path: Path) -> BackupService:
    return make_service(tmp_path)


async def restore_part(service: BackupService, pool: Pool, *tables: str, id: str = "latest", **options: Any) -> Outcome:
    outcome = await restore(pool, service.catalog, id, tables=tables, **options)
    assert outcome.ok, outcome.text
    assert await scratch_schema_names(pool.direct) == []
    return outcome


async def test_restores_the_chosen_tables_alone(database: Pool, service: BackupService) -> None:
    await fill(database)
    await execute(database.target, LEASE.format("bot", 9, "2026-01-02", "infinity"))
    manifest = await make_backup(service, database)
    at_backup = await table_checksums(database.target)
    await execute(database.target, SINCE)
    since = await table_checksums(database.target)
    outcome = await restore_part(service, database, "members", "public.documents", "members")
    restored = await table_checksums(database.target)
    for name in ("public.members", "public.documents"):
        assert restored[name] == at_backup[name]
        del restored[name], since[name]
    assert restored == since, "no other table was touched"
    total = len([name for name in manifest.rows if name.startswith("public.")]) - 1
    assert f"3,001 rows in 2 of {total} tables, all counted" in outcome.text
    assert outcome.data["tables"] == ["public.members", "public.documents"]
    assert (outcome.data["rows"], outcome.data["deleted"] > 2_900) == (3_001, True)
    assert await database.fetchval("SELECT array_agg(user_id ORDER BY user_id) FROM ops.suppressions") == [7, 99]
    assert await database.fetchval("SELECT epoch FROM ops.leases WHERE expires_at IS NULL") == 10, "the bot starts over"
    safety_copy = await service.catalog.find(outcome.data["safety_backup"])
    assert safety_copy.manifest is not None
    assert (safety_copy.manifest.kind, safety_copy.manifest.reason) == ("full", "before restore")
    again = await restore_part(service, database, "members", id=manifest.id)
    assert [again.data[name] for name in ("deleted", "changed", "added")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (["nothing"], r"has no table nothing: choose from .*documents, .*members"),
        (["members", "shop.orders"], r"has no table shop\.orders"),
        (["ops.leases"], r"ops\.leases cannot be restored: a restore keeps schema ops"),
        (["public.guildbook_version"], "it records the revision"),
        (['members"; DROP TABLE guilds; --'], "has no table"),
        ([""], "has no table"),
    ],
)
async def test_refuses_other_names(database: Pool, service: BackupService, tables: list[str], message: str) -> None:
    await fill(database)
    await make_backup(service, database)
    with pytest.raises(BackupError, match=message) as error:
        await restore_part(service, database, *tables)
    assert "\n" not in str(error.value)
    assert len(await service.catalog.entries()) == 1, "refused before the safety backup"


async def test_refuses_contradictions(database: Pool, service: BackupService) -> None:
    await fill(database)
    await make_backup(service, database)
    for options, message in (
        ({"documents_of": 5, "tables": ["members"]}, "either tables or the documents"),
        ({"documents_of": 5, "whole_database": True}, "whole database cannot be replaced by a part"),
        ({"tables": ["members"], "whole_database": True}, "whole database cannot be replaced by a part"),
    ):
        with pytest.raises(ValidationError, match=message):
            await restore(database, service.catalog, **options)


async def test_restores_partitioned_tables(database: Pool, service: BackupService) -> None:
    insert = (
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT n % 3, 'members', '{}', 'update'"
        " FROM generate_series(1, 300) AS n"
    )
    await fill(database)
    await execute(database.target, insert)
    async with database.acquire() as connection:
        await ensure_partitions(connection, database.now())
    expected = (await table_checksums(database.target))["public.changes"]
    await make_backup(service, database)
    await execute(database.target, insert, "DELETE FROM changes WHERE guild_id = 1", "DELETE FROM guilds")
    await restore_part(service, database, "changes")
    assert (await table_checksums(database.target))["public.changes"] == expected
    assert await database.fetchval("SELECT count(*) FROM guilds") == 0


async def test_tables_of_cogs(database: Pool, service: BackupService, cog_tables: list[str]) -> None:
    """Also in other schemas, with names that need quotes, without a key, and with a trigger and an identity."""
    await execute(database.target, COG_TABLES)
    id = (await make_backup(service, database)).id
    expected = await rows_of(database.target, cog_tables)
    await execute(
        database.target,
        "UPDATE pets.animals SET name = 'since'",
        "DELETE FROM \"Tag notes\"; UPDATE tags SET mood = NULL; UPDATE tag_owners SET name = 'since ' || id",
    )
    since = await rows_of(database.target, ["tag_owners"])
    await restore_part(service, database, "pets.animals", "Tag notes", "public.tags", id=id)
    assert await rows_of(database.target, cog_tables) == {**expected, **since}
    await execute(database.target, "INSERT INTO tags (owner_id) VALUES (1)")
    assert await database.fetchval("SELECT max(id) FROM tags") == 3


# --- foreign keys


async def test_rows_that_others_refer_to(database: Pool, service: BackupService, cog_tables: list[str]) -> None:
    """A key of a table that stays: the restore is refused, names both, and passes with both tables."""
    await execute(database.target, COG_TABLES)
    manifest = await make_backup(service, database)
    await execute(
        database.target,
        "INSERT INTO tag_owners (name) VALUES ('cleo')",
        "INSERT INTO tags (owner_id, mood) SELECT id, 'good' FROM tag_owners WHERE name = 'cleo'",
    )
    before = await table_checksums(database.target)
    with pytest.raises(
        BackupError,
        match=r"1 row of public\.tags, which this restore does not replace, refers to rows of public\.tag_owners that"
        r" are not in the backup.*\(foreign key tags_owner_id_fkey of public\.tags\): restore that table too",
    ):
        await restore_part(service, database, "tag_owners", id=manifest.id)
    assert await table_checksums(database.target) == before
    outcome = await restore_part(service, database, "tag_owners", "tags", id=manifest.id)
    assert outcome.data["rows"] == 4


async def test_rows_that_refer_to_others(database: Pool, service: BackupService, cog_tables: list[str]) -> None:
    """A key of the chosen table onto rows that are not live: refused, before anything is written."""
    await execute(database.target, COG_TABLES)
    manifest = await make_backup(service, database)
    await execute(
        database.target, "DELETE FROM tags", "DELETE FROM tag_owners WHERE name = 'bob'", "DELETE FROM guilds"
    )
    before = await table_checksums(database.target)
    for chosen, missing, key in ((["tags"], "guilds", "guild_id"), (["tags", "guilds"], "tag_owners", "owner_id")):
        with pytest.raises(
            BackupError,
            match=rf"1 row of public\.tags in the backup refers to rows of public\.{missing}, which this restore does"
            rf" not replace, and they are not there \(foreign key tags_{key}_fkey\): restore that table too",
        ):
            await restore_part(service, database, *chosen, id=manifest.id)
        assert await table_checksums(database.target) == before
    await restore_part(service, database, "tags", "tag_owners", "guilds", id=manifest.id)
    assert await database.fetchval("SELECT count(*) FROM tags") == 2


async def test_keys_of_other_programs(database: Pool, service: BackupService) -> None:
    await fill(database)
    await make_backup(service, database)
    await execute(
        database.target,
        "INSERT INTO guilds (id, name) VALUES (99, 'since')",
        "CREATE TABLE orders (guild_id bigint REFERENCES guilds (id)); INSERT INTO orders VALUES (99)",
    )
    with pytest.raises(BackupError, match=r"public\.orders, which this restore does not replace.*delete them first"):
        await restore_part(service, database, "guilds")
    await restore_part(service, database, "members")


# --- one guild's documents


class Shop(BaseModel):
    title: str = "Shop"
    prices: list[int] = []


async def fill_documents(pool: Pool) -> None:
    await fill(pool)
    db = Database(pool)
    for guild_id in (0, 5, 6):
        shops = Documents(db, "shop", Shop, guild_id=guild_id)
        for key in ("settings", "old", "same"):
            await shops.set(key, Shop(title=f"{key} of {guild_id}", prices=[1, 2]))


async def change_documents(pool: Pool) -> None:
    db = Database(pool)
    for guild_id in (0, 5, 6):
        shops = Documents(db, "shop", Shop, guild_id=guild_id)
        await shops.update("settings", title="since")
        await shops.update("settings", prices=[])
        await shops.delete("old")
        await shops.set("new", Shop(title="since"))


async def documents_of(pool: Pool, guild_id: int) -> dict[str, tuple[str, int]]:
    rows = await pool.fetch("SELECT namespace, key, value::text, version FROM documents WHERE guild_id = $1", guild_id)
    return {f"{row['namespace']}/{row['key']}": (row["value"], row["version"]) for row in rows}


async def test_restores_the_documents_of_one_guild(database: Pool, service: BackupService) -> None:
    await fill_documents(database)
    await execute(database.target, LEASE.format("bot", 9, "2026-01-02", "infinity"))
    manifest = await make_backup(service, database)
    at_backup = await documents_of(database, 5)
    await change_documents(database)
    await execute(database.target, "UPDATE members SET nick = 'since'")
    others, before = await table_checksums(database.target), await documents_of(database, 5)
    rest = [await documents_of(database, guild_id) for guild_id in (0, 6)]
    outcome = await restore_part(service, database, documents_of=5)
    restored = await documents_of(database, 5)
    assert {key: value for key, (value, _) in restored.items()} == {key: value for key, (value, _) in at_backup.items()}
    assert restored["shop/same"] == before["shop/same"], "what does not differ is not written"
    for key in ("shop/settings", "shop/old"):
        assert restored[key][1] > max(version for _, version in before.values()), "a version is never used twice"
    assert [await documents_of(database, guild_id) for guild_id in (0, 6)] == rest
    found = await table_checksums(database.target)
    del found["public.documents"], others["public.documents"]
    assert found == others
    assert "3 documents of guild 5, all counted" in outcome.text
    assert "starts over" not in outcome.text
    assert await database.fetchval("SELECT epoch FROM ops.leases WHERE expires_at > now()") == 9, "the bot goes on"
    assert (outcome.data["rows"], outcome.data["guild_id"]) == (3, 5)
    again = await restore_part(service, database, id=manifest.id, documents_of=5)
    assert [again.data[name] for name in ("deleted", "changed", "added")] == [0, 0, 0]


async def test_documents_of_a_database_that_began_anew(database: Pool, service: BackupService) -> None:
    """They have no stamps: the lease and the other rows of `ops` do not concern them."""
    await fill_documents(database)
    await execute(database.target, LEASE.format("former", 9, "2026-01-01", "2026-01-01"))
    await execute(database.target, "INSERT INTO ops.suppressions (user_id) VALUES (7)")
    await make_backup(service, database)
    await execute(database.target, "TRUNCATE ops.leases; TRUNCATE ops.suppressions; DELETE FROM documents")
    await execute(database.target, LEASE.format("bot", 8, "2026-01-02", "infinity"))
    await restore_part(service, database, documents_of=5)
    assert await documents_of(database, 5)
    assert await database.fetchval("SELECT epoch FROM ops.leases WHERE expires_at > now()") == 8, "the bot goes on"
    assert await database.fetchval("SELECT count(*) FROM ops.suppressions") == 0


async def test_restores_the_documents_of_no_guild(database: Pool, service: BackupService) -> None:
    await fill_documents(database)
    await make_backup(service, database)
    await change_documents(database)
    outcome = await restore_part(service, database, documents_of=0)
    assert "4 documents of no guild" in outcome.text
    assert set(await documents_of(database, 0)) == {"a/b", "shop/settings", "shop/old", "shop/same"}
    assert "shop/new" in await documents_of(database, 5)


async def test_a_guild_without_documents_is_not_emptied(database: Pool, service: BackupService) -> None:
    await fill(database)
    await make_backup(service, database)
    await execute(database.target, "INSERT INTO documents (guild_id, namespace, key, value) VALUES (5, 'a', 'b', '1')")
    with pytest.raises(BackupError, match="has no documents of guild 5: nothing was changed"):
        await restore_part(service, database, documents_of=5)
    assert len(await documents_of(database, 5)) == 1
    assert len(await service.catalog.entries()) == 1, "refused before the safety backup"


async def test_a_safety_copy_undoes_a_restore_of_documents(database: Pool, service: BackupService) -> None:
    await fill_documents(database)
    await make_backup(service, database)
    await execute(database.target, "DELETE FROM documents WHERE guild_id = 5")
    restored = await restore_part(service, database, documents_of=5)
    assert await documents_of(database, 5)
    undone = await restore_part(service, database, id=restored.data["safety_backup"], documents_of=5)
    assert await documents_of(database, 5) == {}
    assert (undone.data["rows"], undone.data["deleted"]) == (0, 3)
    assert "0 documents of guild 5" in undone.text
    assert set(await documents_of(database, 6)), "those of others stay"


async def test_a_writer_that_has_read_before_is_told(database: Pool, service: BackupService) -> None:
    await fill_documents(database)
    await make_backup(service, database)
    await change_documents(database)
    shops = Documents(Database(database), "shop", Shop, guild_id=5)
    version = await shops.version("settings")
    await restore_part(service, database, documents_of=5)
    with pytest.raises(DocumentConflict):
        await shops.set("settings", Shop(), version=version)
    assert await shops.get("settings") == Shop(title="settings of 5", prices=[1, 2])


@pytest.fixture
async def cached(database: Pool) -> AsyncIterator[Database]:
    """A bot's database access with a cache, in which writes of other processes are announced."""
    cache = QueryCache()
    await cache.load(database)
    channel = Channel(cache, database.direct, database)
    await channel.start()
    try:
        yield Database(database, cache=cache)
    finally:
        await channel.stop()
        await cache.close()


@pytest.mark.direct("a pooler has no notifications")
async def test_caches_of_a_running_bot_are_dropped(database: Pool, service: BackupService, cached: Database) -> None:
    await fill_documents(database)
    id = (await make_backup(service, database)).id
    await change_documents(database)
    shops, count = Documents(cached, "shop", Shop, guild_id=5), "SELECT count(*) FROM members WHERE nick = 'since'"
    await execute(database.target, "UPDATE members SET nick = 'since'")
    for _ in range(2):
        assert (await shops.get("settings")).title == "since"
        assert await cached.fetchval(count) == 3_000
    assert cached.get_cache_stats()["hits"] >= 2
    await restore_part(service, database, id=id, documents_of=5)
    assert (await shops.get("settings")).title == "settings of 5"
    assert await cached.fetchval(count) == 3_000
    await restore_part(service, database, "members", id=id)
    assert await cached.fetchval(count) == 0


# --- the command line


async def test_command_line(tmp_path: Path, database: Pool, service: BackupService) -> None:
    await fill_documents(database)
    id = (await make_backup(service, database)).id
    await change_documents(database)
    await execute(database.target, SINCE)

    async def run(*arguments: str) -> Exit:
        return await run_backup_command(tmp_path, database.target, "restore", id, *arguments)

    unconfirmed = await run("--table", "members", "--table", "users")
    assert (unconfirmed.code, "the rows of members, users in database" in unconfirmed.err) == (2, True)
    for arguments in (("--table", "members", "--guild", "5"), ("--guild", "5", "--whole-database")):
        refused = await run(*arguments, "--yes", "--json")
        assert (refused.code, json.loads(refused.out)["ok"]) == (2, False)
    assert (await run("--guild", "five", "--yes")).code == 2
    unknown = await run("--table", "nothing", "--yes", "--json")
    assert (unknown.code, "choose from" in json.loads(unknown.out)["error"]) == (2, True)
    assert await database.fetchval("SELECT count(*) FROM users") == 2_900
    restored = await run("--table", "members", "--table", "users", "--yes")
    assert (restored.code, restored.err) == (0, "")
    assert "6,000 rows in 2 of" in restored.out
    assert await database.fetchval("SELECT count(*) FROM members WHERE nick = 'since'") == 0
    assert await database.fetchval("SELECT count(*) FROM guilds WHERE name = 'since'") == 20
    restored = await run("--guild", "5", "--yes", "--json")
    data = json.loads(restored.out)
    assert (restored.code, data["ok"], data["guild_id"], data["rows"]) == (0, True, 5, 3)
    assert "shop/new" in await documents_of(database, 6)
    action = await database.fetchrow("SELECT arguments, result FROM ops.admin_actions ORDER BY id DESC LIMIT 1")
    assert action is not None
    assert (action["arguments"]["guild"], "3 documents of guild 5" in action["result"]) == (5, True)


# --- partial backups, other schemas and other revisions


async def test_restores_all_tables_of_a_partial_backup(database: Pool, service: BackupService) -> None:
    await fill(database)
    expected = await table_checksums(database.target)
    partial = await make_backup(service, database, BackupRequest(tables=("members", "users", "ops.suppressions")))
    await execute(database.target, SINCE)
    since = await table_checksums(database.target)
    outcome = await restore_part(service, database, id=partial.id)
    found = await table_checksums(database.target)
    assert {name for name in found if found[name] != since[name]} == {"public.members", "public.users"}
    assert {name for name in found if found[name] == expected[name]} >= {"public.members", "public.users"}
    assert "6,000 rows in 2 of 2 tables" in outcome.text
    await execute(database.target, "DELETE FROM members", "DELETE FROM users")
    outcome = await restore_part(service, database, "members", id=partial.id)
    assert "3,000 rows in 1 of 2 tables" in outcome.text
    assert await database.fetchval("SELECT count(*) FROM users") == 0


async def test_refuses_what_a_partial_backup_does_not_have(database: Pool, service: BackupService) -> None:
    await fill(database)
    no_rows = await make_backup(service, database, BackupRequest(schema_only=True))
    only_ops = await make_backup(service, database, BackupRequest(tables=("ops.suppressions",)))
    members = await make_backup(service, database, BackupRequest(tables=("members",)))
    for id, options, message in (
        (no_rows.id, {}, "has no rows"),
        (only_ops.id, {}, "only rows that a restore keeps"),
        (members.id, {"tables": ["users"]}, "has no table users: choose from members"),
        (members.id, {"documents_of": 5}, "has no table documents"),
        (members.id, {"whole_database": True}, "is partial"),
    ):
        with pytest.raises(BackupError, match=message):
            await restore(database, service.catalog, id, **options)
    assert await database.fetchval("SELECT count(*) FROM members") == 3_000


async def test_rows_with_later_stamps_than_the_lease_are_outranked(database: Pool, service: BackupService) -> None:
    """A partial backup does not say whether the database began anew since, but its stamps do."""
    await fill(database)
    await execute(database.target, LEASE.format("bot", 9, "2026-01-01", "infinity"))
    await database.execute("UPDATE members SET stamp = (9::bigint << 40) + 5")
    partial = await make_backup(service, database, BackupRequest(tables=("members",)))
    await execute(database.target, "UPDATE ops.leases SET epoch = 3", "DELETE FROM members")

    async def after() -> None:
        """The caller reconciles, so that the lease is not revoked for that."""

    await restore_part(service, database, id=partial.id, after=after)
    assert await database.fetchval("SELECT epoch FROM ops.leases WHERE expires_at IS NULL") == 10
    await execute(database.target, "UPDATE ops.leases SET epoch = 11, expires_at = 'infinity'")
    await restore_part(service, database, id=partial.id, after=after)
    assert await database.fetchval("SELECT epoch FROM ops.leases WHERE expires_at > now()") == 11


async def test_tables_in_schemas_of_their_own(empty_target: ConnectTarget, service: BackupService) -> None:
    placed = empty_target.with_placement(Placement.of("Bot-X"))
    await migrations.upgrade(placed)
    async with open_pool(placed) as pool:
        await fill_documents(pool)
        id = (await make_backup(service, pool)).id
        requests = (("members",), ("documents", "Bot-X_ops.suppressions"), ("guilds",))
        partial = [await make_backup(service, pool, BackupRequest(tables=tables)) for tables in requests]
        await pool.execute("UPDATE members SET nick = 'since'; UPDATE guilds SET name = 'since'")
        await restore_part(service, pool, "members", id=id)
        await restore_part(service, pool, "Bot-X.members", id=id)
        await change_documents(pool)
        await restore_part(service, pool, id=id, documents_of=5)
        assert (await Documents(Database(pool), "shop", Shop).get("old", 5)).title == "old of 5"
        assert await pool.fetchval("SELECT count(*) FROM members WHERE nick = 'since'") == 0
        assert await pool.fetchval("SELECT count(*) FROM guilds WHERE name = 'since'") == 20
        for manifest in partial:
            await restore_part(service, pool, id=manifest.id)
        assert await pool.fetchval("SELECT count(*) FROM guilds WHERE name = 'since'") == 0


async def test_migrates_tables_of_an_older_backup(
    tmp_path: Path, server: EmbeddedServer, empty_target: ConnectTarget
) -> None:
    revisions = await migrations.pending(empty_target)
    at = revisions.index("0003")  # which makes the documents
    await migrations.upgrade(empty_target, revisions[at])
    await execute(
        empty_target,
        "INSERT INTO guilds (id, name) VALUES (1, 'old')",
        "INSERT INTO documents (guild_id, namespace, key, value) VALUES (1, 'a', 'b', '1'), (2, 'a', 'b', '1')",
    )
    made = await dump(server, empty_target, tmp_path / "dump")
    async with open_pool(empty_target) as pool:
        partial = await make_backup(make_service(tmp_path), pool, BackupRequest(tables=("guilds",)))
        await migrations.upgrade(empty_target, revisions[at + 1])
        with pytest.raises(BackupError, match=r"not at the revision of the backup, 0003.* db upgrade first"):
            await restore_archive(pool, made, select(made, ["guilds"]), safety_backup=no_safety_backup)
        await migrations.upgrade(empty_target)
        await pool.execute("UPDATE guilds SET name = 'since'; UPDATE documents SET value = '2'")
        outcome = await restore_archive(pool, made, select(made, ["guilds"]), safety_backup=no_safety_backup)
        assert outcome.data["migrated"] == revisions[at + 1 :]
        assert await pool.fetchval("SELECT name FROM guilds") == "old"
        await restore_archive(pool, made, select(made, documents_of=2), safety_backup=no_safety_backup)
        values = await pool.fetchval("SELECT array_agg(value::text ORDER BY guild_id) FROM documents")
        assert values == ["2", "1"]
        await pool.execute("UPDATE guilds SET name = 'since'")
        outcome = await restore(pool, make_service(tmp_path).catalog, partial.id)
        assert "migrated without the rows of other tables" in outcome.text
        assert await pool.fetchval("SELECT name FROM guilds") == "old"
        assert await migrations.check_drift(pool) == []


async def no_safety_backup() -> tuple[None, str]:
    return None, "There was nothing to back up."


async def test_refuses_a_database_without_all_tables(
    database: Pool, service: BackupService, empty_target: ConnectTarget
) -> None:
    await fill(database)
    id = (await make_backup(service, database)).id
    async with open_pool(empty_target) as empty:
        with pytest.raises(BackupError, match=r"has all tables \(it has no tables yet\): restore a whole backup first"):
            await restore_part(service, empty, "members", id=id, from_other=True)
    await execute(database.target, "DROP TABLE users")
    with pytest.raises(BackupError, match=r"tables are missing: users\): restore a whole backup first"):
        await restore_part(service, database, "members")
    async with connect(database.target) as connection:
        assert await connection.fetchval("SELECT count(*) FROM members") == 3_000
    assert await fetchval(database.target, "SELECT to_regclass('users')") is None

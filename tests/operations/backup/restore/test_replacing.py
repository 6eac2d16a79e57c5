"""The rows of the live tables are replaced in one transaction, whatever the tables look like and whoever uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Column, Integer, Table

from models import Base
from tests.operations.backup.helpers import (
    GUILD,
    connect,
    execute,
    fetchval,
    make_backup,
    make_service,
    open_pool,
    scratch_schema_names,
    table_checksums,
    until_query,
)
from utils.database import ConnectTarget, Pool
from utils.database.partitions import ensure_partitions, id_at
from utils.exceptions import BackupError
from utils.operations.backup.restore.replacing import Replaced, replace_rows
from utils.operations.backup.scratch import load
from utils.operations.backup.scratch.tables import open_scratch_tables
from utils.operations.backup.service import BackupService

pytestmark = pytest.mark.slow

LEASE = "INSERT INTO ops.leases (shard, holder, epoch, taken_at, expires_at) VALUES (0, '{}', {}, '{}', '{}')"
DEAD_LETTERS = (
    "INSERT INTO ops.dead_letters (table_name, key, payload, stamp, error) SELECT 'guilds',"
    " jsonb_build_object('id', n), NULL, n, 'E\t\\' || n FROM generate_series(1, {}) AS n"
)
EPOCH = "SELECT epoch FROM ops.leases WHERE expires_at IS NULL"


@pytest.fixture
def service(tmp_path: Path) -> BackupService:
    return make_service(tmp_path)


async def replace(pool: Pool, service: BackupService, **options: Any) -> Replaced:
    """Load the newest backup, and replace the live rows by its rows."""
    async with (
        service.catalog.open("latest", pool.server_version_num // 10_000) as archive,
        open_scratch_tables(pool, is_restore=True) as scratch,
    ):
        loaded = await scratch.load(archive)
        tables = await scratch.tables_to_replace(loaded)
        sequences = load.translated(await load.read_sequences(archive), archive.schemas, scratch.schemas)
        return await replace_rows(scratch.live, scratch.schemas, scratch.place, tables, sequences, **options)


# --- tables of cogs

COG_TABLES = """
CREATE SCHEMA pets;
CREATE TYPE mood AS ENUM ('good', 'bad');
CREATE TABLE tag_owners (id serial PRIMARY KEY, name text UNIQUE, settings json, at point);
CREATE TABLE tags (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner_id int NOT NULL REFERENCES tag_owners (id),
    guild_id bigint REFERENCES guilds (id), mood mood, moods mood[], label text GENERATED ALWAYS AS ('tag ' || owner_id)
    STORED, UNIQUE (owner_id, mood)
);
CREATE TABLE "Tag notes" ("a ""note"", here" text, "äöü" numeric);
CREATE TABLE pets.animals (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), name varchar(20));
CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN NEW.name := upper(NEW.name); RETURN NEW; END';
CREATE TRIGGER shout BEFORE INSERT OR UPDATE ON pets.animals FOR EACH ROW EXECUTE FUNCTION shout();
INSERT INTO guilds (id, name) VALUES (1, 'one');
INSERT INTO tag_owners (name, settings, at) VALUES ('ann', '{"a": [1, 2]}', '(1,2)'), ('bob', NULL, NULL);
INSERT INTO tags (owner_id, guild_id, mood, moods) VALUES (1, 1, 'good', '{good,bad}'), (2, NULL, 'bad', NULL);
INSERT INTO "Tag notes" VALUES (E'a\\tb\\\\.\\nc', 1.50), (E'\\\\.', NULL), ('', 'NaN'), ('same', 1), ('same', 1);
INSERT INTO pets.animals (name) VALUES ('rex'), ('tom');
ALTER TABLE pets.animals DISABLE TRIGGER shout;
UPDATE pets.animals SET name = lower(name);
ALTER TABLE pets.animals ENABLE TRIGGER shout;
"""
#: What happens to them after the backup: keys move, unique values change hands, and a sequence goes on.
SINCE = """
INSERT INTO tag_owners (name) VALUES ('cleo');
UPDATE tags SET owner_id = 3 WHERE id = 1;
INSERT INTO tags (owner_id, mood) VALUES (1, 'good');
DELETE FROM tags WHERE id = 2; DELETE FROM tag_owners WHERE name = 'bob';
UPDATE tag_owners SET settings = '{"a":[1,2]}', at = '(3,4)' WHERE id = 1;
DELETE FROM "Tag notes" WHERE "a ""note"", here" = 'same';
INSERT INTO pets.animals (name) VALUES ('new');
UPDATE guilds SET name = 'two';
"""


@pytest.fixture
def cog_tables() -> Iterator[list[str]]:
    """Declare tables as a cog's models do, until the end of the test."""
    names = [("tag_owners", None), ("tags", None), ("Tag notes", None), ("animals", "pets")]
    tables = [Table(name, Base.metadata, Column("id", Integer), schema=schema) for name, schema in names]
    yield ["tag_owners", "tags", '"Tag notes"', "pets.animals"]
    for table in tables:
        Base.metadata.remove(table)


async def rows_of(target: ConnectTarget, tables: list[str]) -> dict[str, Any]:
    return {
        name: await fetchval(target, f"SELECT array_agg(t::text ORDER BY t::text) FROM {name} AS t")  # noqa: S608
        for name in tables
    }


async def test_restores_the_tables_of_cogs(database: Pool, service: BackupService, cog_tables: list[str]) -> None:
    await execute(database.target, COG_TABLES)
    expected = await rows_of(database.target, [*cog_tables, "guilds"])
    manifest = await make_backup(service, database)
    assert manifest.rows["public.Tag notes"] == 5
    assert (await service.drill(database)).ok
    await execute(database.target, SINCE)
    outcome = await service.restore(database, manifest.id)
    assert outcome.ok, outcome.text
    assert await rows_of(database.target, [*cog_tables, "guilds"]) == expected
    await execute(database.target, "INSERT INTO tag_owners (name) VALUES ('dora')")
    assert await fetchval(database.target, "SELECT max(id) FROM tag_owners") == 4, "ids are not given out twice"
    await execute(database.target, "INSERT INTO pets.animals (name) VALUES ('loud')")
    assert await fetchval(database.target, "SELECT count(*) FROM pets.animals WHERE name = 'LOUD'") == 1
    assert await scratch_schema_names(database.target) == []


async def test_raises_sequences_that_are_behind(database: Pool, service: BackupService, cog_tables: list[str]) -> None:
    await execute(database.target, COG_TABLES, "SELECT setval('ops.change_ids', 70), setval('tags_id_seq', 80)")
    await make_backup(service, database)
    await execute(database.target, "SELECT setval('ops.change_ids', 7), setval('tags_id_seq', 8)")
    await replace(database, service)
    assert await fetchval(database.target, "SELECT nextval('ops.change_ids')") == 71
    assert await fetchval(database.target, "SELECT nextval('tags_id_seq')") == 81


async def test_keeps_columns_that_the_backup_does_not_know(database: Pool, service: BackupService) -> None:
    await execute(database.target, "INSERT INTO guilds (id, name) VALUES (1, 'one'), (2, 'two')")
    await make_backup(service, database)
    await execute(database.target, "ALTER TABLE guilds ADD theirs text DEFAULT 'mine'")
    await execute(database.target, "UPDATE guilds SET theirs = 'kept', name = 'x'", "DELETE FROM guilds WHERE id = 2")
    await replace(database, service)
    rows = await fetchval(database.target, "SELECT array_agg(name || ' ' || theirs ORDER BY id) FROM guilds")
    assert rows == ["one kept", "two mine"]


async def test_partitions_take_the_rows_of_a_partitioned_table(database: Pool, service: BackupService) -> None:
    insert = (
        "INSERT INTO changes (guild_id, table_name, key, action) SELECT n % 3, 'members', '{}', 'update'"
        " FROM generate_series(1, 300) AS n"
    )
    await execute(database.target, insert)
    expected = await table_checksums(database.target)
    await make_backup(service, database)
    await execute(database.target, insert, "DELETE FROM changes WHERE guild_id = 1")
    await replace(database, service)
    assert await table_checksums(database.target) == expected


async def test_old_months_get_partitions(tmp_path: Path, database: Pool, empty_target: ConnectTarget) -> None:
    async with database.acquire() as connection:
        await ensure_partitions(connection, datetime(2024, 5, 1, tzinfo=UTC), 0)
    insert = "INSERT INTO changes (guild_id, id, table_name, key, action) VALUES (1, $1, 'members', '{}', 'update')"
    await database.execute(insert, id_at(datetime(2024, 5, 9, tzinfo=UTC)))
    service = make_service(tmp_path)
    manifest = await make_backup(service, database)
    async with open_pool(empty_target) as empty:
        assert (await service.restore(empty, manifest.id, from_other=True)).ok
        assert await empty.fetchval("SELECT count(*) FROM changes_y2024m05") == 1


# --- under load


async def test_readers_go_on_and_no_committed_write_to_ops_is_lost(database: Pool, service: BackupService) -> None:
    """Writers, which lock the lease first as a bot does, wait; nothing ends in a deadlock."""
    await execute(
        database.target,
        "INSERT INTO ops.leases (shard, holder, epoch) VALUES (0, 'bot', 1)",
        "INSERT INTO guilds (id, name) SELECT n, 'old' FROM generate_series(1, 500) AS n",
    )
    await make_backup(service, database)
    await execute(database.target, "UPDATE guilds SET name = 'new'")
    committed: list[int] = []
    seen: set[tuple[str, ...]] = set()
    stop = asyncio.Event()

    async def write(first: int) -> None:
        async with connect(database.target) as connection:
            number = first
            while not stop.is_set():
                async with connection.transaction():
                    await connection.execute("SELECT FROM ops.leases WHERE shard = 0 FOR KEY SHARE")
                    await connection.execute("UPDATE users SET username = 'x' WHERE id = $1", number)
                    await connection.execute("INSERT INTO ops.counted_messages (id) VALUES ($1)", number)
                    await connection.execute("UPDATE guilds SET splash = 'x' WHERE id = $1", number % 500)
                committed.append(number)
                number += 1

    async def read() -> None:
        async with connect(database.target) as connection:
            while not stop.is_set():
                rows = await connection.fetch("SELECT DISTINCT name FROM guilds")
                seen.add(tuple(sorted(row["name"] for row in rows)))

    tasks = [asyncio.create_task(write(n * 10_000_000 + 1)) for n in range(3)] + [asyncio.create_task(read())]
    await until_query(database.target, "SELECT count(*) > 50 FROM ops.counted_messages")
    await replace(database, service)
    before = len(committed)
    await until_query(database.target, "SELECT count(*) > $1 FROM ops.counted_messages", before + 50)
    stop.set()
    await asyncio.gather(*tasks)
    kept = "SELECT count(*) FROM ops.counted_messages WHERE id = ANY($1::bigint[])"
    assert await fetchval(database.target, kept, committed) == len(committed)
    assert seen == {("new",), ("old",)}, "all rows are replaced at once"


async def test_names_who_holds_a_lock(database: Pool, service: BackupService) -> None:
    await execute(database.target, "INSERT INTO users (id, username) VALUES (1, 'one')")
    await make_backup(service, database)
    await execute(database.target, "INSERT INTO guilds (id, name) VALUES (1, 'since')")
    async with connect(database.target) as other:
        await other.execute("SET application_name = 'dashboard'; BEGIN; UPDATE guilds SET name = 'locked'")
        with pytest.raises(BackupError, match=r"guilds is locked by process \d+ \(dashboard\).*Nothing was changed"):
            await replace(database, service, attempts=2, lock_seconds=0.2)
        await other.execute("COMMIT")
    assert await fetchval(database.target, "SELECT name FROM guilds") == "locked"
    await replace(database, service)
    assert await fetchval(database.target, "SELECT count(*) FROM guilds") == 0


async def test_a_server_without_disk_space_is_named(database: Pool, service: BackupService) -> None:
    await execute(database.target, "INSERT INTO guilds (id, name) VALUES (1, 'one')")
    await make_backup(service, database)
    await execute(
        database.target,
        "CREATE FUNCTION full_disk(bigint) RETURNS boolean LANGUAGE plpgsql AS"
        " $$BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END$$",
        # Copied to the scratch table with the table's other checks.
        "ALTER TABLE guilds ADD CONSTRAINT space CHECK (full_disk(id)) NOT VALID",
    )
    with pytest.raises(Exception, match=r"\[53100\]: the server's disk is full: free some space") as error:
        await replace(database, service)
    assert "\n" not in str(error.value)
    assert await fetchval(database.target, "SELECT name FROM guilds") == "one"
    assert await scratch_schema_names(database.target) == []


# --- the rows of ops, and the lease


async def test_rows_of_ops_stay(database: Pool, service: BackupService) -> None:
    await execute(database.target, LEASE.format("bot", 8, "2026-01-01", "2026-01-01"), DEAD_LETTERS.format(3), GUILD)
    await make_backup(service, database)
    await execute(database.target, "UPDATE ops.leases SET holder = 'next', epoch = 9", "DELETE FROM ops.dead_letters")
    await execute(database.target, "INSERT INTO ops.suppressions (user_id) VALUES (8)")
    result = await replace(database, service)
    assert (result.has_diverged, result.ops_rows) == (False, {})
    assert await fetchval(database.target, "SELECT array_agg(user_id) FROM ops.suppressions") == [8]
    assert await fetchval(database.target, "SELECT count(*) FROM ops.dead_letters") == 0
    assert await fetchval(database.target, "SELECT epoch FROM ops.leases") == 9


async def test_revoking_the_lease_raises_its_epoch(database: Pool, service: BackupService) -> None:
    await execute(database.target, LEASE.format("bot", 9, "2026-01-02", "infinity"), GUILD)
    await make_backup(service, database)
    assert not (await replace(database, service, revoke_lease=True)).has_diverged
    assert await fetchval(database.target, EPOCH) == 10


@pytest.mark.parametrize(("epoch", "taken"), [(9, "2026-01-02"), (8, "2026-01-01")])
async def test_merges_ops_of_a_database_that_began_anew(
    database: Pool, service: BackupService, epoch: int, taken: str
) -> None:
    """Otherwise every restored row would have a later stamp than what the bot writes, and the mirror would stall."""
    target = database.target
    await execute(target, LEASE.format("former", 9, "2026-01-01", "2026-01-01"), DEAD_LETTERS.format(3), GUILD)
    await execute(target, "INSERT INTO ops.suppressions (user_id, since) VALUES (7, '2020-01-01'), (8, '2020-01-01')")
    await make_backup(service, database)
    await execute(target, "TRUNCATE ops.leases, ops.dead_letters RESTART IDENTITY; TRUNCATE ops.suppressions")
    await execute(target, LEASE.format("bot", epoch, taken, "infinity"), DEAD_LETTERS.format(2))
    await execute(target, "INSERT INTO ops.suppressions (user_id, since) VALUES (8, '2026-01-01'), (9, '2026-01-01')")
    result = await replace(database, service)
    assert result.has_diverged
    assert await fetchval(target, EPOCH) == 10
    assert await fetchval(target, "SELECT array_agg(user_id ORDER BY user_id) FROM ops.suppressions") == [7, 8, 9]
    assert await fetchval(target, "SELECT array_agg(id) FROM ops.dead_letters") == [1, 2, 3, 4, 5]


async def test_a_lost_answer_to_the_commit_is_asked_for(
    database: Pool, service: BackupService, monkeypatch: pytest.MonkeyPatch
) -> None:
    await execute(database.target, "INSERT INTO guilds (id, name) VALUES (1, 'one')")
    await make_backup(service, database)
    await execute(database.target, "DELETE FROM guilds")
    transactions: Any = asyncpg.transaction.Transaction
    commit = transactions._Transaction__commit

    async def lose_answer(transaction: Any) -> None:
        await commit(transaction)
        if await transaction._connection.fetchval("SELECT count(*) FROM guilds"):
            raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(transactions, "_Transaction__commit", lose_answer)
    assert (await replace(database, service)).attempts == 1
    monkeypatch.undo()
    assert await fetchval(database.target, "SELECT count(*) FROM guilds") == 1

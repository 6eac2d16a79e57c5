"""Loading an archive into tables that nobody uses; counting and analyzing the tables of a database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, Table

from models import Base
from tests.operations.backup.helpers import connect, dump, execute
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.database.placement import Placement
from utils.exceptions import BackupError, DatabaseUnavailable
from utils.operations.backup.scratch import load
from utils.operations.backup.scratch.load import Place

#: Keys and indexes of every kind.
KEYS = """
CREATE TABLE pets (
    id int, name text NOT NULL, owner int, born date, during int4range, tags int[],
    CONSTRAINT "the key" PRIMARY KEY (id) INCLUDE (name),
    CONSTRAINT later UNIQUE (owner, born) DEFERRABLE INITIALLY DEFERRED,
    CONSTRAINT sometimes UNIQUE (name, id) DEFERRABLE,
    CONSTRAINT no_nulls UNIQUE NULLS NOT DISTINCT (owner, id),
    CONSTRAINT apart EXCLUDE USING gist (during WITH &&)
);
CREATE UNIQUE INDEX "odd ""one"" here" ON pets (lower(name) COLLATE "C" DESC NULLS LAST) INCLUDE (born) WHERE owner > 3;
CREATE INDEX by_tags ON pets USING gin (tags) WITH (fastupdate = off);
CREATE INDEX by_name ON pets (name text_pattern_ops) WITH (fillfactor = 70);
CREATE TABLE bowls (
    pet_id int REFERENCES pets (id), at bigint, PRIMARY KEY (pet_id, at), UNIQUE (at, pet_id)
) PARTITION BY RANGE (at);
CREATE INDEX by_at ON bowls (at);
CREATE TABLE bowls_one PARTITION OF bowls FOR VALUES FROM (0) TO (100);
CREATE TABLE bowls_default PARTITION OF bowls DEFAULT;
CREATE TABLE no_key (id int);
CREATE VIEW counted AS SELECT p.*, count(*) FROM pets AS p JOIN bowls ON pet_id = p.id GROUP BY p.id;
"""
ROWS = """
INSERT INTO pets SELECT n, 'pet ' || n, n % 50, date '2020-01-01' + n, int4range(n, n + 1), ARRAY[n]
    FROM generate_series(1, 20000) AS n;
INSERT INTO bowls SELECT n, n FROM generate_series(1, 300) AS n;
INSERT INTO no_key VALUES (1), (1);
"""
_DEFINITIONS = """
SELECT format('%s %s', i.indexrelid::regclass, pg_get_indexdef(i.indexrelid)) AS line, i.indisvalid AS is_valid
FROM pg_index AS i WHERE i.indrelid = ANY($1::text[]::regclass[])
UNION ALL SELECT format('%s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid)), convalidated
FROM pg_constraint WHERE conrelid = ANY($1::text[]::regclass[])
UNION ALL SELECT format('%s.%s', attrelid::regclass, attname), attnotnull
FROM pg_attribute WHERE attrelid = ANY($1::text[]::regclass[]) AND attnum > 0
ORDER BY 1
"""
TABLES = ["pets", "bowls", "bowls_one", "bowls_default", "no_key"]


@pytest.fixture
def own_tables() -> Iterator[None]:
    """Declare tables as a cog's models do, until the end of the test."""
    tables = [Table(name, Base.metadata, Column("id", Integer)) for name in ("pets", "bowls", "no_key")]
    yield
    for table in tables:
        Base.metadata.remove(table)


async def definitions(target: ConnectTarget) -> list[tuple[str, bool]]:
    """Return all keys, indexes, constraints and columns of the tables."""
    async with connect(target) as connection:
        return [tuple(row) for row in await connection.fetch(_DEFINITIONS, TABLES)]


@pytest.mark.usefixtures("own_tables")
@pytest.mark.slow
async def test_brings_back_keys_and_indexes(tmp_path: Path, server: EmbeddedServer, database: Pool) -> None:
    await execute(database.target, KEYS, ROWS)
    expected = await definitions(database.target)
    archive = await dump(server, database.target, tmp_path / "dump")
    await execute(database.target, "DELETE FROM bowls; DELETE FROM pets WHERE id > 9; UPDATE pets SET name = 'x' || id")
    place = Place(database.direct, Placement())
    loaded = await load.load_and_check(archive, place)
    assert loaded.rows == sum(archive.counts.values())
    assert await definitions(database.target) == expected
    async with connect(database.target) as connection:
        assert await connection.fetchval("SELECT count(*) FROM pets WHERE name = 'pet ' || id") == 20_000
        visible = "SELECT relallvisible > relpages / 2 FROM pg_class WHERE oid = 'pets'::regclass"
        await connection.execute("ANALYZE pets")
        assert await connection.fetchval(visible), "rows were loaded frozen"
    await load.load_and_check(archive, place, with_indexes=False)
    fewer = set(await definitions(database.target))
    assert fewer < set(expected)
    gone = {line.split()[0] for line, _ in set(expected) - fewer}
    assert gone == {"by_tags", "by_name", "by_at", "bowls_one_at_idx", "bowls_default_at_idx"}, "they refuse no rows"


@pytest.mark.usefixtures("own_tables")
async def test_names_the_table_of_rows_that_are_refused(tmp_path: Path, server: EmbeddedServer, database: Pool) -> None:
    await execute(database.target, *(f"CREATE TABLE {name} (id int)" for name in ("pets", "bowls", "no_key")))
    await execute(database.target, "INSERT INTO pets VALUES (1), (1); INSERT INTO bowls VALUES (2)")
    archive = await dump(server, database.target, tmp_path / "dump")
    place = Place(database.direct, Placement())
    for changes, message in (
        ("ALTER TABLE pets ADD UNIQUE (id)", r"the rows of public\.pets in the backup: could not create unique index"),
        ("ALTER TABLE pets ADD CHECK (id > 1)", r"loading public\.pets: .*violates check constraint"),
        (
            "ALTER TABLE no_key ADD UNIQUE (id); ALTER TABLE bowls ADD FOREIGN KEY (id) REFERENCES no_key (id)",
            r"the rows of (public\.)?bowls in the backup: .*violates foreign key constraint",
        ),
    ):
        await execute(database.target, "TRUNCATE pets, bowls, no_key", changes)
        with pytest.raises(BackupError, match=message) as error:
            await load.load_and_check(archive, place)
        assert "\n" not in str(error.value)
        await execute(
            database.target,
            "ALTER TABLE pets DROP CONSTRAINT IF EXISTS pets_id_key, DROP CONSTRAINT IF EXISTS pets_id_check",
        )


async def test_a_timeout_is_one_error_not_a_group(database: Pool) -> None:
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE guilds")
        for work in (
            load.count(database.target, [("public", "guilds")], timeout=0.2),
            load.analyze(database.target, [("public", "guilds")], timeout=0.2),
        ):
            with pytest.raises(DatabaseUnavailable, match="did not answer in time"):
                await work

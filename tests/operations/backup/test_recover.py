"""What the start says of a database that has lost what a backup has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.operations.backup.restoring import Shelf, dumped, pooled, tell
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import DatabaseError, DatabaseUnavailable
from utils.operations import migrations
from utils.operations.backup import recover

GUILD = "INSERT INTO guilds (id, name) VALUES (1, 'one')"


@pytest.fixture
def queries() -> Iterator[list[str]]:
    """What is asked of the database meanwhile."""
    asked: list[str] = []
    run = Pool.run

    async def counted(self: Pool, verb: str, query: str, *rest: object, **named: object) -> object:
        asked.append(query)
        return await run(self, verb, query, *rest, **named)  # type: ignore[arg-type]

    with patch.object(Pool, "run", counted):
        yield asked


async def test_a_database_with_guilds_is_fine_after_one_query(database: Pool, queries: list[str]) -> None:
    await database.execute(GUILD)
    queries.clear()
    assert (await recover.assess(database)).is_fine
    assert len(queries) == 1


async def test_a_database_without_tables_or_without_guilds_is_empty(
    database: Pool, empty_target: ConnectTarget
) -> None:
    assert await recover.assess(database) == recover.Assessment("empty", "there is no guild in it")
    async with pooled(empty_target) as bare:
        assert (await recover.assess(bare)).state == "empty"
        await bare.execute("CREATE TABLE somebodys (id int)")
        assert (await recover.assess(bare)).state == "empty"


@pytest.mark.parametrize("table", ["guilds", "members", "alembic_version", "ops.leases", "member_preferences"])
async def test_a_database_that_lacks_a_table_is_damaged(database: Pool, table: str) -> None:
    await database.execute(GUILD)
    await database.execute(f"DROP TABLE {table} CASCADE")
    found = await recover.assess(database)
    assert found.state == "damaged"
    assert table in found.reason


async def test_an_older_schema_is_not_a_damaged_one(empty_target: ConnectTarget) -> None:
    oldest = (await migrations.pending(empty_target))[0]
    await migrations.upgrade(empty_target, oldest)
    await tell(empty_target, GUILD)
    async with pooled(empty_target) as older:
        assert (await recover.assess(older)).is_fine


async def test_a_file_that_is_gone_is_damage_and_an_outage_is_none(
    database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise DatabaseError('could not open file "base/5/16384": No such file or directory', sqlstate="58P01")

    monkeypatch.setattr(database, "fetchrow", broken)
    assert (await recover.assess(database)).state == "damaged"

    async def away(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("the server is restarting after a crash", sqlstate="57P02")

    monkeypatch.setattr(database, "fetchrow", away)
    with pytest.raises(DatabaseUnavailable):
        await recover.assess(database)


async def test_a_backup_is_offered_where_the_database_has_lost_what_it_has(
    tmp_path: Path, server: EmbeddedServer, database: Pool
) -> None:
    archive = await dumped(server, database.target, tmp_path / "dump")
    shelf = Shelf(archive)
    line = await recover.offer(database, shelf)
    assert line is not None
    assert f"python bot.py backup restore {archive.id}" in line
    assert await recover.offer(database, Shelf()) is None
    await database.execute(GUILD)
    assert await recover.offer(database, shelf) is None
    await database.execute("DROP TABLE members CASCADE")
    assert "members" in str(await recover.offer(database, shelf))

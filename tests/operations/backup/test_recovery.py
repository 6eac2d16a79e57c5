"""The start notices that the database has lost what a backup has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.operations.backup.helpers import execute, make_backup, make_service, open_pool
from utils.database import ConnectTarget, Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable
from utils.operations import migrations
from utils.operations.backup.recovery import Assessment, assess, suggest_restore

GUILD = "INSERT INTO guilds (id, name) VALUES (1, 'one')"


@pytest.fixture
def queries() -> Iterator[list[str]]:
    """The queries that pools run meanwhile."""
    recorded: list[str] = []
    run = Pool.run

    async def recording(self: Pool, verb: str, query: str, *args: object, **kwargs: object) -> object:
        recorded.append(query)
        return await run(self, verb, query, *args, **kwargs)  # type: ignore[arg-type]

    with patch.object(Pool, "run", recording):
        yield recorded


async def test_a_fine_database_costs_one_query(database: Pool, queries: list[str]) -> None:
    await database.execute(GUILD)
    queries.clear()
    assert (await assess(database)).is_fine
    assert len(queries) == 1


async def test_recognizes_an_empty_database(database: Pool, empty_target: ConnectTarget) -> None:
    assert await assess(database) == Assessment("empty", "it has no guilds")
    async with open_pool(empty_target) as bare:
        assert await assess(bare) == Assessment("empty", "it has no tables yet", has_tables=False)
        await bare.execute("CREATE TABLE foreign_table (id int)")
        assert not (await assess(bare)).has_tables


@pytest.mark.parametrize("table", ["guilds", "members", "guildbook_version", "ops.leases", "member_preferences"])
async def test_a_missing_table_is_damage(database: Pool, table: str) -> None:
    await database.execute(GUILD)
    await database.execute(f"DROP TABLE {table} CASCADE")
    found = await assess(database)
    assert found.state == "damaged"
    assert table in found.reason


async def test_an_older_schema_is_fine(empty_target: ConnectTarget) -> None:
    oldest = (await migrations.pending(empty_target))[0]
    await migrations.upgrade(empty_target, oldest)
    await execute(empty_target, GUILD)
    async with open_pool(empty_target) as older:
        assert (await assess(older)).is_fine


async def test_a_missing_file_is_damage_but_an_outage_is_not(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def missing_file(*_: object, **__: object) -> None:
        raise DatabaseError('could not open file "base/5/16384": No such file or directory', sqlstate="58P01")

    monkeypatch.setattr(database, "fetchrow", missing_file)
    assert (await assess(database)).state == "damaged"

    async def outage(*_: object, **__: object) -> None:
        raise DatabaseUnavailable("the server is restarting after a crash", sqlstate="57P02")

    monkeypatch.setattr(database, "fetchrow", outage)
    with pytest.raises(DatabaseUnavailable):
        await assess(database)


async def test_suggests_a_backup_when_data_is_lost(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path / "full")
    backup = await make_backup(service, database)
    line = await suggest_restore(database, service.catalog)
    assert line is not None
    assert f"python bot.py backup restore {backup.id}" in line
    assert await suggest_restore(database, make_service(tmp_path / "none").catalog) is None
    await database.execute(GUILD)
    assert await suggest_restore(database, service.catalog) is None
    await database.execute("DROP TABLE members CASCADE")
    assert "members" in str(await suggest_restore(database, service.catalog))

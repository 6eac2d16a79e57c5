"""The start notices that the database has lost what a backup has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.operations.backup.helpers import execute, make_backup, make_service, make_settings, open_pool
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError, DatabaseError, DatabaseUnavailable
from utils.operations import migrations
from utils.operations.action import BEGIN_ANEW
from utils.operations.backup.recovery import begin_anew, find_hold, find_loss, require_no_hold, suggest_restore
from utils.operations.backup.restore.assessment import Assessment, assess
from utils.operations.backup.service import BackupService
from utils.service import application

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


async def ours() -> int:
    return 7


async def nobody_knows() -> None:
    return None


async def test_what_may_be_written_to_is_no_loss(database: Pool, empty_target: ConnectTarget) -> None:
    assert await find_loss(database) == Assessment("empty", "it has no guilds"), "nobody has logged in yet"
    await application.claim(database, 7)
    assert await find_loss(database) is None
    await database.execute("DELETE FROM ops.application")
    assert (await begin_anew(database)).ok
    assert await find_loss(database) is None, "an operator has decided"
    await database.execute("DROP TABLE ops.leases")
    assert str(await find_loss(database)).count("ops.leases")
    async with open_pool(empty_target) as bare:
        assert await find_loss(bare) == Assessment("empty", "it has no tables yet", has_tables=False)


async def test_holds_an_empty_database_for_a_good_backup_of_it_alone(
    tmp_path: Path, database: Pool, empty_target: ConnectTarget
) -> None:
    catalog = make_service(tmp_path).catalog
    await application.claim(database, 7)
    await make_backup(make_service(tmp_path), database)
    loss = Assessment("empty", "it has no tables yet", has_tables=False)
    assert await find_hold(database, catalog, loss, ours) is None, "there is no guild in it"
    await database.execute(GUILD)
    backup = await make_backup(make_service(tmp_path), database)
    hold = await find_hold(database, catalog, loss, ours)
    assert hold is not None
    assert hold.backup == backup
    assert hold.is_of_application
    unknown = await find_hold(database, catalog, loss, nobody_knows)
    assert unknown == replace(hold, is_of_application=False), "it may be the same application"

    async def another() -> int:
        return 8

    assert await find_hold(database, catalog, loss, another) is None
    async with open_pool(empty_target) as elsewhere:
        assert await find_hold(elsewhere, catalog, loss, ours) is None, "another database"
    (catalog.local.path / backup.file).write_bytes(b"")
    hold = await find_hold(database, catalog, loss, ours)
    assert hold is not None
    assert hold.backup is None, "no good backup"


async def test_holds_an_empty_database_of_which_no_backup_is_usable(tmp_path: Path, database: Pool) -> None:
    """They prove that there was data, damaged or not signed with the key that is set now."""
    await application.claim(database, 7)
    await database.execute(GUILD)
    service = make_service(tmp_path)
    backup = await make_backup(service, database)
    loss = Assessment("empty", "it has no tables yet", has_tables=False)
    signing = make_service(tmp_path, backup_signing_key="new").catalog
    hold = await find_hold(database, signing, loss, ours)
    assert hold is not None
    assert "no backup is usable" in hold.line
    assert "is not signed" in hold.line
    (service.catalog.local.path / backup.file).write_bytes(b"cut")
    hold = await find_hold(database, service.catalog, loss, ours)
    assert hold is not None
    assert "no backup is usable" in hold.line

    async def another() -> int:
        return 8

    assert await find_hold(database, service.catalog, loss, another) is None


async def test_what_would_fill_a_held_database_is_refused(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    await require_no_hold(database, service.catalog)
    await application.claim(database, 7)
    await database.execute(GUILD)
    backup = await make_backup(service, database)
    await require_no_hold(database, service.catalog)
    await database.execute("DELETE FROM guilds; DELETE FROM ops.application")
    with pytest.raises(BackupError, match=f"backup restore {backup.id}.*begin-anew"):
        await require_no_hold(database, service.catalog)
    await begin_anew(database)
    await require_no_hold(database, service.catalog)


async def test_begins_anew_only_in_an_empty_database(database: Pool, empty_target: ConnectTarget) -> None:
    async with open_pool(empty_target) as bare:
        outcome = await begin_anew(bare)
        assert outcome.text.startswith("The database begins anew: applied: 0001")
        assert await bare.fetchval("SELECT count(*) FROM ops.admin_actions WHERE command = $1", BEGIN_ANEW) == 1
    await database.execute(GUILD)
    with pytest.raises(BackupError, match="it has guilds in it: nothing was changed"):
        await begin_anew(database)


async def test_suggests_a_backup_of_the_first_version_that_is_only_in_the_store(tmp_path: Path, database: Pool) -> None:
    """It does not say whose it is, so that an operator must."""
    await database.execute(GUILD)
    backup = await make_backup(make_service(tmp_path / "old"), database)
    old = replace(backup, application_id=None, host=None, ordered_at=None)
    (tmp_path / "bucket").mkdir()
    for name, content in (
        (old.file, (tmp_path / "old" / "backups" / old.file).read_bytes()), (f"{old.id}.json", old.serialize()),
    ):  # fmt: skip
        (tmp_path / "bucket" / name).write_bytes(content)
    settings = make_settings(tmp_path / "new", backup_url=(tmp_path / "bucket").as_uri())
    service = BackupService(settings)
    assert "if it is yours, restore it with --from-other" in (await service.list()).text
    with pytest.raises(BackupError, match=f"{old.id} .*made by version 0.1.0.*by its id with --from-other"):
        await service.restore(database, "latest")
    with pytest.raises(
        BackupError, match=r"made by version 0\.1\.0.*To restore it here all the same, add --from-other"
    ):
        await service.restore(database, old.id)
    await database.execute("DELETE FROM guilds")
    line = await suggest_restore(database, service.catalog)
    assert line is not None
    assert f"python bot.py backup restore {old.id} --from-other" in line
    assert (await service.restore(database, old.id, from_other=True)).ok
    assert await database.fetchval("SELECT count(*) FROM guilds") == 1


async def test_suggests_a_backup_when_data_is_lost(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path / "full")
    await database.execute(GUILD)
    backup = await make_backup(service, database)
    await database.execute("DELETE FROM guilds")
    line = await suggest_restore(database, service.catalog)
    assert line is not None
    assert f"python bot.py backup restore {backup.id}" in line
    assert await suggest_restore(database, make_service(tmp_path / "none").catalog) is None
    await database.execute(GUILD)
    assert await suggest_restore(database, service.catalog) is None
    await database.execute("DROP TABLE members CASCADE")
    assert "members" in str(await suggest_restore(database, service.catalog))

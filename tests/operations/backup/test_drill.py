"""A drill really restores the backup, and reports what it compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    dropping_scratch_databases,
    dump,
    execute,
    make_backup,
    make_service,
    open_pool,
    scratch_databases,
)
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.operations.backup import drill, load, scratch
from utils.operations.backup.archive import Archive
from utils.operations.development import seed

pytestmark = pytest.mark.slow


@pytest.fixture
async def archive(tmp_path: Path, server: EmbeddedServer, database: Pool) -> Archive:
    await seed.seed(database, guilds=2, members=300, seed=3)
    return await dump(server, database.target, tmp_path / "dump")


@pytest.mark.parametrize("change", ["none", "newer", "deleted", "silent"])
async def test_unchanged_rows_must_be_equal(database: Pool, archive: Archive, change: str) -> None:
    statement = {
        "newer": "UPDATE members SET nick = 'new', stamp = 9, updated_at = now()",
        "deleted": "DELETE FROM members",
        "silent": "UPDATE members SET nick = 'new'",
    }.get(change)
    if statement:
        await execute(database.target, statement)
    name = str(database.target.database)
    async with (
        dropping_scratch_databases(database.target),
        scratch.scratch_database(database.direct, name, scratch.DRILL, scratch.new_suffix()) as restored,
    ):
        await load.load_and_check(archive, await load.make_place(archive, restored.target))
        sample = await drill.read_sample(restored.target, database.direct, list(archive.counts))
        assert sample.read > 400
        assert sample.compared > 200
        assert bool(sample.changed) == (change in ("newer", "deleted"))
        assert bool(sample.differences) == (change == "silent"), sample
        without_live = await drill.read_sample(restored.target, None, list(archive.counts))
        assert (without_live.read > 400, without_live.compared) == (True, 0)


async def test_leaves_no_database_behind(database: Pool, archive: Archive) -> None:
    result = await drill.rehearse(database, archive)
    assert result.ok, result.lines()
    assert (result.where, result.rows) == ("beside the live database", sum(archive.counts.values()))
    assert result.rows_compared > 200
    assert await scratch_databases(database.target, scratch.DRILL) == []


async def test_uses_a_temporary_server_without_createdb(database: Pool, archive: Archive) -> None:
    role = f"poor_{database.target.database}"
    await execute(database.target, f"CREATE ROLE {role} LOGIN", f"GRANT pg_read_all_data TO {role}")
    try:
        async with open_pool(replace(database.target, user=role)) as poor:
            result = await drill.rehearse(poor, archive)
        assert result.ok, result.lines()
        assert result.where == "on a temporary server"
        assert result.rows_compared > 200
    finally:
        await execute(database.target, f"DROP ROLE {role}")


async def test_reports_an_incomplete_backup(database: Pool, archive: Archive) -> None:
    counts = {**archive.counts, ("public", "members"): 1}
    result = await drill.rehearse(database, replace(archive, counts=counts))
    assert not result.ok
    assert "public.members" in result.problems[0]
    archive.file.write_bytes(b"PGDMP" + bytes(200))
    assert not (await drill.rehearse(database, archive)).ok
    assert await scratch_databases(database.target, scratch.DRILL) == []


async def test_stores_the_result_with_the_backup(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    backup = await make_backup(service, database)
    assert await service.catalog.last_drill(backup.id) is None
    outcome = await service.drill(database)
    assert outcome.ok
    result = await service.catalog.last_drill(backup.id)
    assert result is not None
    assert result.lines() == outcome.text.splitlines()
    (service.catalog.local.path / f"{backup.id}.drill.json").write_bytes(b"{}")
    assert await service.catalog.last_drill(backup.id) is None

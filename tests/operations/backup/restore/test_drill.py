"""A drill really restores the backup, and reports what it compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    GUILD,
    dump,
    execute,
    make_backup,
    make_service,
    scratch_schema_names,
    table_checksums,
)
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.restore import drill
from utils.operations.backup.scratch.tables import open_scratch_tables
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
    async with open_scratch_tables(database, is_restore=False) as scratch:
        loaded = await scratch.load(archive)
        names = list(loaded.tables.values())
        sample = await drill.read_sample(scratch.place, names, database.direct, scratch.schemas)
    assert sample.read > 400
    assert sample.compared > 200
    assert bool(sample.changed) == (change in ("newer", "deleted"))
    assert bool(sample.differences) == (change == "silent"), sample


async def test_changes_nothing_and_leaves_nothing_behind(database: Pool, archive: Archive) -> None:
    await database.execute("UPDATE members SET nick = 'since', stamp = stamp + 1")
    before = await table_checksums(database.target)
    result = await drill.rehearse(database, archive)
    assert result.ok, result.lines()
    assert (result.where, result.rows) == (drill.WHERE, sum(archive.counts.values()))
    assert result.rows_compared > 20
    assert await table_checksums(database.target) == before
    assert await scratch_schema_names(database.target) == []


async def test_reports_an_incomplete_backup(database: Pool, archive: Archive) -> None:
    counts = {**archive.counts, ("public", "members"): 1}
    result = await drill.rehearse(database, replace(archive, counts=counts))
    assert not result.ok
    assert "public.members" in result.problems[0]
    archive.file.write_bytes(b"PGDMP" + bytes(200))
    assert not (await drill.rehearse(database, archive)).ok
    assert await scratch_schema_names(database.target) == []


async def test_stores_the_result_with_the_backup(tmp_path: Path, database: Pool) -> None:
    service = make_service(tmp_path)
    await database.execute(GUILD)
    backup = await make_backup(service, database)
    assert (await service.catalog.find(backup.id)).drill is None
    outcome = await service.drill(database)
    assert outcome.ok
    result = (await service.catalog.find(backup.id)).drill
    assert result is not None
    assert result.lines() == outcome.text.splitlines()
    (service.catalog.local.path / f"{backup.id}.drill.json").write_bytes(b"{}")
    assert (await service.catalog.find(backup.id)).drill is None

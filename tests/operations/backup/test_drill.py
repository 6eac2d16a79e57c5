"""A drill restores for real, and says what it looked at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.operations.backup.restoring import Shelf, cleaned, databases, dumped, pooled, tell
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.operations.backup import drill, loading, scratch
from utils.operations.backup.source import Archive
from utils.operations.development import seed

pytestmark = pytest.mark.slow


@pytest.fixture
async def archive(tmp_path: Path, server: EmbeddedServer, database: Pool) -> Archive:
    await seed.seed(database, guilds=2, members=300, seed=3)
    return await dumped(server, database.target, tmp_path / "dump")


@pytest.mark.parametrize("change", ["", "newer", "gone", "silently"])
async def test_rows_that_nothing_has_changed_must_be_the_same(database: Pool, archive: Archive, change: str) -> None:
    statement = {
        "newer": "UPDATE members SET nick = 'new', stamp = 9, updated_at = now()",
        "gone": "DELETE FROM members",
        "silently": "UPDATE members SET nick = 'new'",
    }.get(change)
    if statement:
        await tell(database.target, statement)
    name = str(database.target.database)
    async with (
        cleaned(database.target),
        scratch.scratch(database.direct, name, scratch.DRILL, scratch.stamp()) as made,
    ):
        await loading.load_and_check(archive, made.target)
        found = await drill.sample(made.target, database.direct, list(archive.counts))
        assert found.read > 400
        assert found.compared > 200
        assert bool(found.changed) == (change in ("newer", "gone"))
        assert bool(found.different) == (change == "silently"), found
        alone = await drill.sample(made.target, None, list(archive.counts))
        assert (alone.read > 400, alone.compared) == (True, 0)


async def test_a_drill_restores_beside_the_live_database_and_leaves_nothing(database: Pool, archive: Archive) -> None:
    done = await drill.rehearse(database, archive)
    assert done.ok, done.lines()
    assert (done.where, done.rows) == ("beside the live database", sum(archive.counts.values()))
    assert done.rows_compared > 200
    assert await databases(database.target, scratch.DRILL) == []


async def test_where_no_second_database_is_allowed_a_server_of_its_own_does(database: Pool, archive: Archive) -> None:
    role = f"poor_{database.target.database}"
    await tell(database.target, f"CREATE ROLE {role} LOGIN", f"GRANT pg_read_all_data TO {role}")
    try:
        async with pooled(replace(database.target, user=role)) as poor:
            done = await drill.rehearse(poor, archive)
        assert done.ok, done.lines()
        assert done.where == "on a server of its own"
        assert done.rows_compared > 200
    finally:
        await tell(database.target, f"DROP ROLE {role}")


async def test_a_backup_that_does_not_come_back_is_told(database: Pool, archive: Archive) -> None:
    counts = {**archive.counts, ("public", "members"): 1}
    done = await drill.rehearse(database, replace(archive, counts=counts))
    assert not done.ok
    assert "public.members" in done.problems[0]
    archive.file.write_bytes(b"PGDMP" + bytes(200))
    assert not (await drill.rehearse(database, archive)).ok
    assert await databases(database.target, scratch.DRILL) == []


async def test_the_result_stands_beside_the_backup(database: Pool, archive: Archive) -> None:
    shelf = Shelf(archive)
    assert await drill.last_drill(shelf, archive.id) is None
    done = await drill.drill(database, shelf)
    assert done.ok
    kept = await drill.last_drill(shelf, archive.id)
    assert kept is not None
    assert kept.lines() == done.text.splitlines()
    shelf.notes[f"{archive.id}.drill.json"] = b"{}"
    assert await drill.last_drill(shelf, archive.id) is None

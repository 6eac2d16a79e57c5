"""Backups with tables of packs: made, drilled and restored as ours, whatever revision each pack is at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operations.backup.helpers import fill, make_backup, make_service
from tests.packs.support import add_revision, using, write_pack
from utils.database import Pool
from utils.exceptions import BackupError
from utils.operations import migrations
from utils.operations.backup.service import BackupService
from utils.operations.migrations import admin

pytestmark = pytest.mark.direct("dumps and restores need a session of their own")

ROWS = "INSERT INTO economy_entries VALUES (1, 2, 3), (1, 3, 5)"
COUNTS = "SELECT array_agg(count ORDER BY count) FROM economy_entries"


@pytest.fixture
async def service(database: Pool, tmp_path: Path) -> BackupService:
    """Backups of a database that has rows."""
    await fill(database)
    return make_service(tmp_path / "data")


async def test_a_pack_is_backed_up_drilled_and_restored(database: Pool, service: BackupService, tmp_path: Path) -> None:
    with using(write_pack(tmp_path, "economy")):
        await migrations.upgrade_packs(database)
        await database.execute(ROWS)
        manifest = await make_backup(service, database)
        assert manifest.packs == {"economy": "economy_0001"}
        assert manifest.rows["public.economy_entries"] == 2
        assert manifest.data_counts["economy_entries"] == 2
        assert "economy_version" not in manifest.data_counts
        assert (await service.drill(database)).ok
        await database.execute("UPDATE economy_entries SET count = 0; DELETE FROM economy_entries WHERE user_id = 3")
        outcome = await service.restore(database, manifest.id)
        assert outcome.ok, outcome.text
        assert await database.fetchval(COUNTS) == [3, 5]
        assert (await admin.status(database)).ok


async def test_an_older_backup_is_migrated(database: Pool, service: BackupService, tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy")
    with using(root):
        await migrations.upgrade_packs(database)
        await database.execute(ROWS)
        manifest = await make_backup(service, database)
    path = add_revision(
        root, "economy_0002", "economy_0001", 'op.execute("UPDATE economy_entries SET count = count * 10")'
    )
    with using(root):
        assert (await migrations.upgrade_packs(database))[0] == ["economy_0002"]
        await database.execute("TRUNCATE economy_entries")
        newer = await make_backup(service, database)
        assert (await service.drill(database, manifest.id)).ok
        outcome = await service.restore(database, manifest.id)
        assert outcome.ok, outcome.text
        assert await database.fetchval(COUNTS) == [30, 50]
        assert await database.fetchval("SELECT version_num FROM economy_version") == "economy_0002"
        assert (await admin.status(database)).ok
    path.unlink()
    with using(root), pytest.raises(BackupError, match="this version of the pack does not know"):
        await service.restore(database, newer.id)


async def test_what_a_removed_pack_left_is_backed_up_and_left_alone(
    database: Pool, service: BackupService, tmp_path: Path
) -> None:
    root = write_pack(tmp_path, "economy")
    with using(root):
        await migrations.upgrade_packs(database)
        await database.execute(ROWS)
    manifest = await make_backup(service, database)
    assert (manifest.packs, manifest.rows["public.economy_entries"]) == ({"economy": "economy_0001"}, 2)
    await database.execute("UPDATE economy_entries SET count = 9")
    outcome = await service.restore(database, manifest.id)
    assert outcome.ok, outcome.text
    assert "Left out, because no revision here makes them: public.economy_" in outcome.text
    assert await database.fetchval(COUNTS) == [9, 9]
    with using(root):
        assert (await service.restore(database, manifest.id)).ok
        assert await database.fetchval(COUNTS) == [3, 5]

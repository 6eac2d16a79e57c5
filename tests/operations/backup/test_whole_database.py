"""A restore of the whole database puts a restored one in the place of the live one, after naming what would be lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    dropping_scratch_databases,
    execute,
    fetchval,
    fill,
    make_backup,
    make_service,
    open_pool,
    run_backup_command,
    scratch_databases,
    table_checksums,
)
from utils.database import ConnectTarget, Pool
from utils.exceptions import ForbiddenHere
from utils.operations import migrations
from utils.operations.backup import scratch
from utils.operations.backup.service import BackupService

pytestmark = pytest.mark.slow


@pytest.fixture
async def service(tmp_path: Path, database: Pool) -> BackupService:
    """A service with one backup, and a live database that has changed since."""
    await fill(database)
    service = make_service(tmp_path)
    await make_backup(service, database)
    await execute(
        database.target, "DELETE FROM members WHERE user_id > 100", "INSERT INTO ops.suppressions (user_id) VALUES (9)"
    )
    return service


async def test_restores_rows_and_keeps_ops_and_the_old_database(database: Pool, service: BackupService) -> None:
    await execute(database.target, "SELECT setval('ops.change_ids', 900)")
    [entry] = await service.catalog.entries()
    async with dropping_scratch_databases(database.target):
        before = await table_checksums(database.target)
        first = await service.restore(database, entry.id, whole_database=True)
        assert first.ok, first.text
        assert await database.fetchval("SELECT count(*) FROM members") == 3_000
        assert await database.fetchval("SELECT array_agg(user_id ORDER BY user_id) FROM ops.suppressions") == [9, 99]
        assert await database.fetchval("SELECT nextval('ops.change_ids')") == 901
        assert await database.fetchval("SELECT count(*) FROM pg_stats WHERE tablename = 'members'") > 0
        [old] = await scratch_databases(database.target, scratch.BEFORE)
        assert await table_checksums(database.target.with_database(old)) == before
        assert old in first.text
        assert await scratch_databases(database.target, scratch.RESTORE) == []
        assert await migrations.check_drift(database) == []
        second = await service.restore(database, entry.id, whole_database=True)
        assert await scratch_databases(database.target, scratch.BEFORE) == [second.data["before"]]
        await service.restore(database, entry.id, whole_database=True, drop_old=True)
        assert await scratch_databases(database.target, scratch.BEFORE) == []


async def test_replaces_a_damaged_database_and_keeps_it(database: Pool, service: BackupService) -> None:
    await database.execute("DROP TABLE members CASCADE")
    async with dropping_scratch_databases(database.target):
        outcome = await service.restore(database, "latest", whole_database=True, drop_old=True)
        assert outcome.ok, outcome.text
        assert outcome.data["safety_backup"] is None
        assert "damaged" in outcome.text
        kept = await scratch_databases(database.target, scratch.BEFORE)
        assert kept == [outcome.data["before"]], "it is kept because there is no backup of it"
        assert await database.fetchval("SELECT count(*) FROM members") == 3_000


async def test_migrates_an_older_backup(tmp_path: Path, empty_target: ConnectTarget) -> None:
    revisions = await migrations.pending(empty_target)
    await migrations.upgrade(empty_target, revisions[0])
    await execute(empty_target, "INSERT INTO guilds (id, name) VALUES (1, 'old')")
    service = make_service(tmp_path)
    async with dropping_scratch_databases(empty_target), open_pool(empty_target) as pool:
        id = (await make_backup(service, pool)).id
        await migrations.upgrade(pool)
        outcome = await service.restore(pool, id, whole_database=True)
        assert outcome.data["migrated"] == revisions[1:]
        assert await pool.fetchval("SELECT name FROM guilds") == "old"
        assert await migrations.pending(pool) == []
        assert await migrations.check_drift(pool) == []


# --- what would be lost

OTHERS = """
CREATE SCHEMA shop; CREATE TABLE shop.orders (id int); INSERT INTO shop.orders SELECT generate_series(1, 500);
CREATE VIEW shop.names AS SELECT name FROM guilds;
CREATE TABLE legacy (id int); CREATE PUBLICATION feed FOR TABLE legacy;
GRANT SELECT ON members TO pg_monitor; ANALYZE shop.orders;
"""


async def test_names_what_would_be_lost(tmp_path: Path, database: Pool, service: BackupService) -> None:
    id = (await service.catalog.entries())[0].id
    assert await service.find_losses(database, id) == []
    await execute(database.target, OTHERS)
    losses = await service.find_losses(database, id)
    assert losses == [
        "table public.legacy (about 0 rows)",
        "view shop.names",
        "table shop.orders (about 500 rows)",
        "grants on Guildbook's tables",
        "publication feed",
    ]
    unconfirmed = await run_backup_command(tmp_path, database.target, "restore", id, "--whole-database")
    assert unconfirmed.code == 2
    assert all(loss in unconfirmed.err for loss in losses)
    assert "--yes" in unconfirmed.err
    async with dropping_scratch_databases(database.target):
        outcome = await service.restore(database, id, whole_database=True)
        assert outcome.data["lost"] == losses
        assert "shop.orders (about 500 rows)" in outcome.text


async def test_says_which_privilege_is_missing(target: ConnectTarget, service: BackupService) -> None:
    role = f"poor_{target.database}"
    await execute(target, f"CREATE ROLE {role} LOGIN", f"GRANT pg_read_all_data TO {role}")
    try:
        poor = ConnectTarget(target.hosts, target.ports, user=role, database=target.database, sslmode="disable")
        async with open_pool(poor) as pool:
            with pytest.raises(ForbiddenHere, match=r"CREATEDB.*restore without --whole-database"):
                await service.restore(pool, "latest", whole_database=True)
        assert await fetchval(target, "SELECT count(*) FROM members") < 3_000
    finally:
        await execute(target, f"DROP ROLE {role}")

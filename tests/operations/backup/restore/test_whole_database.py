"""A restore of the whole database puts a restored one in the place of the live one, after naming what would be lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.operations.backup.helpers import (
    connect,
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
from utils.database.placement import Placement
from utils.exceptions import BackupError, ForbiddenHere
from utils.operations import migrations
from utils.operations.backup.archive.script import Archive
from utils.operations.backup.restore import swap
from utils.operations.backup.restore.restore import restore
from utils.operations.backup.restore.whole_database import find_losses
from utils.operations.backup.scratch import databases, load
from utils.operations.backup.scratch.load import Place
from utils.operations.backup.scratch.locks import lock_for_restore, new_suffix, without_other_restores
from utils.operations.backup.scratch.tables import open_scratch_tables
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
        [old] = await scratch_databases(database.target, databases.BEFORE)
        assert await table_checksums(database.target.with_database(old)) == before
        assert old in first.text
        assert await scratch_databases(database.target, databases.RESTORE) == []
        assert await migrations.check_drift(database) == []
        second = await service.restore(database, entry.id, whole_database=True)
        assert await scratch_databases(database.target, databases.BEFORE) == [second.data["before"]]
        await service.restore(database, entry.id, whole_database=True, drop_old=True)
        assert await scratch_databases(database.target, databases.BEFORE) == []


async def test_replaces_a_damaged_database_and_keeps_it(database: Pool, service: BackupService) -> None:
    await database.execute("DROP TABLE members CASCADE")
    async with dropping_scratch_databases(database.target):
        outcome = await service.restore(database, "latest", whole_database=True, drop_old=True)
        assert outcome.ok, outcome.text
        assert outcome.data["safety_backup"] is None
        assert "damaged" in outcome.text
        kept = await scratch_databases(database.target, databases.BEFORE)
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


async def test_one_restore_at_a_time(
    database: Pool, service: BackupService, empty_target: ConnectTarget, tmp_path: Path
) -> None:
    """Neither kind runs beside the other, and the second one is refused before anything is done."""
    [entry] = await service.catalog.entries()
    running = "another restore of this database is running: wait until it ends"
    async with open_scratch_tables(database, is_restore=True):
        for whole_database in (False, True):
            with pytest.raises(BackupError, match=running):
                await service.restore(database, entry.id, whole_database=whole_database)
    async with without_other_restores(database.target):
        for whole_database in (False, True):
            with pytest.raises(BackupError, match=running):
                await service.restore(database, entry.id, whole_database=whole_database)
        refused = await run_backup_command(tmp_path, database.target, "restore", entry.id, "--yes")
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert running in refused.err
        assert (await service.drill(database)).ok
    assert [found.id for found in await service.catalog.entries()] == [entry.id], "no safety backup was made"
    async with dropping_scratch_databases(database.target):
        for whole_database in (True, False, True, False):
            assert (await service.restore(database, entry.id, whole_database=whole_database)).ok
    # Guildbooks in schemas of their own do not wait for each other, but for a restore of their database.
    targets = [empty_target.with_placement(Placement.of(name)) for name in ("one", "two")]
    for target in targets:
        await migrations.upgrade(target)
    async with open_pool(targets[0]) as one, open_pool(targets[1]) as two, open_scratch_tables(one, is_restore=True):
        async with open_scratch_tables(two, is_restore=True):
            with pytest.raises(BackupError, match=running):
                async with without_other_restores(one.direct):
                    pass
        with pytest.raises(BackupError, match=running):
            async with open_scratch_tables(one, is_restore=True):
                pass


async def test_a_swap_waits_for_a_restore_in_place(database: Pool) -> None:
    """For one that began between the loading and the swap."""
    async with dropping_scratch_databases(database.target), connect(database.target) as other:
        await lock_for_restore(other, "public")
        name = str(database.target.database)
        async with databases.scratch_database(database.target, name, new_suffix()) as made:
            with pytest.raises(BackupError, match=r"another restore of this database is running.*Nothing was changed"):
                await swap.swap(database.target, name, made.name, f"{name}_before", comment="", attempts=1)
        assert await other.fetchval("SELECT count(*) FROM members") == 0


# --- materialized views

#: One of our views, as if a revision had made it materialized.
MATERIALIZED = """
DROP VIEW role_membership;
CREATE MATERIALIZED VIEW role_membership AS
    SELECT user_id, count(*) AS memberships, 10 / min(length(nick)) AS ratio FROM members GROUP BY 1
"""
UNIQUE = "CREATE UNIQUE INDEX ON role_membership (user_id)"


@pytest.mark.parametrize("whole_database", [False, True])
@pytest.mark.parametrize("made", [[MATERIALIZED], [MATERIALIZED, UNIQUE], [f"{MATERIALIZED} WITH NO DATA", UNIQUE]])
async def test_refreshes_materialized_views(
    database: Pool, service: BackupService, monkeypatch: pytest.MonkeyPatch, made: list[str], *, whole_database: bool
) -> None:
    [entry] = await service.catalog.entries()
    await execute(database.target, *made, "CREATE MATERIALIZED VIEW theirs AS SELECT count(*) AS number FROM members")
    make_place = load.make_place

    async def make_place_with_view(archive: Archive, target: ConnectTarget, schemas: Placement) -> Place:
        place = await make_place(archive, target, schemas)
        await execute(target, *made)
        return place

    monkeypatch.setattr(load, "make_place", make_place_with_view)
    async with dropping_scratch_databases(database.target):
        outcome = await service.restore(database, entry.id, whole_database=whole_database)
        assert outcome.ok, outcome.text
        assert await database.fetchval("SELECT count(*) FROM role_membership") == 3_000
        if not whole_database:
            assert await database.fetchval("SELECT number FROM theirs") == 100, "another program's"
            await database.execute("DELETE FROM members WHERE user_id > 7")
            assert await restore(database, service.catalog, entry.id, tables=["members"])
            assert await database.fetchval("SELECT count(*) FROM role_membership") == 3_000


@pytest.mark.parametrize("whole_database", [False, True])
async def test_a_view_that_cannot_be_refreshed_is_reported(
    database: Pool, service: BackupService, monkeypatch: pytest.MonkeyPatch, *, whole_database: bool
) -> None:
    await database.execute("UPDATE members SET nick = '' WHERE user_id = 5")
    manifest = await make_backup(service, database)
    await database.execute("DELETE FROM members WHERE user_id = 5")
    await execute(database.target, MATERIALIZED)
    make_place = load.make_place

    async def make_place_with_view(archive: Archive, target: ConnectTarget, schemas: Placement) -> Place:
        place = await make_place(archive, target, schemas)
        await execute(target, MATERIALIZED)
        return place

    monkeypatch.setattr(load, "make_place", make_place_with_view)
    async with dropping_scratch_databases(database.target):
        outcome = await service.restore(database, manifest.id, whole_database=whole_database)
        assert not outcome.ok
        assert "Restored, but refreshing the materialized views failed: REFRESH MATERIALIZED VIEW" in outcome.text
        assert "division by zero" in outcome.text
        assert await database.fetchval("SELECT count(*) FROM members") == manifest.rows["public.members"]


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
    counts = await service.catalog.read_manifest(service.catalog.local, id)
    older = [name for name in counts.counts if name[1] not in ("application", "migrations", "documents")]
    lost = await find_losses(database, older)
    assert [loss.partition(" (")[0] for loss in lost] == ["table public.documents"], "rows of ops are copied"
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

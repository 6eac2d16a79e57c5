"""Upgrades that destroy data: they are recognized, and a backup comes first."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import pytest

from tests.operations.backup.helpers import fill, make_settings
from tests.operations.migrations.support import EXTRA, HEAD, with_revision
from utils.database import ConnectTarget, Pool, ownership
from utils.exceptions import BackupError, MigrationError
from utils.operations import migrations
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.create import backup_before
from utils.operations.migrations import admin, runner
from utils.operations.migrations.preview import preview
from utils.operations.migrations.statements import parse

DROPS = "def upgrade():\n    op.drop_column('member_preferences', 'extra')\n\n\ndef downgrade():\n    pass\n"
ADDS = "def upgrade():\n    op.execute('ALTER TABLE roles ADD COLUMN surprise text')\n"
READS = "def upgrade():\n    assert op.get_bind().execute('SELECT 1').one()\n"


@pytest.mark.parametrize(
    ("sql", "is_lost"),
    [
        ("DROP TABLE documents", True),
        ("DROP TABLE IF EXISTS a.b CASCADE", True),
        ("ALTER TABLE members DROP COLUMN nick", True),
        ("ALTER TABLE ONLY members DROP nick, ADD COLUMN x int", True),
        ("ALTER TABLE members DROP CONSTRAINT x", False),
        ("ALTER TABLE members ALTER COLUMN nick DROP NOT NULL", False),
        ("DROP INDEX CONCURRENTLY x", False),
        ("DROP VIEW role_membership", False),
        ("DROP MATERIALIZED VIEW daily_message_stats", False),
        ("DROP TABLE guildbook_batches", False),
        ("DROP SCHEMA ops CASCADE", True),
        ("TRUNCATE members", True),
        ("DELETE FROM members WHERE left_at IS NOT NULL", True),
        ("DELETE FROM guildbook_version WHERE version_num = '1'", False),
        ("CREATE TABLE x (a int)", False),
    ],
)
def test_statements_that_lose_rows(sql: str, is_lost: bool) -> None:
    (statement,) = parse(sql)
    assert statement.loses_rows == is_lost


async def test_a_backup_comes_before_an_upgrade_that_destroys_data(tmp_path: Path, database: Pool) -> None:
    options = with_revision(tmp_path, DROPS)
    revisions: list[str | None] = []

    async def backup() -> str:
        revisions.append(await migrations.current(database))
        return "the backup"

    outcome = await admin.upgrade(database, backup=backup, options=options)
    assert (outcome.data["backup"], revisions) == ("the backup", [HEAD])
    assert "backup made before: the backup" in outcome.text
    assert (await admin.upgrade(database, backup=backup, options=options)).data["backup"] is None
    assert len(revisions) == 1


async def test_no_backup_before_an_upgrade_that_destroys_nothing(tmp_path: Path, empty_target: ConnectTarget) -> None:
    async def backup() -> str:
        raise AssertionError("nothing is destroyed")

    pool = Pool(empty_target)
    await pool.connect()
    try:
        await migrations.prepare_schema(pool, auto_migrate=True, backup=backup)  # there were no tables
        await admin.upgrade(pool, backup=backup, options=with_revision(tmp_path, ADDS))
    finally:
        await pool.close()


async def test_what_a_revision_destroys_may_be_unknown(tmp_path: Path, database: Pool) -> None:
    losses = await runner.find_losses(database, options=with_revision(tmp_path, READS))
    assert len(losses) == 1
    assert losses[0].startswith("unknown, because the SQL cannot be written: ")


async def test_a_start_backs_up_and_logs_it(tmp_path: Path, database: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async def backup() -> str:
        return "20260102T030405Z-abcdef"

    caplog.set_level(logging.WARNING)
    await migrations.prepare_schema(database, auto_migrate=True, backup=backup, options=with_revision(tmp_path, DROPS))
    assert "made backup 20260102T030405Z-abcdef before an upgrade that destroys data: ALTER TABLE" in caplog.text
    assert await migrations.current(database) == EXTRA


async def test_nothing_is_changed_if_the_backup_fails(tmp_path: Path, database: Pool) -> None:
    options = with_revision(tmp_path, DROPS)

    async def backup() -> str:
        raise BackupError("no space left")

    message = r"destroys data \(ALTER TABLE member_preferences DROP COLUMN extra\).*no space left.*--no-backup"
    with pytest.raises(MigrationError, match=message):
        await admin.upgrade(database, backup=backup, options=options)
    with pytest.raises(MigrationError, match=message):
        await migrations.prepare_schema(database, auto_migrate=True, backup=backup, options=options)
    assert await migrations.current(database) == HEAD
    await admin.upgrade(database, backup=None, options=options)
    assert await migrations.current(database) == EXTRA


@pytest.mark.slow
@pytest.mark.direct("pg_dump needs a direct connection")
async def test_the_backup_can_be_found_by_its_reason(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    settings = make_settings(tmp_path / "data")
    backup = backup_before("before upgrade", settings, database)
    outcome = await admin.upgrade(database, backup=backup, options=with_revision(tmp_path, DROPS))
    (entry,) = await BackupCatalog(settings).entries()
    assert entry.manifest is not None
    assert (entry.id, entry.manifest.reason) == (outcome.data["backup"], "before upgrade")
    assert (entry.manifest.is_safety_copy, entry.manifest.rows["public.members"]) == (True, 3_000)


@pytest.mark.slow
@pytest.mark.direct("pg_dump needs a direct connection")
async def test_starts_that_fail_again_make_one_backup(tmp_path: Path, database: Pool) -> None:
    await fill(database)
    settings = make_settings(tmp_path / "data")
    backup = backup_before("before upgrade", settings, database, reuse=timedelta(days=1))
    options = with_revision(tmp_path, "def upgrade():\n    raise ValueError('boom')\n")
    for _ in range(3):
        with pytest.raises(MigrationError, match="boom"):
            await migrations.prepare_schema(database, auto_migrate=True, backup=backup, options=options)
    first = await BackupCatalog(settings).entries()
    assert len(first) == 1
    await database.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'x', 'y', '1')")
    assert await backup() not in {entry.id for entry in first}  # what is new is in no backup yet
    again = backup_before("before upgrade", settings, database)
    assert len({await backup(), await backup(), await again()}) == 2


def test_a_table_that_a_later_revision_drops_belongs_to_older_databases(tmp_path: Path) -> None:
    create = "def upgrade():\n    op.create_table('scores', sa.Column('id', sa.Integer))\n"
    scripts = with_revision(tmp_path, create).scripts
    (scripts / "versions" / "9001_drop.py").write_text(
        f"revision = '9001'\ndown_revision = '{EXTRA}'\n\n\ndef upgrade():\n    op.drop_table('scores')\n"
    )
    assert (None, "scores") not in ownership.owned_tables(scripts)
    assert (None, "scores") in ownership.tables_at([EXTRA], scripts)
    assert (None, "scores") not in ownership.tables_at(["9001"], scripts)
    assert (None, "scores") not in ownership.tables_at([HEAD], scripts)
    assert (None, "members") in ownership.tables_at([HEAD], scripts)
    assert ownership.tables_at(["nowhere"], scripts) == frozenset()


async def test_a_file_that_destroys_data_says_that_nothing_backs_it_up(tmp_path: Path, database: Pool) -> None:
    down = await preview(database, "0003", down=True)
    up = await preview(database, options=with_revision(tmp_path, ADDS))
    assert down.file is not None
    assert up.file is not None
    notice = "-- It destroys data. Nothing backs the database up"
    assert (notice in down.file[1], notice in up.file[1]) == (True, False)

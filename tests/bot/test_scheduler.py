"""Scheduled work: backups, restore drills, size samples, the first import; and the restore suggestion at the start."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from simulator import Simulator
from tests.bot.running import TIMEOUT, BotProcess, running_bot
from tests.operations.backup.helpers import (
    EVERYONE,
    GUILD,
    execute,
    fill,
    make_backup,
    make_service,
    make_settings,
    open_pool,
)
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.bot.scheduler import Scheduler
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError
from utils.operations import migrations
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.backup.service import BackupService
from utils.service import metrics


def scheduler_in(
    directory: Path,
    pool: Pool,
    backup_every: str | None,
    *,
    retry_delay: float = 300.0,
    notify: Any = None,
    **values: Any,
) -> Scheduler:
    """Return a scheduler that begins at once; values are further settings."""
    settings = make_settings(directory, backup_every=backup_every, **values)
    options = {} if notify is None else {"notify": notify}
    return Scheduler(settings, pool, start_delay=0.0, retry_delay=retry_delay, **options)


async def recorded_results(pool: Pool, *commands: str) -> list[str]:
    """Wait until these commands are in the audit log, and return all results in it."""

    async def results() -> list[str] | None:
        rows = await pool.fetch("SELECT command, result FROM ops.admin_actions ORDER BY id")
        has_all = {row["command"] for row in rows} >= set(commands)
        return [row["result"] for row in rows] if has_all else None

    return await until(results, TIMEOUT) or []


async def test_runs_backups_drills_imports_and_size_samples(
    tmp_path: Path, database: Pool, simulator: Simulator
) -> None:
    def run_at_once(bot: Guildbook) -> None:
        bot.scheduler.start_delay = 0.0
        bot.scheduler.retry_delay = 0.1  # the first drill fails, because there is no backup yet

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "shop.json").write_text(json.dumps({"hat": {"price": 3}}))
    settings: dict[str, Any] = {"backup_every": "5m", "drill_every": "1d", "import_json": tmp_path / "old"}
    async with running_bot(
        database, simulator, extensions=(), configure=run_at_once, data_dir=tmp_path / "data", **settings
    ):
        results = await recorded_results(database, "backup create", "backup drill", "import")
    assert any("was restored completely" in result for result in results)
    assert await database.fetchval("SELECT count(*) FROM documents WHERE namespace = 'legacy.shop'") == 1
    assert await database.fetchval("SELECT count(DISTINCT table_name) FROM ops.table_sizes") > 10
    assert "guildbook_drill_ok 1.0" in metrics.render().decode()
    assert "scheduled" in (await make_service(tmp_path / "data").catalog.find("latest")).line


async def test_deletes_old_rows_of_the_audit_log(tmp_path: Path, database: Pool) -> None:
    await database.execute(
        "INSERT INTO ops.admin_actions (at, command, result) VALUES (now() - interval '401 days', 'old', ''),"
        " (now() - interval '401 days', 'begin anew', ''), (now(), 'new', '')"
    )
    scheduler = scheduler_in(tmp_path, database, None)
    scheduler.start()
    try:
        rows = "SELECT array_agg(command ORDER BY command) FROM ops.admin_actions"
        await until(lambda: database.fetchval(f"SELECT ({rows}) = ARRAY['begin anew', 'new']"))
    finally:
        await scheduler.stop(5)


MADE = """
INSERT INTO ops.admin_actions (at, command, arguments, result)
VALUES (clock_timestamp() - $1::interval, 'backup create', '{"by": "the bot itself", "backup": "x"}', 'backup x')
"""


async def test_makes_no_backup_while_the_last_one_is_recent(tmp_path: Path, database: Pool) -> None:
    await database.execute(GUILD)
    await database.execute(MADE, timedelta(minutes=4))
    scheduler = scheduler_in(tmp_path, database, "5m")
    assert 240 <= (await scheduler._seconds_since_backup() or -1) < 300
    scheduler.start()
    try:
        # Starts at the same time and takes longer than reading when the last backup was made.
        await until(lambda: database.fetchval("SELECT count(*) FROM ops.table_sizes"))
    finally:
        await scheduler.stop(5)
    assert await make_service(tmp_path).catalog.entries() == []


@pytest.mark.parametrize("age", [timedelta(hours=1), timedelta(days=-400)], ids=["is due", "clock was set back"])
async def test_makes_a_backup_by_what_it_did_last(tmp_path: Path, database: Pool, age: timedelta) -> None:
    """And not by the dates of backups, of which one in the future would stop the schedule."""
    await database.execute(GUILD)
    future = make_service(tmp_path)
    backup = await make_backup(future, database)
    moved = replace(backup, created_at="2029-01-01T00:00:00.000+00:00")
    await future.catalog.local.write(f"{backup.id}.json", moved.serialize())
    await database.execute(MADE, age)
    scheduler = scheduler_in(tmp_path, database, "5m")
    scheduler.start()
    try:
        await until(lambda: database.fetchval("SELECT count(*) > 1 FROM ops.admin_actions"))
    finally:
        await scheduler.stop(5)
    assert len(await future.catalog.entries()) == 2


async def test_an_empty_database_gets_no_scheduled_backup(tmp_path: Path, database: Pool) -> None:
    scheduler = scheduler_in(tmp_path, database, "5m")
    await scheduler._back_up()
    assert await make_service(tmp_path).catalog.entries() == []
    assert (await make_backup(make_service(tmp_path), database)).kind == "empty"
    with pytest.raises(BackupError, match=r"there is no full backup .*\(empty\)"):
        await make_service(tmp_path).catalog.find("latest")


async def test_operators_are_told_once_of_a_drop_and_nothing_is_deleted(tmp_path: Path, database: Pool) -> None:
    told: list[str] = []

    async def notify(text: str) -> None:
        told.append(text)

    settings = {"backup_keep": 1, "backup_keep_daily": 0, "backup_keep_weekly": 0, "backup_keep_monthly": 0}
    scheduler = scheduler_in(tmp_path, database, "5m", notify=notify, **settings)
    await fill(database)
    await scheduler._back_up()
    await database.execute("DELETE FROM guilds WHERE id > 1")
    for _ in range(2):
        await scheduler._back_up()
        await scheduler._prune()
    assert len(await make_service(tmp_path).catalog.entries()) == 3
    assert [("has 1 guild instead of 20" in line, "backup accept" in line) for line in told] == [(True, True)]
    assert metrics.backups_paused._value.get() == 1
    assert (await BackupService(scheduler._settings, catalog=make_service(tmp_path).catalog).accept()).ok
    await scheduler._prune()
    [entry] = await make_service(tmp_path).catalog.entries()
    assert entry.is_accepted
    assert metrics.backups_paused._value.get() == 0


async def test_what_could_not_be_uploaded_is_uploaded_later(tmp_path: Path, database: Pool) -> None:
    (tmp_path / "remote").write_text("a file where the directory should be")
    scheduler = scheduler_in(tmp_path, database, "5m", backup_url=(tmp_path / "remote").as_uri())
    await database.execute(GUILD)
    await scheduler._back_up()
    assert await database.fetchval("SELECT result FROM ops.admin_actions") != ""
    assert await scheduler._seconds_since_backup() is not None, "the backup is made"
    (tmp_path / "remote").unlink()
    await scheduler._push()
    [entry] = await BackupCatalog(scheduler._settings, identity=EVERYONE).entries()
    assert len(entry.places) == 2
    await scheduler._push()
    pushed = await database.fetch("SELECT result FROM ops.admin_actions WHERE command = 'backup push'")
    assert [row["result"].endswith(entry.id) for row in pushed] == [True]


async def test_failed_backup_is_recorded_counted_and_retried(
    tmp_path: Path, database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    await database.execute(GUILD)
    (tmp_path / "backups").write_text("a file where the directory should be")
    before = metrics.duty_failures.labels("backup")._value.get()
    scheduler = scheduler_in(tmp_path, database, "1h", retry_delay=1.0)
    scheduler.start()
    try:
        results = await recorded_results(database, "backup create")
        assert results[0].startswith("Failed: ")
        (tmp_path / "backups").unlink()
        await until(make_service(tmp_path).catalog.newest)
    finally:
        await scheduler.stop(5)
    assert metrics.duty_failures.labels("backup")._value.get() > before
    assert "backup create failed" in caplog.text


async def test_start_on_a_lost_database_suggests_the_backup_to_restore(
    tmp_path: Path, database: Pool, empty_target: ConnectTarget, simulator: Simulator
) -> None:
    service = make_service(tmp_path / "data")
    await migrations.upgrade(empty_target)
    async with open_pool(empty_target) as pool:
        await fill(pool)
        backup = await make_backup(service, pool)
    id = backup.id
    former = replace(backup, application_id=None, host=None, ordered_at=None)  # as 0.1.0 made them
    await service.catalog.local.write(f"{id}.json", former.serialize())
    await execute(empty_target, "DROP SCHEMA ops CASCADE", "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    settings = {
        "DISCORD_TOKEN": simulator.token,
        "DISCORD_API_BASE": simulator.api_base,
        "DATABASE_URL": empty_target.libpq_url(),
        "DATA_DIR": str(tmp_path / "data"),
    }
    async with BotProcess(tmp_path, **settings) as bot:
        await bot.wait_for_output(f"python bot.py backup restore {id}")
        await bot.wait_until_ready()

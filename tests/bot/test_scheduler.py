"""Scheduled work: backups, restore drills, size samples, the first import; and the restore suggestion at the start."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from simulator import Simulator
from tests.bot.running import TIMEOUT, BotProcess, running_bot
from tests.operations.backup.helpers import fill, make_backup, make_service
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.bot.scheduler import Scheduler
from utils.database import ConnectTarget, Pool
from utils.service import metrics
from utils.settings import Settings


def scheduler_in(directory: Path, pool: Pool, backup_every: str | None, **options: Any) -> Scheduler:
    settings = Settings(_env_file=None, data_dir=directory, backup_every=backup_every)  # type: ignore[call-arg, arg-type]
    return Scheduler(settings, pool, start_delay=0.0, **options)


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


async def test_makes_no_backup_while_the_newest_is_recent(tmp_path: Path, database: Pool) -> None:
    backups = make_service(tmp_path)
    await make_backup(backups, database)
    scheduler = scheduler_in(tmp_path, database, "5m")
    assert 0 <= (await scheduler._seconds_since_backup() or -1) < 60
    scheduler.start()
    try:
        # Starts at the same time and takes longer than reading the newest backup's age.
        await until(lambda: database.fetchval("SELECT count(*) FROM ops.table_sizes"))
    finally:
        await scheduler.stop(5)
    assert len(await backups.catalog.entries()) == 1


async def test_makes_a_backup_when_the_newest_is_old(tmp_path: Path, database: Pool) -> None:
    backups = make_service(tmp_path)
    await make_backup(backups, database)
    scheduler = scheduler_in(tmp_path, database, "5m", clock=lambda: datetime.now(UTC) + timedelta(hours=1))
    scheduler.start()
    try:
        await recorded_results(database, "backup create")
    finally:
        await scheduler.stop(5)
    assert len(await backups.catalog.entries()) == 2


async def test_failed_backup_is_recorded_counted_and_retried(
    tmp_path: Path, database: Pool, caplog: pytest.LogCaptureFixture
) -> None:
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
    await fill(database)
    id = (await make_backup(make_service(tmp_path / "data"), database)).id
    settings = {
        "DISCORD_TOKEN": simulator.token,
        "DISCORD_API_BASE": simulator.api_base,
        "DATABASE_URL": empty_target.libpq_url(),
        "DATA_DIR": str(tmp_path / "data"),
    }
    async with BotProcess(tmp_path, **settings) as bot:
        await bot.wait_for_output(f"python bot.py backup restore {id}")
        await bot.wait_until_ready()

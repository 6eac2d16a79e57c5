"""What the bot does by itself: backups and drills in time, the first import, sizes, and a word of a lost database."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from simulator import Simulator
from tests.bot.running import BotProcess, running
from tests.operations.backup.making import filled, vault_in
from tests.waiting import until
from utils.bot import scheduler
from utils.bot.scheduler import Scheduler
from utils.database import ConnectTarget, Pool
from utils.operations.backup.create import Wanted
from utils.service import metrics
from utils.settings import Settings


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "START_SECONDS", 0.0)


async def until_written(database: Pool, *commands: str) -> list[str]:
    """Wait until these commands stand in the books, and return their results."""
    async with asyncio.timeout(40):
        while True:
            rows = await database.fetch("SELECT command, result FROM ops.admin_actions ORDER BY id")
            if {row["command"] for row in rows} >= set(commands):
                return [row["result"] for row in rows]
            await asyncio.sleep(0.02)


async def test_the_bot_backs_up_drills_imports_and_notes_sizes(
    tmp_path: Path, database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "shop.json").write_text(json.dumps({"hat": {"price": 3}}))
    settings: dict[str, Any] = {"backup_every": "5m", "drill_every": "1d", "import_json": tmp_path / "old"}
    monkeypatch.setattr(scheduler, "AGAIN_SECONDS", 0.1)  # the drill comes round before there is a backup
    async with running(database, simulator, monkeypatch, extensions=(), data_dir=tmp_path / "data", **settings):
        results = await until_written(database, "backup create", "backup drill", "import")
    assert any("came back whole" in result for result in results)
    assert await database.fetchval("SELECT count(*) FROM documents WHERE namespace = 'legacy.shop'") == 1
    assert await database.fetchval("SELECT count(DISTINCT table_name) FROM ops.table_sizes") > 10
    assert "guildbook_drill_ok 1.0" in metrics.render().decode()
    assert "scheduled" in (await vault_in(tmp_path / "data").find("latest")).line


async def test_a_backup_that_is_young_enough_is_not_made_again_and_an_old_one_is(
    tmp_path: Path, database: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = vault_in(tmp_path)
    await vault.make(database, Wanted())
    one = Scheduler(Settings(_env_file=None, data_dir=tmp_path, backup_every="5m"), database)  # type: ignore[call-arg, arg-type]
    assert 0 <= (await one._since_backup() or -1) < 60
    one.start()
    try:
        await until_sampled(database)  # which begins at the same time, and takes longer than to see that it is young
    finally:
        await one.stop(5)
    assert len(await vault.known()) == 1
    real = scheduler._since
    monkeypatch.setattr(scheduler, "_since", lambda moment: real(moment - timedelta(hours=1)))
    one.start()
    try:
        await until_written(database, "backup create")
    finally:
        await one.stop(5)
    assert len(await vault.known()) == 2


async def until_sampled(database: Pool) -> None:
    await until(lambda: database.fetchval("SELECT count(*) FROM ops.table_sizes"))


async def test_a_backup_that_fails_is_told_counted_and_tried_again(
    tmp_path: Path, database: Pool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backups").write_text("in the way")
    monkeypatch.setattr(scheduler, "AGAIN_SECONDS", 1.0)
    before = metrics.duty_failures.labels("backup")._value.get()
    one = Scheduler(Settings(_env_file=None, data_dir=tmp_path, backup_every="1h"), database)  # type: ignore[call-arg, arg-type]
    one.start()
    try:
        results = await until_written(database, "backup create")
        assert results[0].startswith("Failed: ")
        (tmp_path / "backups").unlink()
        await until(vault_in(tmp_path).newest)
    finally:
        await one.stop(5)
    assert metrics.duty_failures.labels("backup")._value.get() > before
    assert "cannot" in caplog.text


async def test_a_start_on_a_lost_database_says_which_backup_would_bring_it_back(
    tmp_path: Path, database: Pool, empty_target: ConnectTarget, simulator: Simulator
) -> None:
    await filled(database)
    id = (await vault_in(tmp_path / "data").make(database, Wanted())).id
    settings = {
        "DISCORD_TOKEN": simulator.token,
        "DISCORD_API_BASE": simulator.api_base,
        "DATABASE_URL": empty_target.libpq_url(),
        "DATA_DIR": str(tmp_path / "data"),
    }
    async with BotProcess(tmp_path, **settings) as bot:
        await bot.until_it_says(f"python bot.py backup restore {id} brings it back")
        await bot.ready()

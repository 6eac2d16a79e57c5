"""Two populated schemas of other programs, with views and foreign keys onto our tables, stay byte for byte the same."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import cloned
from tests.operations.migrations.support import HEAD, KNOWN, with_revision
from tests.worlds import foreign
from tests.worlds.worlds import run
from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError
from utils.operations import migrations
from utils.operations.backup.service import BackupService
from utils.operations.development import seed
from utils.operations.migrations import admin
from utils.operations.migrations.writing import write_revision
from utils.operations.upkeep.maintain import maintain
from utils.settings import Settings

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Shared:
    """A database of ours that two other programs use."""

    server: EmbeddedServer
    target: ConnectTarget
    pool: Pool
    before: list[str]

    async def difference(self) -> list[str]:
        """Return the lines about the other programs' objects that are not as at first."""
        now = await foreign.describe(self.server, self.target)
        return [line for line in self.before + now if self.before.count(line) != now.count(line)]


@pytest.fixture
async def shared(server: EmbeddedServer, template: str) -> AsyncIterator[Shared]:
    async with cloned(server, template) as target:
        await run(target, foreign.OUR_ROWS, foreign.CREATE, foreign.REFER_TO_OURS)
        pool = Pool(target, pool_max=4, connect_timeout=10)
        await pool.connect()
        yield Shared(server, target, pool, await foreign.describe(server, target))
        await pool.close()


async def test_downgrade_and_upgrade(shared: Shared) -> None:
    await admin.downgrade(shared.pool, KNOWN[1], backup=None)
    assert await shared.difference() == []
    await admin.upgrade(shared.pool)
    status = await admin.status(shared.pool)
    assert status.ok, status.text
    assert await shared.difference() == []


async def test_downgrade_to_base_is_refused(shared: Shared) -> None:
    with pytest.raises(GuildbookError, match=r"economy\.|moderation\.|legacy_") as caught:
        await admin.downgrade(shared.pool, "base", backup=None)
    assert "\n" not in str(caught.value)
    assert await shared.difference() == []
    assert await shared.pool.fetchval("SELECT count(*) FROM members") == 200
    await admin.upgrade(shared.pool)
    assert await shared.difference() == []


async def test_autogenerate(shared: Shared, tmp_path: Path) -> None:
    options = with_revision(tmp_path, "def upgrade():\n    pass")
    next((options.scripts / "versions").glob("9000_*.py")).unlink()
    assert await write_revision(shared.target, "nothing", options=options) is None
    assert await migrations.check_drift(shared.target, scripts=options.scripts) == []
    assert await shared.difference() == []


async def test_reset_is_refused(shared: Shared) -> None:
    with pytest.raises(GuildbookError, match=r"economy\.|moderation\.|legacy_") as caught:
        await seed.reset(shared.pool, name=None, environment="development", backup=None)
    assert "\n" not in str(caught.value)
    assert await shared.difference() == []
    assert await shared.pool.fetchval("SELECT count(*) FROM members") == 200


async def test_reset_without_references(server: EmbeddedServer, template: str) -> None:
    async with cloned(server, template) as target:
        await run(target, foreign.OUR_ROWS, foreign.CREATE)
        before = await foreign.describe(server, target)
        pool = Pool(target, pool_max=4, connect_timeout=10)
        await pool.connect()
        await seed.reset(pool, name=None, environment="development", backup=None)
        assert await migrations.current(pool) == HEAD
        assert await pool.fetchval("SELECT count(*) FROM members") == 0
        await pool.close()
        assert await foreign.describe(server, target) == before


async def test_an_invalid_index_beside_our_tables_stays(shared: Shared) -> None:
    await run(
        shared.target, "CREATE INDEX their_index ON legacy_bans (user_id)",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'their_index'::regclass",
    )  # fmt: skip
    assert (await admin.status(shared.pool)).ok
    await admin.upgrade(shared.pool)
    assert await shared.pool.fetchval("SELECT to_regclass('their_index') IS NOT NULL")


async def test_maintain(shared: Shared) -> None:
    outcome = await maintain(shared.pool)
    assert outcome.ok, outcome.text
    for schema in foreign.SCHEMAS:
        assert schema not in outcome.text
    assert await shared.difference() == []


async def test_backup_drill_and_restore(shared: Shared, tmp_path: Path) -> None:
    """The rows that foreign keys point to are changed and removed since the backup, and come back."""
    service = BackupService(Settings(_env_file=None, data_dir=tmp_path))  # type: ignore[call-arg]
    created = await service.create(shared.pool)
    assert await shared.difference() == []
    await shared.pool.execute(
        "UPDATE members SET nick = 'since', stamp = stamp + 1; UPDATE guilds SET name = 'since', stamp = stamp + 1"
    )
    drilled = await service.drill(shared.pool)
    assert drilled.ok, drilled.text
    assert await shared.difference() == []
    restored = await service.restore(shared.pool, created.data["id"])
    assert restored.ok, restored.text
    assert await shared.difference() == []
    assert await shared.pool.fetchval("SELECT count(*) FROM members WHERE nick LIKE 'nick %'") == 200
    assert await shared.pool.fetchval("SELECT name FROM guilds") == "Shared"


async def test_a_restore_that_would_change_their_rows_is_refused(shared: Shared, tmp_path: Path) -> None:
    """A member whom the backup does not have is referred to by a key ON DELETE CASCADE."""
    service = BackupService(Settings(_env_file=None, data_dir=tmp_path))  # type: ignore[call-arg]
    created = await service.create(shared.pool)
    await shared.pool.execute("INSERT INTO members (guild_id, user_id) VALUES (1, 999)")
    await run(shared.target, "INSERT INTO economy.accounts (guild_id, user_id, balance) VALUES (1, 999, 5)")
    before = await foreign.describe(shared.server, shared.target)
    with pytest.raises(GuildbookError, match="economy") as caught:
        await service.restore(shared.pool, created.data["id"])
    assert "\n" not in str(caught.value)
    assert await foreign.describe(shared.server, shared.target) == before
    assert await shared.pool.fetchval("SELECT count(*) FROM members") == 201

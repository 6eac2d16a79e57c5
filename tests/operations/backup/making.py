"""What the tests of making backups share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.database import Pool
from utils.operations.backup.service import BackupService
from utils.settings import Settings

ROWS = """
INSERT INTO guilds (id, name) SELECT n, 'guild ' || n FROM generate_series(1, 20) AS n;
INSERT INTO users (id, username) SELECT n, 'user ' || n FROM generate_series(1, 3000) AS n;
INSERT INTO members (guild_id, user_id, nick, roles)
    SELECT n % 20 + 1, n, md5(n::text), ARRAY[n] FROM generate_series(1, 3000) AS n;
INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '{"c": 1}');
INSERT INTO ops.suppressions (user_id) VALUES (99);
"""


def settings_for(directory: Path, **given: Any) -> Settings:
    """Return settings whose backups are under a directory."""
    return Settings(_env_file=None, **{"data_dir": directory, **given})  # type: ignore[call-arg]


def vault_in(directory: Path, **given: Any) -> BackupService:
    """Return the backups under a directory."""
    return BackupService(settings_for(directory, **given))


async def filled(database: Pool) -> None:
    """Write rows that are worth a backup."""
    async with database.acquire() as connection:
        await connection.execute(ROWS)

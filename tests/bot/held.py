"""A bot process on a database that tests drop under it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from simulator import Simulator
from tests.bot.running import BotProcess, run_cli
from tests.mirror.restoring import Droppable
from tests.operations.backup.helpers import make_service
from utils.database import Pool
from utils.operations.backup.archive.manifest import Manifest
from utils.operations.backup.catalog import BackupCatalog

#: The template of a database without tables.
BARE = "template1"


class Held:
    """A bot process on a database that can be dropped, and its commands."""

    def __init__(self, directory: Path, simulator: Simulator, database: Droppable, **settings: str) -> None:
        self.directory = directory
        self.simulator = simulator
        self.database = database
        self.settings = {
            "DISCORD_TOKEN": simulator.token,
            "DISCORD_API_BASE": simulator.api_base,
            "DATABASE_URL": database.pool.target.libpq_url(),
            "DATA_DIR": str(directory / "data"),
            "FLUSH_SECONDS": "0.1",
            **settings,
        }
        self.bot = BotProcess(directory, **self.settings)

    @property
    def pool(self) -> Pool:
        return self.database.pool

    @property
    def catalog(self) -> BackupCatalog:
        return make_service(self.directory / "data").catalog

    async def cli(self, *arguments: str) -> tuple[int, str]:
        """Run a command on the bot's database."""
        return await run_cli(self.directory, *arguments, **self.settings)

    async def back_up(self) -> Manifest:
        """Make a backup with the command line."""
        code, output = await self.cli("backup", "create")
        assert code == 0, output
        manifest = await self.catalog.newest()
        assert manifest is not None
        return manifest

    async def readiness(self) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of GET /readyz."""
        status, body = await self.bot.get("/readyz")
        return status, body or {}

    async def is_held(self) -> bool:
        status, body = await self.readiness()
        return status == 503 and body["state"] == "held"

    async def stop(self) -> None:
        self.bot.send_signal(signal.SIGTERM)
        assert await self.bot.wait_for_exit() == 0, self.bot.output

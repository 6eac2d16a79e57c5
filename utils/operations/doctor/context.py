"""What the checks examine: the settings as far as they are valid, and the database if it can be reached."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.database import ConnectTarget, Pool
from utils.database.address import open_target
from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError, SettingsError
from utils.logs import redact
from utils.operations.doctor.report import CheckSkipped
from utils.settings import TARGET_VARIABLES, Settings, load_settings
from utils.tasks import run_in_daemon_thread

if TYPE_CHECKING:
    from utils.operations.backup.catalog import BackupCatalog

#: Seconds for connecting to the database, and for starting the embedded server.
CONNECT_SECONDS, START_SECONDS = 5.0, 30.0
#: Hosts of Neon, whose databases sleep, and how long one may take to answer, in seconds.
NEON_SUFFIX, NEON_SECONDS = ".neon.tech", 15.0
#: Connections: several checks at once, and the audit log.
CONNECTIONS = 3


class DoctorContext:
    """Gives the checks access to settings and database.

    Parameters
    ----------
    env_file: read after the environment; None for none.
    data_dir: use the embedded server's data there, whatever the settings say.
    environ: the environment whose variable names are checked.
    """

    #: Whether the running bot checks itself.
    is_bot = False

    def __init__(
        self,
        *,
        env_file: str | Path | None = ".env",
        data_dir: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.env_file: str | Path | None = env_file
        self.environ: Mapping[str, str] = environ
        #: One line for each invalid setting.
        self.settings_errors: list[str] = []
        self._invalid: Sequence[str] = ()
        self._settings: Settings | None = None
        self._data_dir = data_dir
        self._catalog: BackupCatalog | None = None
        self._pool: Pool | None = None
        self._resources = contextlib.AsyncExitStack()
        self._connecting: asyncio.Task[Pool] | None = None
        self._load_settings()

    # --- the settings

    @property
    def settings(self) -> Settings:
        """The settings, with defaults for invalid ones. Raises `CheckSkipped` when none can be read."""
        if self._settings is None:
            raise CheckSkipped("the settings cannot be read")
        return self._settings

    def require(self, *variables: str) -> None:
        """Raise `CheckSkipped` when one of these variables is invalid, or the settings cannot be read at all."""
        _ = self.settings
        for variable in variables:
            if variable in self._invalid:
                raise CheckSkipped(f"{variable} is invalid")

    def _load_settings(self) -> None:
        try:
            self._settings = load_settings(self.env_file)
        except SettingsError as exc:
            self.settings_errors = str(exc).splitlines()
            self._invalid = exc.variables
            self._settings = self._load_valid_settings()

    def _load_valid_settings(self) -> Settings | None:
        """Return the settings with defaults for the invalid ones; None if that is not possible."""
        defaults: dict[str, Any] = {}
        for name in map(str.lower, self._invalid):
            if name not in Settings.model_fields:
                return None
            defaults[name] = Settings.model_fields[name].get_default(call_default_factory=True)
        try:
            return Settings(_env_file=self.env_file, **defaults) if defaults else None  # type: ignore[call-arg]
        except (ValueError, OSError):
            return None

    def redact(self, text: str) -> str:
        """Return a text without the secrets of the settings."""
        secrets: list[str] = []
        with contextlib.suppress(GuildbookError, CheckSkipped):
            secrets = self.settings.secrets()
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            text = text.replace(secret, "***")
        return redact(text)

    def cog_problems(self) -> list[str] | None:
        """Return what of the cogs does not work, one line each; None if they are not looked at."""
        return None

    def cog_intents(self) -> dict[str, list[str]]:
        """Return the cogs that declare each privileged intent, where no bot runs that says so itself."""
        return {}

    # --- backups

    def catalog(self) -> BackupCatalog:
        """Return the catalog of backups, the same for all checks. Raises `BackupError` or `CheckSkipped`."""
        from utils.operations.backup.catalog import BackupCatalog

        self.require("BACKUP_URL", "DATA_DIR", "RAILWAY_VOLUME_MOUNT_PATH")
        if self._catalog is None:
            self._catalog = BackupCatalog(self.settings.model_copy(update={"data_dir": self.data_dir}))
        return self._catalog

    # --- the database

    def target(self) -> ConnectTarget | None:
        """Return the direct target; None: the embedded server. Raises `CheckSkipped`."""
        self.require(*TARGET_VARIABLES, "RAILWAY_VOLUME_MOUNT_PATH", "DATA_DIR")
        return self.settings.with_data_dir(self._data_dir).direct_target

    @property
    def data_dir(self) -> Path:
        """The directory for persistent files. Raises `CheckSkipped`."""
        self.require("DATA_DIR", "RAILWAY_VOLUME_MOUNT_PATH")
        return self._data_dir or self.settings.data_dir

    async def connect(self) -> Pool:
        """Return a pool on the database, connecting once for all checks. Raises `GuildbookError` or `CheckSkipped`."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="connect")
            self._connecting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._connecting)

    async def pool(self) -> Pool:
        """Return a pool on the database. Raises `CheckSkipped` when it cannot be reached."""
        try:
            return await self.connect()
        except GuildbookError:  # check_database reports it
            raise CheckSkipped("the database cannot be reached") from None

    async def _connect(self) -> Pool:
        target = self.target()
        if target is None and not await run_in_daemon_thread(lambda: EmbeddedServer(self.data_dir).has_data):
            raise CheckSkipped("the embedded database is created by the first start")
        target = await self._resources.enter_async_context(
            open_target(target, self.data_dir, schema=self.settings.db_schema, start_timeout=START_SECONDS)
        )
        is_slow = any(host.endswith(NEON_SUFFIX) for host in target.hosts)
        pool = Pool(
            target,
            pool_min=0,
            pool_max=CONNECTIONS,
            connect_timeout=min(self.settings.db_connect_timeout, NEON_SECONDS if is_slow else CONNECT_SECONDS),
            acquire_timeout=CONNECT_SECONDS,
            command_timeout=10.0,
        )
        await pool.connect()
        self._pool = pool
        return pool

    @property
    def connected_pool(self) -> Pool | None:
        """The pool, if the database was reached."""
        return self._pool

    async def close(self) -> None:
        """Release all resources in bounded time; stop the embedded server if this started it."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting}, timeout=CONNECT_SECONDS)
        if self._pool is not None:
            await self._pool.close(CONNECT_SECONDS)
        with contextlib.suppress(GuildbookError, TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._resources.aclose()

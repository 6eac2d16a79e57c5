"""What is examined: the settings as far as they can be read, and the database as far as it answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.database import ConnectTarget, Pool
from utils.database.embedded import EmbeddedServer, open_target
from utils.exceptions import GuildbookError, SettingsError
from utils.logs import redact
from utils.operations.doctor.report import CheckSkipped, in_thread
from utils.settings import TARGET_VARIABLES, Settings, load_settings

#: Seconds for reaching the database, and for starting the embedded one.
CONNECT_SECONDS, START_SECONDS = 5.0, 30.0
#: Connections: checks that ask at once, and the books.
CONNECTIONS = 3


class DoctorContext:
    """Lends the checks what they look at; `env_file` None: no file. `environ`: the process's own, for the names."""

    def __init__(
        self,
        *,
        env_file: str | Path | None = ".env",
        data_dir: Path | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.env_file: str | Path | None = env_file
        self.environ: Mapping[str, str] = environ
        #: Lines of what is wrong with the settings.
        self.wrong: list[str] = []
        self._data_dir = data_dir
        self._settings: Settings | None = None
        self._database: Pool | None = None
        self._opened = contextlib.AsyncExitStack()
        self._connecting: asyncio.Task[Pool] | None = None
        self._read()

    # --- the settings

    @property
    def settings(self) -> Settings:
        """The settings; defaults stand for those that are wrong. Raises `CheckSkipped` when none can be read."""
        if self._settings is None:
            raise CheckSkipped("the settings cannot be read")
        return self._settings

    def needs(self, *names: str) -> None:
        """Raise `CheckSkipped` when one of these variables is wrong, or the settings cannot be read at all."""
        _ = self.settings
        for line in self.wrong:
            name = line.partition(":")[0]
            if name in names:
                raise CheckSkipped(f"{name} is wrong")

    def _read(self) -> None:
        try:
            self._settings = load_settings(self.env_file)
        except SettingsError as exc:
            self.wrong = str(exc).splitlines()
            self._settings = self._read_the_rest()

    def _read_the_rest(self) -> Settings | None:
        """Return the settings with defaults for the wrong ones; None when that does not help."""
        instead: dict[str, Any] = {}
        for line in self.wrong:
            name = line.partition(":")[0].lower()
            if name not in Settings.model_fields:
                return None
            instead[name] = Settings.model_fields[name].get_default(call_default_factory=True)
        try:
            return Settings(_env_file=self.env_file, **instead)  # type: ignore[call-arg]
        except (ValueError, OSError):
            return None

    def hidden(self, text: str) -> str:
        """Return a text without any secret of the settings."""
        secrets: list[str] = []
        with contextlib.suppress(GuildbookError, CheckSkipped):
            secrets = self.settings.secrets()
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            text = text.replace(secret, "***")
        return redact(text)

    # --- the database

    def target(self) -> ConnectTarget | None:
        """Return where the database is; None: it is the embedded one. Raises `CheckSkipped`."""
        self.needs(*TARGET_VARIABLES, "RAILWAY_VOLUME_MOUNT_PATH", "DATA_DIR")
        return self.settings.with_data_dir(self._data_dir).direct_target

    @property
    def data_dir(self) -> Path:
        """Where files that have to last are. Raises `CheckSkipped`."""
        self.needs("DATA_DIR", "RAILWAY_VOLUME_MOUNT_PATH")
        return self._data_dir or self.settings.data_dir

    async def connect(self) -> Pool:
        """Return a pool on the database, or raise why there is none: `GuildbookError` or `CheckSkipped`."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect(), name="connect")
            self._connecting.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._connecting)

    async def database(self) -> Pool:
        """Return a pool on the database. Raises `CheckSkipped` when it is not reached, which one check reports."""
        try:
            return await self.connect()
        except GuildbookError:
            raise CheckSkipped("the database is not reached") from None

    async def _connect(self) -> Pool:
        target = self.target()
        if target is None and not await in_thread(lambda: EmbeddedServer(self.data_dir).has_data):
            raise CheckSkipped("the embedded database is created by the first start")
        target = await self._opened.enter_async_context(open_target(target, self.data_dir, start_timeout=START_SECONDS))
        database = Pool(
            target, pool_min=0, pool_max=CONNECTIONS, connect_timeout=CONNECT_SECONDS, acquire_timeout=CONNECT_SECONDS,
            command_timeout=10.0,
        )  # fmt: skip
        await database.connect()
        self._database = database
        return database

    @property
    def connected(self) -> Pool | None:
        """The pool, when the database was reached."""
        return self._database

    async def close(self) -> None:
        """Let everything go, in bounded time; an embedded server that we started stops."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting}, timeout=CONNECT_SECONDS)
        if self._database is not None:
            await self._database.close(CONNECT_SECONDS)
        with contextlib.suppress(GuildbookError, TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._opened.aclose()

"""The demo's bot, `python bot.py` in its own process, and its data directory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import aiohttp

from utils.database.embedded import EmbeddedServer
from utils.exceptions import GuildbookError, SettingsError
from utils.settings import variables

ENTRY = Path(__file__).resolve().parents[2] / "bot.py"
#: The lock file marks a directory as created by a demo; no other directory is ever cleared.
LOCK_FILE = "demo.lock"
STOP_SECONDS = 30.0


class DataDirectory:
    """The data directory of a demo, locked against other demos."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path.expanduser().resolve()
        self.log: Path = self.path / "bot.log"
        self.pid_file: Path = self.path / "bot.pid"
        self.server: EmbeddedServer = EmbeddedServer(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory. Raises `SettingsError` if a demo did not create it, or another demo is using it."""
        lock_file = self.path / LOCK_FILE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not lock_file.exists() and any(self.path.iterdir()):
                raise SettingsError(
                    f"--data-dir: {self.path} contains files that no demo created: choose a new directory"
                )
            handle = lock_file.open("a")
        except OSError as exc:
            raise SettingsError(f"--data-dir: {self.path} cannot be used: {exc.strerror}") from exc
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SettingsError(
                    f"--data-dir: another demo is using {self.path}: stop it or choose another directory"
                ) from None
            yield

    async def clear(self) -> None:
        """Delete an earlier demo's data, and end its processes if it was killed."""
        await asyncio.to_thread(self._end_orphaned_bot)
        if (self.server.cluster / "postmaster.pid").exists():
            with contextlib.suppress(GuildbookError):  # a server that cannot be started is not running
                await self.server.start()
                await self.server.stop(force=True)
        await asyncio.to_thread(self._delete_files)

    def _delete_files(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK_FILE:
                entry.unlink()

    def _end_orphaned_bot(self) -> None:
        import psutil

        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int(self.pid_file.read_text()))
            if Path(process.cwd()) == self.path and str(ENTRY) in process.cmdline():
                process.terminate()
                _, alive = psutil.wait_procs([process], timeout=STOP_SECONDS)
                for survivor in alive:
                    survivor.kill()


class BotProcess:
    """The process of the bot."""

    def __init__(self, directory: DataDirectory) -> None:
        self.directory: DataDirectory = directory
        self.port: int = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] | None = None

    async def start(self, api_base: str, token: str) -> None:
        """Start `python bot.py` with the demo's data directory and the simulated Discord."""
        self._log = self.directory.log.open("ab")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ENTRY),
            cwd=self.directory.path,  # without a .env file
            env=environment(
                DISCORD_API_BASE=api_base,
                DISCORD_TOKEN=token,
                DATA_DIR=str(self.directory.path),
                HEALTH_HOST="127.0.0.1",
                HEALTH_PORT=str(self.port),
                LOG_FORMAT="json",
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach only the demo, which then stops the bot
        )
        self.directory.pid_file.write_text(str(self._process.pid))

    @property
    def returncode(self) -> int | None:
        """The exit code; None while the bot runs."""
        return None if self._process is None else self._process.returncode

    async def readiness(self, session: aiohttp.ClientSession) -> dict[str, Any] | None:
        """Return the response of GET /readyz, None if there is none yet. Raises `GuildbookError` if the bot exited."""
        if self.returncode is not None:
            raise GuildbookError(f"the bot exited early with exit code {self.returncode}:\n{self.log_tail()}")
        try:
            async with session.get(f"http://127.0.0.1:{self.port}/readyz") as response:
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError):
            return None

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of the bot's log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.directory.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    async def stop(self) -> int:
        """Stop the bot with SIGTERM and return its exit code, which is negative if it had to be killed."""
        process = self._process
        if process is None:
            return 0
        try:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
                try:
                    async with asyncio.timeout(STOP_SECONDS):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()
        finally:
            if self._log is not None:
                self._log.close()
        assert process.returncode is not None
        return process.returncode


def environment(**settings: str) -> dict[str, str]:
    """Return this process's environment with these settings and without the operator's own."""
    own_variables = {*variables(), "PGSERVICE", "PGSERVICEFILE", "PGOPTIONS", "PGPASSFILE", "PGHOSTADDR"}
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name.upper() not in own_variables and not name.upper().startswith("RAILWAY_")
    }
    return inherited | settings


def free_port() -> int:
    """Return a TCP port that is currently free."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port

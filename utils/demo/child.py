"""The bot of the demo: `python bot.py` in a process of its own, and the place where its data lies."""

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
#: In every directory that a demo made: nothing else is ever emptied.
MARK = "demo.lock"
STOP_SECONDS = 30.0


class Place:
    """The directory of one demo at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory: Path = directory.expanduser().resolve()
        self.log: Path = self.directory / "bot.log"
        self.pid_file: Path = self.directory / "bot.pid"
        self.server: EmbeddedServer = EmbeddedServer(self.directory)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the place against other demos. Raises `SettingsError` when it is someone else's, or in use."""
        mark = self.directory / MARK
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not mark.exists() and any(self.directory.iterdir()):
                raise SettingsError(
                    f"--data-dir: {self.directory} holds something that no demo made; expected a new directory"
                )
            handle = mark.open("a")
        except OSError as exc:
            raise SettingsError(f"--data-dir: {self.directory} cannot be used: {exc.strerror}") from exc
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise SettingsError(
                    f"--data-dir: another demo runs on {self.directory}; end it, or choose another directory"
                ) from None
            yield

    async def emptied(self) -> None:
        """Take away what an earlier demo left, its processes too if it was killed."""
        await asyncio.to_thread(self._end_orphan)
        if (self.server.cluster / "postmaster.pid").exists():
            with contextlib.suppress(GuildbookError):  # what cannot be started does not run
                await self.server.start()
                await self.server.stop(force=True)
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        for entry in self.directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARK:
                entry.unlink()

    def _end_orphan(self) -> None:
        import psutil

        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int(self.pid_file.read_text()))
            if Path(process.cwd()) == self.directory and str(ENTRY) in process.cmdline():
                process.terminate()
                _, alive = psutil.wait_procs([process], timeout=STOP_SECONDS)
                for stubborn in alive:
                    stubborn.kill()


class Bot:
    """The bot's process."""

    def __init__(self, place: Place) -> None:
        self.place: Place = place
        self.port: int = free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] | None = None

    async def start(self, api_base: str, token: str) -> None:
        """Start it the way everyone does, on the demo's data and a simulated Discord."""
        self._log = self.place.log.open("ab")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ENTRY),
            cwd=self.place.directory,  # no .env of anyone's lies here
            env=environment(
                DISCORD_API_BASE=api_base,
                DISCORD_TOKEN=token,
                DATA_DIR=str(self.place.directory),
                HEALTH_HOST="127.0.0.1",
                HEALTH_PORT=str(self.port),
                LOG_FORMAT="json",
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=self._log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the demo, which passes it on in its own time
        )
        self.place.pid_file.write_text(str(self._process.pid))

    @property
    def returncode(self) -> int | None:
        """How it ended; None while it runs."""
        return None if self._process is None else self._process.returncode

    async def readiness(self, session: aiohttp.ClientSession) -> dict[str, Any] | None:
        """Return what GET /readyz says; None before it says anything. Raises `GuildbookError` when the bot ended."""
        if self.returncode is not None:
            raise GuildbookError(f"the bot ended early, exit code {self.returncode}:\n{self.last_words()}")
        try:
            async with session.get(f"http://127.0.0.1:{self.port}/readyz") as response:
                answer: dict[str, Any] = await response.json()
                return answer
        except (aiohttp.ClientError, TimeoutError):
            return None

    def last_words(self, lines: int = 20) -> str:
        """Return the end of its log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.place.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    async def stop(self) -> int:
        """Stop it as a host would, by SIGTERM, and return its exit code (negative: it had to be killed)."""
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
    """Return our environment with these settings and none of the operator's own, the database's above all."""
    ours = {*variables(), "PGSERVICE", "PGSERVICEFILE", "PGOPTIONS", "PGPASSFILE", "PGHOSTADDR"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.upper() not in ours and not name.upper().startswith("RAILWAY_")
    }
    return kept | settings


def free_port() -> int:
    """Return a port that nobody uses just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port

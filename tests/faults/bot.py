"""A bot process that tests kill, suspend and query."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import IO, Any

import aiohttp

from simulator.proxy import Proxy
from tests.forkserver import BotCommand, start_bot
from tests.ports import free_port

#: Seconds to wait for what takes two on an idle machine.
TIMEOUT = 60.0


class Bot:
    """`python bot.py` with a clean environment plus the given settings, logging to a file."""

    def __init__(self, name: str, directory: Path, network: Proxy, **settings: str) -> None:
        self.name = name
        #: The proxy between it and the database.
        self.network = network
        self.log: Path = directory / f"{name}.log"
        self.directory = directory
        self.port = free_port()
        self._settings = {"HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": str(self.port), "LOG_FORMAT": "json", **settings}
        self._process: BotCommand | None = None
        self._log_writer: asyncio.Task[None] | None = None
        self._file: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id. The bot must have been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not exited."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process."""
        self._file = self.log.open("ab")
        self._process = await start_bot(self.directory, settings=self._settings)
        self._log_writer = asyncio.create_task(self._write_log())

    async def _write_log(self) -> None:
        # Through a pipe, so that a limit on the bot's file sizes does not apply to its log.
        assert self._process is not None
        assert self._file is not None
        while chunk := await self._process.stdout.read(1 << 16):
            self._file.write(chunk)
            self._file.flush()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; does nothing if the process has exited."""
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None:
                self._process.send_signal(number)

    async def wait_for_exit(self) -> int:
        """Wait until the process exits, and return its exit code."""
        assert self._process is not None
        async with asyncio.timeout(TIMEOUT):
            code = await self._process.wait()
            if self._log_writer is not None:
                await self._log_writer
        if self._file is not None:
            self._file.close()
        return code

    async def kill(self) -> None:
        """Send SIGKILL and wait for the exit."""
        if self.is_running:
            self.send(signal.SIGKILL)
            await self.wait_for_exit()

    async def get(self, path: str) -> tuple[int, Any]:
        """Return the status and body of a health server's response; (0, None) if there is none."""
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://127.0.0.1:{self.port}{path}") as response,
            ):
                return response.status, await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0, None

    async def wait_for_state(self, *states: str) -> str:
        """Wait until GET /healthz reports one of these states, and return it."""
        async with asyncio.timeout(TIMEOUT):
            while True:
                status, health = await self.get("/healthz")
                if status == 200 and health["state"] in states:
                    return str(health["state"])
                self._check_is_running()
                await asyncio.sleep(0.05)

    async def wait_until_ready(self) -> None:
        """Wait until GET /readyz returns 200."""
        async with asyncio.timeout(TIMEOUT):
            while (await self.get("/readyz"))[0] != 200:
                self._check_is_running()
                await asyncio.sleep(0.05)

    def _check_is_running(self) -> None:
        if not self.is_running:
            raise AssertionError(f"{self.name} exited unexpectedly:\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

"""The bot's process, to be killed, stopped and looked at."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import IO, Any

import aiohttp

from simulator.proxy import Proxy
from utils.demo.bot_process import ENTRY, environment, free_port

#: Seconds for what takes two on an idle machine.
PATIENCE = 60.0


class Bot:
    """`python bot.py` with nothing of ours in its environment but what is given; its log goes to a file."""

    def __init__(self, name: str, directory: Path, network: Proxy, **settings: str) -> None:
        self.name = name
        #: What lies between it and the database.
        self.network = network
        self.log: Path = directory / f"{name}.log"
        self.directory = directory
        self.port = free_port()
        self._settings = {"HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": str(self.port), "LOG_FORMAT": "json", **settings}
        self._process: asyncio.subprocess.Process | None = None
        self._logging: asyncio.Task[None] | None = None
        self._file: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id; it has been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it."""
        self._file = self.log.open("ab")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, str(ENTRY), cwd=self.directory, env=environment(**self._settings),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self._logging = asyncio.create_task(self._keep_log())

    async def _keep_log(self) -> None:
        # Through a pipe: a limit on the size of the bot's files is not to fall on its log.
        assert self._process is not None
        assert self._process.stdout is not None
        assert self._file is not None
        while line := await self._process.stdout.read(1 << 16):
            self._file.write(line)
            self._file.flush()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            if self._process is not None:
                self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and return its exit code."""
        assert self._process is not None
        async with asyncio.timeout(PATIENCE):
            code = await self._process.wait()
            if self._logging is not None:
                await self._logging
        if self._file is not None:
            self._file.close()
        return code

    async def kill(self) -> None:
        """SIGKILL."""
        if self.is_running:
            self.send(signal.SIGKILL)
            await self.ended()

    async def get(self, path: str) -> tuple[int, Any]:
        """Ask the health server; (0, None) while nobody answers."""
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://127.0.0.1:{self.port}{path}") as response,
            ):
                return response.status, await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return 0, None

    async def until_state(self, *states: str) -> str:
        """Wait until GET /healthz says one of these states."""
        async with asyncio.timeout(PATIENCE):
            while True:
                status, told = await self.get("/healthz")
                if status == 200 and told["state"] in states:
                    return str(told["state"])
                self._must_run()
                await asyncio.sleep(0.05)

    async def until_ready(self) -> None:
        """Wait until GET /readyz says so."""
        async with asyncio.timeout(PATIENCE):
            while (await self.get("/readyz"))[0] != 200:
                self._must_run()
                await asyncio.sleep(0.05)

    def _must_run(self) -> None:
        if not self.is_running:
            raise AssertionError(f"{self.name} ended by itself:\n{self.last_words()}")

    def last_words(self, lines: int = 15) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

"""The bot on a simulator: in this process, to inspect it, or as `python bot.py`, to see how it starts and stops."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from simulator import Simulator
from testing.running import restored_endpoints, running_bot, settings_for
from tests.forkserver import BotCommand, start_bot
from tests.ports import free_port
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.bot_process import ENTRY, environment
from utils.demo.compare import TABLES, compare

__all__ = ["BotProcess", "restored_endpoints", "run_cli", "running_bot", "settings_for", "wait_until_mirrored"]

#: Seconds that a test waits for the bot.
TIMEOUT = 40.0


async def mirror_differences(pool: Pool, simulator: Simulator) -> list[str]:
    """Return the differences between the mirrored tables and the simulator's world, as lines."""
    proofs = [await compare(pool, table, simulator.world.expected_rows(table)) for table in TABLES]
    return [line for proof in proofs for line in proof.lines()]


async def wait_until_mirrored(pool: Pool, simulator: Simulator) -> None:
    """Wait until the mirrored tables equal the simulator's world; fail with the differences."""
    try:
        async with asyncio.timeout(TIMEOUT):
            while await mirror_differences(pool, simulator):  # noqa: ASYNC110 - rows that another process writes
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail("\n".join(await mirror_differences(pool, simulator)))


@asynccontextmanager
async def embedded_server(data_dir: Path) -> AsyncIterator[None]:
    """Keep the embedded server of a data directory running: commands then need not start and stop it."""
    server = EmbeddedServer(data_dir, durable=False)
    await server.start()
    try:
        yield
    finally:
        await server.stop(force=True)


async def run_cli(directory: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Run `python bot.py` with arguments in a fork; return its exit code and output."""
    process = await start_bot(directory, *arguments, settings=settings)
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
        return await process.wait(), output.decode()


async def run_python(directory: Path, *arguments: str) -> tuple[int, str]:
    """Run `python bot.py` as somebody types it, in a Python that has imported nothing; return exit code and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ENTRY), *arguments, cwd=directory, env=environment(), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
        return await process.wait(), output.decode()


class BotProcess:
    """`python bot.py` as a process that gets only the given settings from its environment."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        self.port = free_port()
        self._settings = {"HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": str(self.port), **settings}
        self.process: BotCommand
        self.output = ""

    async def __aenter__(self) -> BotProcess:
        self.process = await start_bot(self.directory, settings=self._settings)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.wait_for_exit()

    async def get(self, path: str) -> tuple[int, Any]:
        """Send a GET request to the health server; return status and body, (0, None) if it does not respond."""
        timeout = aiohttp.ClientTimeout(total=5)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://127.0.0.1:{self.port}{path}") as response,
            ):
                is_json = response.content_type == "application/json"
                return response.status, await (response.json() if is_json else response.text())
        except (aiohttp.ClientError, TimeoutError):
            return 0, None

    async def is_ready(self) -> bool:
        """Return whether GET /readyz responds with 200."""
        return (await self.get("/readyz"))[0] == 200

    async def wait_until_ready(self) -> None:
        """Wait until the bot is ready; fail if it exits."""
        async with asyncio.timeout(TIMEOUT):
            while not await self.is_ready():
                if self.process.returncode is not None:
                    await self.wait_for_exit()
                    pytest.fail(f"the bot exited with code {self.process.returncode}:\n{self.output}")
                await asyncio.sleep(0.05)

    async def wait_for_output(self, text: str, *, times: int = 1) -> None:
        """Read the process's output until a text has appeared so many times."""
        async with asyncio.timeout(TIMEOUT):
            while self.output.count(text) < times:
                line = await self.process.stdout.readline()
                if not line:
                    pytest.fail(f"the bot exited without printing {text!r}:\n{self.output}")
                self.output += line.decode()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    async def wait_for_exit(self) -> int:
        """Wait until the process exits, and return its exit code."""
        async with asyncio.timeout(TIMEOUT):
            self.output += (await self.process.stdout.read()).decode()
            return await self.process.wait()

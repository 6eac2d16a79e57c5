"""The bot on a simulator: in this process, to inspect it, or as `python bot.py`, to see how it starts and stops."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from discord import gateway, http

from simulator import Simulator
from tests.forkserver import BotCommand, start_bot
from tests.ports import free_port
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.database.embedded import EmbeddedServer
from utils.demo.bot_process import ENTRY, environment
from utils.demo.compare import TABLES, compare
from utils.service.lease import Lease, holder
from utils.settings import Settings

#: Seconds that a test waits for the bot.
TIMEOUT = 40.0


def settings_for(simulator: Simulator, **overrides: Any) -> Settings:
    """Return settings for a bot on the simulator, without any from the environment."""
    defaults: dict[str, Any] = {
        "discord_token": simulator.token,
        "discord_api_base": simulator.api_base,
        "flush_seconds": 0.05,
        "chunk_cooldown_seconds": 0,
    }
    return Settings(_env_file=None, **{**defaults, **overrides})  # type: ignore[call-arg]


@contextmanager
def restored_endpoints() -> Iterator[None]:
    """Restore discord.py's addresses of Discord after the block: the bot sets them on discord.py's classes."""
    api_base, default_gateway = http.Route.BASE, gateway.DiscordWebSocket.DEFAULT_GATEWAY
    try:
        yield
    finally:
        http.Route.BASE, gateway.DiscordWebSocket.DEFAULT_GATEWAY = api_base, default_gateway


@asynccontextmanager
async def running_bot(
    pool: Pool,
    simulator: Simulator,
    *,
    extensions: Iterable[str] | None = None,
    configure: Callable[[Guildbook], None] = lambda bot: None,
    **settings: Any,
) -> AsyncIterator[Guildbook]:
    """Run the bot in this process: wait until it is ready, and stop it after the block.

    `configure` is called before the start, for example to shorten timeouts.
    """
    with restored_endpoints():
        lease = Lease(pool.target, holder())
        await lease.wait()
        bot = Guildbook(settings_for(simulator, **{"spool": "off", **settings}), pool, lease, extensions=extensions)
        configure(bot)
        async with bot:
            task = asyncio.create_task(bot.start(simulator.token))
            try:
                await until(lambda: bot.readiness()[0] or task.done(), TIMEOUT)
                if task.done():
                    task.result()
                yield bot
            finally:
                await bot.close()
                task.cancel()
                await asyncio.wait([task], timeout=5)
                async with asyncio.timeout(TIMEOUT):
                    await bot.stop_services(5)
                    await lease.release(5)


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

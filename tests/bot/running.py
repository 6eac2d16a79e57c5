"""The bot on a simulator: in this process, to look inside, or as `python bot.py`, to see how it begins and ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from discord import gateway, http

from simulator import Simulator
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.demo.child import ENTRY, environment, free_port
from utils.demo.proof import TABLES, compare
from utils.service.lease import Lease, holder
from utils.settings import Settings

#: Nothing here may take longer, in seconds.
PATIENCE = 40.0


def settings_for(simulator: Simulator, **given: Any) -> Settings:
    """Return settings that lead to the simulator, none of them out of the environment."""
    plain: dict[str, Any] = {"discord_token": simulator.token, "discord_api_base": simulator.api_base}
    return Settings(_env_file=None, **{**plain, "flush_seconds": 0.05, "chunk_cooldown_seconds": 0, **given})  # type: ignore[call-arg]


@asynccontextmanager
async def running(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    extensions: Iterable[str] | None = None,
    **settings: Any,
) -> AsyncIterator[Guildbook]:
    """Run the bot in this process until it is ready, and end it after the block."""
    monkeypatch.setattr(http.Route, "BASE", http.Route.BASE)  # the bot sets both; given back afterwards
    monkeypatch.setattr(gateway.DiscordWebSocket, "DEFAULT_GATEWAY", gateway.DiscordWebSocket.DEFAULT_GATEWAY)
    lease = Lease(database.target, holder())
    await lease.wait()
    chosen = settings_for(simulator, **{"spool": "off", **settings})
    bot = Guildbook(chosen, database, lease, extensions=extensions)
    async with bot:
        task = asyncio.create_task(bot.start(simulator.token))
        try:
            await until(lambda: bot.readiness()[0] or task.done())
            if task.done():
                task.result()
            yield bot
        finally:
            await bot.close()
            task.cancel()
            await asyncio.wait([task], timeout=5)
            async with asyncio.timeout(PATIENCE):
                await bot.stop_mirror(5)
                await lease.release(5)


async def differences(database: Pool, simulator: Simulator) -> list[str]:
    """Return what is wrong in the tables, as lines."""
    proofs = [await compare(database, table, simulator.world.expected_rows(table)) for table in TABLES]
    return [line for proof in proofs for line in proof.lines()]


async def until_equal(database: Pool, simulator: Simulator) -> None:
    """Wait until the tables equal the simulator's world; fail with what differs."""
    try:
        async with asyncio.timeout(PATIENCE):
            while await differences(database, simulator):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.05)
    except TimeoutError:
        pytest.fail("\n".join(await differences(database, simulator)))


async def typed(directory: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    """Run `python bot.py …` and return its exit code and all that it prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ENTRY),
        *arguments,
        cwd=directory,
        env=environment(**settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


class BotProcess:
    """`python bot.py` with nothing of ours in its environment but what is given."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        self.port = free_port()
        self._settings = {"HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": str(self.port), **settings}
        self.process: asyncio.subprocess.Process
        self.output = ""

    async def __aenter__(self) -> BotProcess:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(ENTRY),
            cwd=self.directory,
            env=environment(**self._settings),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def get(self, path: str) -> tuple[int, Any]:
        """Ask the health server; (0, None) while nobody answers."""
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

    async def ready(self) -> None:
        """Wait until GET /readyz says so."""
        async with asyncio.timeout(PATIENCE):
            while (await self.get("/readyz"))[0] != 200:
                if self.process.returncode is not None:
                    await self.ended()
                    pytest.fail(f"the bot ended, exit code {self.process.returncode}:\n{self.output}")
                await asyncio.sleep(0.05)

    async def until_it_says(self, words: str) -> None:
        """Read its output until these words come up."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            while words not in self.output:
                line = await self.process.stdout.readline()
                if not line:
                    pytest.fail(f"the bot ended without a word of {words!r}:\n{self.output}")
                self.output += line.decode()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end and return its exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            self.output += (await self.process.stdout.read()).decode()
            return await self.process.wait()

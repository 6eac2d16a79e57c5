"""A simulator in a separate process, for tests that measure their own."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from .control import decode, encode

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0
_LINE_LIMIT = 64 << 20


class SimulatorProcess:
    """Runs `python -m simulator` with the given arguments inside an `async with` block.

    `call` accesses the world, the fault injector and the counters by name; `rows` returns expected rows.
    """

    def __init__(self, *args: str, call_timeout: float = 120.0) -> None:
        self._args = args
        self._call_timeout = call_timeout
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self.api_base = ""
        self.gateway_url = ""
        self.token = ""
        self.control_url = ""

    @property
    def pid(self) -> int | None:
        """The process id; None while it is not running."""
        return None if self._process is None else self._process.pid

    async def __aenter__(self) -> SimulatorProcess:
        paths = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "simulator",
            "--until-stdin-closes",
            *self._args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            await self._read_addresses(self._process)
        except BaseException:
            await self._stop()
            raise
        timeout = aiohttp.ClientTimeout(total=self._call_timeout)
        self._session = aiohttp.ClientSession(timeout=timeout, read_bufsize=_LINE_LIMIT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
        await self._stop()

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call or read an attribute by its dotted name. Raises RuntimeError with the simulator's error message."""
        request = {"call": name, "args": encode(args), "kwargs": encode(kwargs)}
        async with self._running().post(self.control_url, json=request) as response:
            answer = json.loads(await response.text())
        if "error" in answer:
            raise RuntimeError(f"{name}: {answer['error']}")
        return decode(answer["result"])

    async def rows(self, table: str, guild_id: int | None = None) -> list[dict[str, Any]]:
        """Return the rows that a correct mirror's table contains now."""
        query = {} if guild_id is None else {"guild_id": str(guild_id)}
        async with self._running().get(f"{self.control_url}/rows/{table}", params=query) as response:
            response.raise_for_status()
            return [decode(json.loads(line)) async for line in response.content]

    def _running(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the simulator process only runs inside `async with SimulatorProcess(...)`")
        return self._session

    async def _read_addresses(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise RuntimeError("the simulator process has no standard output to read its addresses from")
        async with asyncio.timeout(_START_TIMEOUT_S):
            line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulator process ended before it listened (arguments {self._args})")
        addresses = json.loads(line)
        self.api_base, self.gateway_url = addresses["api_base"], addresses["gateway_url"]
        self.token, self.control_url = addresses["token"], addresses["control"]

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

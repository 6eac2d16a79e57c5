"""Clients for the simulator's tests: an unmodified discord.py and a bare websocket."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import discord
import pytest
import yarl
import zstandard
from discord import gateway, http

from simulator import Simulator
from simulator.state import Intent
from tests.waiting import until

ALL_INTENTS = 0x3FFFFFF
_PAUSE_S = 0.01


@asynccontextmanager
async def discord_client(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch, client: discord.Client | None = None
) -> AsyncIterator[discord.Client]:
    """Run a discord.py client against the simulator until it is ready, and close it after the block."""
    monkeypatch.setattr(http.Route, "BASE", simulator.api_base)
    monkeypatch.setattr(gateway.DiscordWebSocket, "DEFAULT_GATEWAY", yarl.URL(simulator.gateway_url))
    if client is None:
        client = discord.Client(
            intents=discord.Intents.all(), chunk_guilds_at_startup=False, max_messages=None, guild_ready_timeout=0.1
        )
    running = asyncio.create_task(client.start(simulator.token))
    try:
        await until(lambda: client.is_ready() or running.done())
        if running.done():
            running.result()
        yield client
        if running.done():
            running.result()
    finally:
        await client.close()
        running.cancel()
        await asyncio.wait([running], timeout=5)


class BareClient:
    """A websocket that speaks the gateway's JSON and remembers everything it was sent."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, compress: str | None) -> None:
        self.ws = ws
        self.seen: list[dict[str, Any]] = []
        self.sequence = 0
        self._zlib = zlib.decompressobj()
        self._zstd = zstandard.ZstdDecompressor().decompressobj()
        self._compress = compress

    async def receive(self, timeout: float = 10.0) -> dict[str, Any]:
        """Take one message; raises ConnectionError with the close code once the gateway has closed."""
        frame = await self.ws.receive(timeout=timeout)
        if frame.type is aiohttp.WSMsgType.TEXT:
            text = frame.data
        elif frame.type is aiohttp.WSMsgType.BINARY:
            assert self._compress != "zlib-stream" or frame.data.endswith(b"\x00\x00\xff\xff")
            stream: Any = self._zlib if self._compress == "zlib-stream" else self._zstd
            text = stream.decompress(frame.data).decode()
        else:
            raise ConnectionError(str(self.ws.close_code))
        message: dict[str, Any] = json.loads(text)
        self.seen.append(message)
        self.sequence = message.get("s") or self.sequence
        return message

    async def wait_for(self, name: str | int, count: int = 1) -> list[dict[str, Any]]:
        """Take messages until `count` dispatches of a name, or of an opcode, came; returns those."""
        found: list[dict[str, Any]] = []
        while len(found) < count:
            message = await self.receive()
            if message.get("t") == name or (message["op"] == name and isinstance(name, int)):
                found.append(message)
        return found

    async def send(self, opcode: int, data: Any) -> None:
        """Send a command."""
        await self.ws.send_str(json.dumps({"op": opcode, "d": data}))

    async def request_members(self, guild_id: int, **how: Any) -> None:
        """Send op 8."""
        await self.send(8, {"guild_id": str(guild_id), "query": "", "limit": 0, **how})

    async def closed_with(self) -> int:
        """Take what still comes, until the gateway has closed; returns its close code."""
        while True:
            try:
                await self.receive()
            except ConnectionError:
                return self.ws.close_code or 0


@asynccontextmanager
async def bare_client(
    simulator: Simulator,
    *,
    compress: str | None = None,
    intents: int = ALL_INTENTS,
    identify: bool = True,
    shard: list[int] | None = None,
) -> AsyncIterator[BareClient]:
    """Connect a bare websocket and, unless told otherwise, IDENTIFY and wait for every guild."""
    url = f"{simulator.gateway_url}?v=10&encoding=json" + (f"&compress={compress}" if compress else "")
    async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as ws:
        client = BareClient(ws, compress)
        assert (await client.receive())["op"] == 10
        if identify:
            sharding = {"shard": shard} if shard else {}
            await client.send(2, {"token": simulator.token, "intents": intents, "properties": {}, **sharding})
            ready = (await client.wait_for("READY"))[0]
            up = [g for g in ready["d"]["guilds"] if simulator.world.guilds[int(g["id"])].available]
            if intents & Intent.GUILDS:
                await client.wait_for("GUILD_CREATE", len(up))
        yield client

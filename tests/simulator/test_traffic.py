"""The ledger, generated traffic, and the TCP proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from simulator import Simulator, World
from simulator.proxy import Proxy
from tests.waiting import until


async def test_ledger_lists_only_emitted_events(world: World, simulator: Simulator, small: int) -> None:
    joined = world.join(small)
    world.leave(small, joined)
    someone = next(id for id in world.guild(small).ordered_member_ids() if id != world.bot.id)
    channel = next(c.id for c in world.guild(small).channels.values() if c.type == 0 and not c.hidden)
    message = world.message(small, channel, someone, "hi")
    world.guild_outage(small)
    world.join(small)
    assert [event.kind for event in world.ledger.member_events] == ["join", "leave"]
    assert world.ledger.messages == [(message, small, someone)]
    assert world.ledger.since(0, 1) == {
        "messages": [[message, small, someone]],
        "member_events": [[small, joined, "leave", None]],
    }


async def test_traffic_runs_until_stopped(world: World, simulator: Simulator) -> None:
    simulator.traffic.start(2_000, seed=3)
    await until(lambda: simulator.traffic.emitted > 400)
    emitted = await simulator.traffic.stop()
    assert 0.5 * emitted < len(world.ledger.messages) < 0.9 * emitted
    await asyncio.sleep(0.05)
    assert simulator.traffic.emitted == emitted


async def test_burst_sends_each_message_once(world: World, simulator: Simulator) -> None:
    await simulator.traffic.burst(2_000)
    assert len({message.id for message in world.ledger.messages}) == 2_000


@asynccontextmanager
async def echo() -> AsyncIterator[int]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def said(port: int, words: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(words)
        return await asyncio.wait_for(reader.readexactly(len(words)), 10)
    finally:
        writer.close()


async def test_proxy_forwards_cuts_freezes_and_heals() -> None:
    async with echo() as port, Proxy(("127.0.0.1", port)) as proxy:
        assert await said(proxy.port, b"hello") == b"hello"
        assert proxy.bytes == 10
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"into the void")
        proxy.cut()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(14)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(proxy.port, b"hello")
        proxy.heal()
        assert await said(proxy.port, b"again") == b"again"
        proxy.freeze()
        waiting = asyncio.create_task(said(proxy.port, b"patience"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        proxy.heal()
        assert await waiting == b"patience"


async def test_proxy_adds_latency_in_each_direction() -> None:
    async with echo() as port, Proxy(("127.0.0.1", port), latency=0.2) as proxy:
        clock = asyncio.get_running_loop().time
        started = clock()
        assert await said(proxy.port, b"hello") == b"hello"
        assert clock() - started >= 0.4

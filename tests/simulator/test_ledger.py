"""The ledger, deliveries, and the TCP proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from urllib.parse import urlsplit

import aiohttp

from simulator import Limits, Simulator, World
from simulator.proxy import Proxy
from simulator.remote import SimulatorProcess
from tests.simulator.clients import bare_client
from tests.waiting import until


def chat(world: World, guild_id: int, count: int) -> list[int]:
    """Let the guild's first members write so many messages, one after the other; returns their ids."""
    guild = world.guild(guild_id)
    place = next(c.id for c in guild.channels.values() if c.type == 0 and not c.hidden)
    authors = [id for id in guild.ordered_member_ids() if id != world.bot.id]
    return [world.message(guild_id, place, authors[number % 7], "hi") for number in range(count)]


async def test_ledger_counts_by_guild_and_author(world: World, simulator: Simulator, small: int) -> None:
    ids = chat(world, small, 20)
    told = world.ledger
    assert told.counts == Counter((message.guild_id, message.user_id) for message in told.messages)
    assert told.counts.total() == told.sizes()[0] == 20
    assert max(told.newest.values()) == ids[-1]


async def test_delivery_lists_sent_and_acknowledged_events(world: World, simulator: Simulator, small: int) -> None:
    before = chat(world, small, 3)
    async with bare_client(simulator) as client:
        ids = chat(world, small, 5)
        joined = world.join(small)
        world.ban(small, joined)
        await client.wait_for("GUILD_MEMBER_REMOVE")
        (delivery,) = world.ledger.deliveries.values()
        assert delivery.message_ids.tolist() == ids
        assert not set(before) & set(delivery.message_ids)
        assert (
            [event.kind for event in delivery.member_events]
            == ["join", "ban", "leave"]
            == [e.kind for e in world.ledger.member_events]
        )
        assert delivery.member_events == world.ledger.member_events
        await client.send(1, client.sequence - 3)  # a heartbeat: the join and what followed is not taken yet
        await until(lambda: delivery.acknowledged)
        assert delivery.report()["safe_messages"] == 0
        report = delivery.report(messages=4, margin=0.0)
        assert (report["messages"], report["safe_messages"], report["safe_member_events"]) == (ids[4:], 5, 0)


async def test_delivery_counts_replayed_messages_once(world: World, simulator: Simulator, small: int) -> None:
    async with bare_client(simulator) as client:
        first = chat(world, small, 2)
        await client.wait_for("MESSAGE_CREATE", 2)
        (session,) = simulator.gateway.sessions.values()
        session.drop_socket()
        await until(lambda: session.socket is None)
        second = chat(world, small, 2)
        async with bare_client(simulator, identify=False) as again:
            token = {"token": simulator.token, "session_id": session.id, "seq": client.sequence - 1}
            await again.send(6, token)
            seen = await again.wait_for("MESSAGE_CREATE", 3)
            assert [int(message["d"]["id"]) for message in seen] == [first[1], *second]
            assert session.delivery.message_ids.tolist() == first + second
            assert session.delivery.acknowledged == client.sequence - 1


async def test_ledger_can_be_read_from_another_process() -> None:
    arguments = ("--seed", "3", "--guild", "40", "--no-limits", "--present")
    async with (
        SimulatorProcess(*arguments) as simulator,
        aiohttp.ClientSession() as session,
        session.ws_connect(simulator.gateway_url) as ws,
    ):
        await ws.send_json({"op": 2, "d": {"token": simulator.token, "intents": 1 | 2 | 4 | 512, "properties": {}}})
        while "GUILD_CREATE" not in await ws.receive_str():
            pass
        await simulator.call("traffic.start", 2_000, 5)
        await asyncio.sleep(0.2)
        emitted = await simulator.call("traffic.stop")
        await until(lambda: simulator.call("gateway.has_sent_all"))
        told = await simulator.call("world.ledger.since")
        (delivery,) = (await simulator.call("world.ledger.delivered")).values()
        assert 100 < len(told["messages"]) < emitted
        assert delivery["messages"] == [id for id, _, _ in told["messages"]]
        assert delivery["member_events"] == told["member_events"]


async def test_world_with_a_clock_never_repeats_an_id() -> None:
    now = 1_800_000_000_000_000
    world = World(seed=2, clock=lambda: now)
    guild_id = world.add_guild(members=50)
    async with Simulator(world, limits=Limits.none()):
        ids = chat(world, guild_id, 10_000)
    assert len(set(ids)) == 10_000
    assert abs(world.now_us - now) < 1_000_000


async def test_client_behind_a_proxy_resumes_through_it(simulator: Simulator) -> None:
    where = urlsplit(simulator.api_base)
    assert where.hostname is not None
    assert where.port is not None
    async with Proxy((where.hostname, where.port)) as proxy, aiohttp.ClientSession() as session:
        here = f"127.0.0.1:{proxy.port}"
        headers = {"Authorization": f"Bot {simulator.token}"}
        async with session.get(f"http://{here}{where.path}/gateway/bot", headers=headers) as response:
            assert (await response.json())["url"] == f"ws://{here}/gateway"
        async with session.ws_connect(f"ws://{here}/gateway") as ws:
            await ws.send_json({"op": 2, "d": {"token": simulator.token, "intents": 1, "properties": {}}})
            while (message := await ws.receive_json()).get("t") != "READY":
                pass
            assert message["d"]["resume_gateway_url"] == f"ws://{here}/gateway"


async def test_proxy_forwards_a_reset() -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ended.set()
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    async with server, Proxy(("127.0.0.1", server.sockets[0].getsockname()[1])) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        await writer.drain()
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
        await asyncio.wait_for(ended.wait(), 5)


async def test_frozen_proxy_hides_a_disconnect() -> None:
    ended = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        ended.set()
        writer.close()

    server = await asyncio.start_server(wait, "127.0.0.1", 0)
    async with server, Proxy(("127.0.0.1", server.sockets[0].getsockname()[1])) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        await until(lambda: proxy.connections)
        await asyncio.sleep(0.05)
        proxy.freeze()
        writer.close()
        await asyncio.sleep(0.2)
        assert not ended.is_set()
        proxy.heal()
        await asyncio.wait_for(ended.wait(), 5)

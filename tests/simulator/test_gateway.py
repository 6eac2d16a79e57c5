"""The gateway protocol, tested with a bare websocket."""

from __future__ import annotations

from typing import Any

import pytest

from simulator import Limits, Simulator, World
from simulator.state import Intent
from simulator.throughput import measure
from tests.simulator.clients import ALL_INTENTS, BareClient, bare_client
from tests.waiting import until


async def members_of(client: BareClient, guild_id: int, **how: Any) -> tuple[list[int], list[dict[str, Any]]]:
    await client.request_members(guild_id, nonce="n1", **how)
    pages = await client.wait_for("GUILD_MEMBERS_CHUNK")
    pages += await client.wait_for("GUILD_MEMBERS_CHUNK", pages[0]["d"]["chunk_count"] - 1)
    return [int(member["user"]["id"]) for page in pages for member in page["d"]["members"]], [p["d"] for p in pages]


@pytest.mark.parametrize("compress", [None, "zlib-stream", "zstd-stream"])
async def test_all_transports_carry_the_same_messages(
    simulator: Simulator, world: World, large: int, compress: str | None
) -> None:
    async with bare_client(simulator, compress=compress) as client:
        ids, pages = await members_of(client, large)
        assert ids == sorted(world.guilds[large].members)
        assert [page["chunk_index"] for page in pages] == [0, 1, 2, 3]
        assert {page["nonce"] for page in pages} == {"n1"}
        sequences = [message["s"] for message in client.seen if message["op"] == 0]
        assert sequences == list(range(1, len(sequences) + 1))


async def test_member_request_by_user_id_lists_not_found(simulator: Simulator, world: World, small: int) -> None:
    known = sorted(world.guilds[small].members)[:3]
    async with bare_client(simulator) as client:
        ids, pages = await members_of(client, small, query=None, user_ids=[*map(str, known), "5"])
        assert (sorted(ids), pages[0]["not_found"]) == (known, ["5"])


async def test_member_request_by_name_prefix(simulator: Simulator, world: World, small: int) -> None:
    user_id = world.join(small)
    world.rename_user(user_id, username="Quite Unlikely")
    async with bare_client(simulator) as client:
        assert (await members_of(client, small, query="quite un", limit=5))[0] == [user_id]


async def test_closes_with_documented_codes(world: World) -> None:
    async with Simulator(world, privileged_intents=0) as simulator:
        async with bare_client(simulator, identify=False) as client:
            await client.send(2, {"token": "wrong", "intents": 0, "properties": {}})
            assert await client.closed_with() == 4004
        async with bare_client(simulator, identify=False) as client:
            await client.send(2, {"token": simulator.token, "intents": int(Intent.GUILD_MEMBERS), "properties": {}})
            assert await client.closed_with() == 4014
        async with bare_client(simulator, identify=False) as client:
            await client.send(8, {})
            assert await client.closed_with() == 4003
        async with bare_client(simulator, identify=False) as client:
            await client.ws.send_str("no json")
            assert await client.closed_with() == 4002


async def test_too_many_commands_close_the_connection(world: World) -> None:
    async with Simulator(world) as simulator, bare_client(simulator) as client:
        for _ in range(121):
            await client.send(3, {"status": "online", "since": None, "activities": [], "afk": False})
        assert await client.closed_with() == 4008


async def test_second_full_request_within_cooldown_is_limited(world: World, large: int) -> None:
    async with Simulator(world) as simulator, bare_client(simulator) as client:
        await members_of(client, large)
        await client.request_members(large, nonce="again")
        limited = (await client.wait_for("RATE_LIMITED"))[0]["d"]
        assert limited["opcode"] == 8
        assert limited["meta"] == {"guild_id": str(large), "nonce": "again"}
        assert 0 < limited["retry_after"] <= 30


async def test_client_without_heartbeats_is_closed(world: World) -> None:
    async with Simulator(world, heartbeat_interval=0.1) as simulator, bare_client(simulator) as client:
        assert await client.closed_with() == 4009


async def test_heartbeats_are_acknowledged(simulator: Simulator) -> None:
    async with bare_client(simulator) as client:
        await client.send(1, client.sequence)
        assert await client.wait_for(11)


async def test_intents_filter_events(simulator: Simulator, world: World, small: int) -> None:
    async with bare_client(simulator, intents=int(Intent.GUILDS)) as client:
        world.join(small)
        world.create_role(small)
        await client.wait_for("GUILD_ROLE_CREATE")
        assert "GUILD_MEMBER_ADD" not in {message.get("t") for message in client.seen}


async def test_message_content_requires_its_intent(simulator: Simulator, world: World, small: int) -> None:
    channel = next(c.id for c in world.guilds[small].channels.values() if c.type == 0 and not c.hidden)
    author = world.guilds[small].owner_id
    async with bare_client(simulator) as full, bare_client(simulator, intents=ALL_INTENTS & ~(1 << 15)) as blind:
        world.message(small, channel, author, "hello")
        assert (await full.wait_for("MESSAGE_CREATE"))[0]["d"]["content"] == "hello"
        assert (await blind.wait_for("MESSAGE_CREATE"))[0]["d"]["content"] == ""


async def test_unavailable_guild_is_announced_but_not_sent(simulator: Simulator, world: World, small: int) -> None:
    world.guild_outage(small)
    async with bare_client(simulator) as client:
        stubs = {int(guild["id"]): guild["unavailable"] for guild in client.seen[1]["d"]["guilds"]}
        assert stubs == dict.fromkeys(world.guilds, True)
        world.guild_restore(small)
        assert (await client.wait_for("GUILD_CREATE"))[0]["d"]["id"] == str(small)


async def test_resume_replays_exactly_what_was_missed(simulator: Simulator, world: World, small: int) -> None:
    async with bare_client(simulator) as client:
        session_id, sequence = client.seen[1]["d"]["session_id"], client.sequence
    await until(lambda: not simulator.gateway.connections)
    joined = [world.join(small) for _ in range(5)]
    async with bare_client(simulator, identify=False) as client:
        await client.send(6, {"token": simulator.token, "session_id": session_id, "seq": sequence})
        events = await client.wait_for("GUILD_MEMBER_ADD", 5)
        assert [int(event["d"]["user"]["id"]) for event in events] == joined
        assert [event["s"] for event in events] == [m["s"] for m in client.seen if m.get("t") == "GUILD_MEMBER_ADD"]
        assert "RESUMED" in {message.get("t") for message in client.seen}
        last = client.sequence
    await until(lambda: not simulator.gateway.connections)
    async with bare_client(simulator, identify=False) as client:
        await client.send(6, {"token": simulator.token, "session_id": session_id, "seq": last - 2})
        replayed = [await client.receive(), await client.receive()]
        assert [message["s"] for message in replayed] == [last - 1, last]


async def test_resume_takes_over_from_an_open_socket(simulator: Simulator, world: World, small: int) -> None:
    async with bare_client(simulator) as old, bare_client(simulator, identify=False) as new:
        session_id, sequence = old.seen[1]["d"]["session_id"], old.sequence
        joined = [world.join(small) for _ in range(50)]
        await new.send(6, {"token": simulator.token, "session_id": session_id, "seq": sequence})
        joined += [world.join(small) for _ in range(50)]
        events = await new.wait_for("GUILD_MEMBER_ADD", 100)
        assert [int(event["d"]["user"]["id"]) for event in events] == joined
        with pytest.raises(ConnectionError):
            await old.wait_for("READY")


async def test_unknown_session_can_identify_but_not_resume(simulator: Simulator) -> None:
    async with bare_client(simulator, identify=False) as client:
        await client.send(6, {"token": simulator.token, "session_id": "0", "seq": 1})
        assert (await client.wait_for(9))[0]["d"] is False
        await client.send(2, {"token": simulator.token, "intents": 1, "properties": {}})
        assert await client.wait_for("READY")


async def test_member_request_continues_after_resume(simulator: Simulator, world: World, large: int) -> None:
    simulator.faults.drop_socket_after_pages(large, 2)
    async with bare_client(simulator) as client:
        session_id = client.seen[1]["d"]["session_id"]
        await client.request_members(large)
        with pytest.raises(ConnectionError):
            await client.wait_for("GUILD_MEMBERS_CHUNK", 4)
        sequence, got = client.sequence, [m["d"]["chunk_index"] for m in client.seen if "CHUNK" in str(m.get("t"))]
    await until(lambda: not simulator.gateway.connections)
    async with bare_client(simulator, identify=False) as client:
        await client.send(6, {"token": simulator.token, "session_id": session_id, "seq": sequence})
        rest = await client.wait_for("GUILD_MEMBERS_CHUNK", 4 - len(got))
        assert got + [page["d"]["chunk_index"] for page in rest] == [0, 1, 2, 3]


async def test_stalled_reader_affects_neither_memory_nor_others(simulator: Simulator, world: World, large: int) -> None:
    async with bare_client(simulator) as slow, bare_client(simulator) as quick:
        session = simulator.gateway.sessions[slow.seen[1]["d"]["session_id"]]
        for _ in range(100):
            await slow.request_members(large)
        for _ in range(3):
            ids, _ = await members_of(quick, large)
            assert len(ids) == 3500
        # 400 pages would be 180 MB; the socket's buffers take a few of them.
        assert session.sequence < 200
        assert session.buffered_bytes < 64 << 20


async def test_paced_pages_do_not_delay_events(world: World, large: int) -> None:
    limits = Limits.none(pages_per_second=0.5)
    async with Simulator(world, limits=limits) as simulator, bare_client(simulator) as client:
        await client.request_members(large)
        await client.wait_for("GUILD_MEMBERS_CHUNK")
        world.join(large)
        # The next page is due in two seconds; the event does not wait for it.
        await client.wait_for("GUILD_MEMBER_ADD")
        assert [message.get("t") for message in client.seen[-2:]] == ["GUILD_MEMBERS_CHUNK", "GUILD_MEMBER_ADD"]
        assert (await client.wait_for("GUILD_MEMBERS_CHUNK"))[0]["d"]["chunk_index"] == 1


async def test_throughput_script_measures_both_transports() -> None:
    rates = await measure(members=3000, rounds=1)
    assert {compress: len(found) for compress, found in rates.items()} == {"zlib-stream": 1, "zstd-stream": 1}


async def test_shards_receive_only_their_guilds(simulator: Simulator, world: World) -> None:
    for number in range(2):
        async with bare_client(simulator, shard=[number, 2]) as client:
            seen = {int(m["d"]["id"]) for m in client.seen if m.get("t") == "GUILD_CREATE"}
            assert seen == {guild_id for guild_id in world.guilds if (guild_id >> 22) % 2 == number}


async def test_nick_may_be_absent_or_null(simulator: Simulator, world: World, small: int) -> None:
    user_id = world.join(small)
    async with bare_client(simulator) as client:
        world.update_member(small, user_id, nick=None)
        told = (await client.wait_for("GUILD_MEMBER_UPDATE"))[0]["d"]
        assert told["nick"] is None
        for _ in range(20):
            world.update_member(small, user_id, flags=1)
        updates = await client.wait_for("GUILD_MEMBER_UPDATE", 20)
        assert {"nick" in update["d"] for update in updates} == {True, False}

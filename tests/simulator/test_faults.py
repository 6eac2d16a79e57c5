"""Fault injection has exactly the requested effect and counts it."""

from __future__ import annotations

import pytest

from simulator import Simulator, World
from simulator.malformed import malformed_events
from tests.simulator.clients import BareClient, bare_client
from tests.waiting import until


async def page_order(client: BareClient, guild_id: int, count: int) -> list[int]:
    await client.request_members(guild_id)
    return [page["d"]["chunk_index"] for page in await client.wait_for("GUILD_MEMBERS_CHUNK", count)]


async def test_drops_duplicates_and_reorders_pages(simulator: Simulator, large: int) -> None:
    faults = simulator.faults
    async with bare_client(simulator) as client:
        faults.drop_page(large, "last")
        assert await page_order(client, large, 3) == [0, 1, 2]
        faults.drop_page(large, "middle", times=2)
        assert await page_order(client, large, 3) == [0, 1, 3]
        assert await page_order(client, large, 3) == [0, 1, 3]
        faults.duplicate_page(large, 1)
        assert await page_order(client, large, 5) == [0, 1, 1, 2, 3]
        faults.reorder_pages(large)
        shuffled = await page_order(client, large, 4)
        assert sorted(shuffled) == [0, 1, 2, 3] != shuffled
        assert await page_order(client, large, 4) == [0, 1, 2, 3]
    assert dict(faults.injected) == {"drop_page": 3, "duplicate_page": 1, "reorder_pages": 1}


async def test_ignores_and_rate_limits_member_requests(simulator: Simulator, large: int) -> None:
    simulator.faults.ignore_member_request(large)
    simulator.faults.rate_limit_next(large, retry_after=0.5)
    async with bare_client(simulator) as client:
        await client.request_members(large, nonce="a")
        assert (await client.wait_for("RATE_LIMITED"))[0]["d"]["retry_after"] == 0.5
        await client.request_members(large, nonce="b")
        await client.request_members(large, nonce="c")
        pages = await client.wait_for("GUILD_MEMBERS_CHUNK", 4)
        assert {page["d"]["nonce"] for page in pages} == {"c"}
    assert simulator.faults.injected["ignore_member_request"] == 1


async def test_drops_socket_after_n_events(simulator: Simulator, world: World, small: int) -> None:
    async with bare_client(simulator) as client:
        simulator.faults.drop_socket_after_events(3)
        for _ in range(5):
            world.join(small)
        with pytest.raises((ConnectionError, TypeError)):
            await client.wait_for("GUILD_MEMBER_ADD", 4)
    assert simulator.faults.injected["drop_socket_after_events"] == 1


async def test_duplicates_have_the_same_sequence_number(simulator: Simulator, world: World, small: int) -> None:
    async with bare_client(simulator) as client:
        simulator.faults.duplicate_events(0.5)
        for _ in range(100):
            world.join(small)
        await client.wait_for("GUILD_MEMBER_ADD", 100)
        world.create_role(small)
        await client.wait_for("GUILD_ROLE_CREATE")
        events = [m for m in client.seen if m.get("t") == "GUILD_MEMBER_ADD"]
        by_sequence: dict[int, str] = {}
        for event in events:
            assert by_sequence.setdefault(event["s"], event["d"]["user"]["id"]) == event["d"]["user"]["id"]
        assert len(by_sequence) == 100
        assert len(events) > 100


async def test_pause_withholds_events_and_acknowledgements(simulator: Simulator, world: World, small: int) -> None:
    async with bare_client(simulator) as client:
        simulator.faults.pause()
        user_id = world.join(small)
        await client.send(1, None)
        with pytest.raises(TimeoutError):
            await client.receive(timeout=0.2)
        simulator.faults.resume()
        assert (await client.wait_for("GUILD_MEMBER_ADD"))[0]["d"]["user"]["id"] == str(user_id)
        assert 11 not in {message["op"] for message in client.seen}


async def test_invalidates_sessions_and_refuses_resumes(simulator: Simulator) -> None:
    async with bare_client(simulator) as client:
        session_id = client.seen[1]["d"]["session_id"]
        assert simulator.faults.invalidate_session(resumable=False) == 1
        assert (await client.wait_for(9))[0]["d"] is False
    async with bare_client(simulator, identify=False) as client:
        await client.send(6, {"token": simulator.token, "session_id": session_id, "seq": 1})
        assert (await client.wait_for(9))[0]["d"] is False


async def test_sends_every_kind_of_malformed_payload(simulator: Simulator, world: World, small: int) -> None:
    kinds = malformed_events(world.guild(small))
    async with bare_client(simulator) as client:
        for kind in kinds:
            simulator.faults.send_malformed(kind, small)
            try:
                await client.receive()
            except (ValueError, AttributeError):
                assert kind in ("invalid_json", "not_an_object")
    with pytest.raises(ValueError, match="choose from invalid_json"):
        simulator.faults.send_malformed("polite")
    assert simulator.faults.injected["inject_raw"] == len(kinds)


async def test_nul_and_lone_surrogates_are_sent_as_escapes(simulator: Simulator, world: World, small: int) -> None:
    user_id = world.join(small)
    async with bare_client(simulator, compress="zlib-stream") as client:
        world.rename_user(user_id, global_name="a\0b\ud800c")
        update = (await client.wait_for("GUILD_MEMBER_UPDATE"))[0]
        assert update["d"]["user"]["global_name"] == "a\0b\ud800c"
    row = next(row for row in world.expected_rows("users", small) if row["id"] == user_id)
    assert row["global_name"] == "a\ufffdb\ufffdc"


async def test_drops_all_sockets(simulator: Simulator) -> None:
    async with bare_client(simulator) as client:
        assert simulator.faults.drop_socket() == 1
        with pytest.raises(ConnectionError):
            await client.receive()
    await until(lambda: not simulator.gateway.connections)
    assert simulator.faults.drop_socket() == 0

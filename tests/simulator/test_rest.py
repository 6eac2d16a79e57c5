"""The REST routes: responses, errors and rate limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from simulator import Limits, Simulator, World
from tests.waiting import until


class Rest:
    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self.session = session
        self.base = base

    async def get(self, path: str, **query: Any) -> tuple[int, Any]:
        async with self.session.get(self.base + path, params=query) as response:
            return response.status, await response.json()


@pytest.fixture
async def rest(simulator: Simulator) -> AsyncIterator[Rest]:
    headers = {"Authorization": f"Bot {simulator.token}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        yield Rest(session, simulator.api_base)


async def test_requires_the_token(simulator: Simulator) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{simulator.api_base}/users/@me") as response:
        assert (response.status, await response.json()) == (401, {"message": "401: Unauthorized", "code": 0})


async def test_listings_omit_hidden_channels(rest: Rest, world: World, small: int) -> None:
    guild = world.guild(small)
    hidden = {channel.id for channel in guild.channels.values() if channel.hidden}
    status, listed = await rest.get(f"/guilds/{small}/channels")
    assert (status, {int(channel["id"]) for channel in listed}) == (200, guild.channels.keys() - hidden)
    assert len((await rest.get(f"/guilds/{small}/roles"))[1]) == len(guild.roles)
    for channel_id in hidden:
        status, error = await rest.get(f"/channels/{channel_id}")
        assert (status, error["code"]) == (403, 50001)


async def test_hidden_threads_are_forbidden_deleted_ones_unknown(rest: Rest, world: World, small: int) -> None:
    thread = next(iter(world.guild(small).threads.values()))
    status, found = await rest.get(f"/channels/{thread.id}")
    assert (status, found["thread_metadata"]["archived"]) == (200, thread.archived)
    world.hide_channel(small, thread.parent_id)
    assert (await rest.get(f"/channels/{thread.id}"))[1]["code"] == 50001
    assert (await rest.get(f"/channels/{thread.parent_id}/threads/archived/public"))[0] == 403
    active = (await rest.get(f"/guilds/{small}/threads/active"))[1]["threads"]
    assert str(thread.id) not in {found["id"] for found in active}
    world.delete_channel(small, thread.parent_id)
    assert (await rest.get(f"/channels/{thread.id}"))[1] == {"message": "Unknown Channel", "code": 10003}


async def test_members_page_by_id(rest: Rest, world: World, large: int) -> None:
    found: list[int] = []
    while True:
        _, page = await rest.get(f"/guilds/{large}/members", limit=1000, after=found[-1] if found else 0)
        found += [int(member["user"]["id"]) for member in page]
        if len(page) < 1000:
            break
    assert found == sorted(world.guild(large).members)
    assert (await rest.get(f"/guilds/{large}/members", limit=1001))[0] == 400
    assert (await rest.get(f"/guilds/{large}/members/{found[5]}"))[1]["user"]["id"] == str(found[5])
    assert (await rest.get(f"/guilds/{large}/members/5"))[1]["code"] == 10007


async def test_members_require_their_intent(world: World, small: int) -> None:
    async with Simulator(world, privileged_intents=0) as simulator, aiohttp.ClientSession() as session:
        rest = Rest(session, simulator.api_base)
        session.headers["Authorization"] = f"Bot {simulator.token}"
        assert (await rest.get(f"/guilds/{small}/members"))[1] == {"message": "Missing Access", "code": 50001}


async def test_returns_gateway_and_application(rest: Rest, simulator: Simulator, world: World) -> None:
    assert (await rest.get("/gateway"))[1] == {"url": simulator.gateway_url}
    assert (await rest.get("/gateway/bot"))[1]["shards"] == 1
    for path in ("/oauth2/applications/@me", "/applications/@me"):
        assert (await rest.get(path))[1]["owner"]["id"] == str(world.operator_id)


async def test_guild_returns_counts_or_an_error(rest: Rest, world: World, small: int) -> None:
    assert (await rest.get(f"/guilds/{small}", with_counts="true"))[1]["approximate_member_count"] == 40
    assert (await rest.get("/guilds/5"))[1]["code"] == 10004
    world.guild_outage(small)
    assert (await rest.get(f"/guilds/{small}"))[0] == 503
    world.guild_restore(small)
    world.remove_bot(small)
    assert (await rest.get(f"/guilds/{small}"))[1]["code"] == 50001
    status, error = await rest.get("/nowhere/at/all")
    assert (status, error["code"], error["message"][:14]) == (404, 0, "404: Not Found")


async def test_global_limit_returns_429_with_headers(world: World) -> None:
    limits = Limits(rest_per_second=5)
    async with Simulator(world, limits=limits) as simulator, aiohttp.ClientSession() as session:
        session.headers["Authorization"] = f"Bot {simulator.token}"
        for _ in range(5):
            async with session.get(f"{simulator.api_base}/users/@me") as response:
                assert response.status == 200
        async with session.get(f"{simulator.api_base}/users/@me") as response:
            body = await response.json()
            assert (response.status, body["global"]) == (429, True)
            assert 0 < body["retry_after"] <= 1
            assert response.headers["X-RateLimit-Global"] == "true"
            assert float(response.headers["Retry-After"]) > 0
        assert simulator.rules.limited == 1


async def test_route_has_its_own_bucket(world: World) -> None:
    limits = Limits(route_limit=1, route_window=30)
    async with Simulator(world, limits=limits) as simulator, aiohttp.ClientSession() as session:
        session.headers["Authorization"] = f"Bot {simulator.token}"
        async with session.get(f"{simulator.api_base}/users/@me") as response:
            assert response.headers["X-RateLimit-Remaining"] == "0"
        async with session.get(f"{simulator.api_base}/users/@me") as response:
            assert (response.status, (await response.json())["global"]) == (429, False)


async def test_routes_fail_the_given_number_of_times(rest: Rest, simulator: Simulator, small: int) -> None:
    simulator.faults.rest_fail("/members", status=502, times=2)
    simulator.faults.rest_fail("/roles", status=429, retry_after=0.5)
    assert [(await rest.get(f"/guilds/{small}/members"))[0] for _ in range(3)] == [502, 502, 200]
    status, body = await rest.get(f"/guilds/{small}/roles")
    assert (status, body["retry_after"]) == (429, 0.5)
    assert simulator.faults.injected["rest_fail"] == 3


async def test_delayed_response_shows_state_at_request_time(
    rest: Rest, simulator: Simulator, world: World, small: int
) -> None:
    simulator.faults.rest_delay(f"/guilds/{small}/roles", 0.2, times=1)
    asked = asyncio.create_task(rest.get(f"/guilds/{small}/roles"))
    await until(lambda: simulator.faults.injected["rest_delay"] == 1)
    await until(lambda: simulator.rules.answered > 0)
    role_id = world.create_role(small)
    assert str(role_id) not in {role["id"] for role in (await asked)[1]}
    assert str(role_id) in {role["id"] for role in (await rest.get(f"/guilds/{small}/roles"))[1]}


async def test_archived_threads_are_paged_newest_first(rest: Rest, world: World, small: int) -> None:
    place = next(c.id for c in world.guild(small).channels.values() if c.type == 5)
    for thread_id in [world.create_thread(small, place) for _ in range(7)]:
        world.archive_thread(small, thread_id)
    wanted = [row for row in world.expected_rows("threads", small) if row["parent_id"] == place and row["archived"]]
    path = f"/channels/{place}/threads/archived/public"
    found: list[int] = []
    before: dict[str, str] = {}
    while True:
        _, page = await rest.get(path, limit=3, **before)
        found += [int(thread["id"]) for thread in page["threads"]]
        if not page["has_more"]:
            break
        before = {"before": page["threads"][-1]["thread_metadata"]["archive_timestamp"]}
    order = sorted(wanted, key=lambda row: str(row["archived_at"]), reverse=True)
    assert found == [row["id"] for row in order]

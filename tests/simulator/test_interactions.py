"""Interactions: response deadline, single response, token lifetime."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from simulator import InteractionResult, Simulator, World
from tests.simulator.clients import bare_client


async def answer(simulator: Simulator, result: InteractionResult, body: dict[str, Any]) -> tuple[int, Any]:
    url = f"{simulator.api_base}/interactions/{result.id}/{result.token}/callback"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.json() if response.status != 204 else None


async def original(simulator: Simulator, token: str, method: str = "GET", **how: Any) -> tuple[int, Any]:
    url = f"{simulator.api_base}/webhooks/{simulator.world.application_id}/{token}/messages/@original"
    async with aiohttp.ClientSession() as session, session.request(method, url, **how) as response:
        return response.status, await response.json() if response.status != 204 else None


async def register(simulator: Simulator, guild_id: int | None = None) -> None:
    place = "" if guild_id is None else f"/guilds/{guild_id}"
    url = f"{simulator.api_base}/applications/{simulator.world.application_id}{place}/commands"
    headers = {"Authorization": f"Bot {simulator.token}"}
    options = [{"name": "role", "type": 8, "description": "a role", "required": False}]
    commands = [{"name": "ask", "type": 1, "description": "Ask", "options": options}]
    async with aiohttp.ClientSession(headers=headers) as session, session.put(url, json=commands) as response:
        assert response.status == 200


async def test_second_response_is_rejected(simulator: Simulator, world: World, small: int) -> None:
    await register(simulator)
    async with bare_client(simulator) as client:
        result = await simulator.run_command("ask", user_id=world.guild(small).owner_id, guild_id=small)
        told = (await client.wait_for("INTERACTION_CREATE"))[0]["d"]
        assert (told["id"], told["data"]["name"], told["guild_id"]) == (str(result.id), "ask", str(small))
        assert (await original(simulator, result.token))[1]["code"] == 10008
        assert (await answer(simulator, result, {"type": 5, "data": {"flags": 64}}))[0] == 204
        assert (await answer(simulator, result, {"type": 4, "data": {"content": "x"}}))[1]["code"] == 40060
        assert (await original(simulator, result.token, "PATCH", json={"content": "edited"}))[0] == 200
        await result.wait_done()
        assert (result.deferred, result.ephemeral, result.final_content) == (True, True, "edited")
        assert (await original(simulator, result.token, "DELETE"))[0] == 204
        assert (await original(simulator, result.token))[0] == 404


async def test_late_response_and_expired_token_are_rejected(simulator: Simulator, world: World, small: int) -> None:
    await register(simulator)
    owner = world.guild(small).owner_id
    async with bare_client(simulator):
        simulator.interactions.response_deadline = 0
        late = await simulator.run_command("ask", user_id=owner, guild_id=small)
        assert (await answer(simulator, late, {"type": 5}))[1]["code"] == 10062
        simulator.interactions.response_deadline = 3
        result = await simulator.run_command("ask", user_id=owner, guild_id=small)
        await answer(simulator, result, {"type": 5})
        simulator.interactions.token_lifetime = 0
        assert (await original(simulator, result.token, "PATCH", json={"content": "x"}))[1]["code"] == 50027


async def test_commands_run_only_where_registered(simulator: Simulator, world: World, small: int) -> None:
    await register(simulator, small)
    assert simulator.interactions.syncs == {small: 1}
    async with bare_client(simulator) as client:
        with pytest.raises(LookupError, match="no command /ask is registered for direct messages"):
            await simulator.run_command("ask", user_id=world.operator_id)
        owner = world.guild(small).owner_id
        with pytest.raises(LookupError, match="has no option 'colour'"):
            await simulator.run_command("ask", user_id=owner, guild_id=small, options={"colour": 1})
        role = next(iter(world.guild(small).roles))
        await simulator.run_command("ask", user_id=owner, guild_id=small, options={"role": role})
        data = (await client.wait_for("INTERACTION_CREATE"))[0]["d"]["data"]
        assert data["guild_id"] == str(small)
        assert data["options"] == [{"name": "role", "type": 8, "value": str(role)}]
        assert data["resolved"]["roles"][str(role)]["id"] == str(role)


async def test_wait_done_times_out_with_a_message(simulator: Simulator, world: World, small: int) -> None:
    await register(simulator)
    async with bare_client(simulator):
        result = await simulator.run_command("ask", user_id=world.guild(small).owner_id, guild_id=small)
        with pytest.raises(TimeoutError, match=r"not done after 0\.1 s"):
            await result.wait_done(0.1)

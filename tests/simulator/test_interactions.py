"""Interactions: response deadline, single response, token lifetime."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from simulator import InteractionResult, Simulator, World
from tests.simulator.clients import bare_client

MODAL = {
    "custom_id": "why", "title": "Why",
    "components": [{"type": 1, "components": [{"type": 4, "custom_id": "reason", "label": "Reason", "style": 1}]}],
}  # fmt: skip


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
    commands: list[dict[str, Any]] = [{"name": "ask", "type": 1, "description": "Ask", "options": options}]
    commands += [{"name": "Look", "type": 2}, {"name": "Quote", "type": 3}]
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


async def test_each_kind_of_interaction_gets_its_own_responses(simulator: Simulator, world: World, small: int) -> None:
    await register(simulator, small)
    owner = world.guild(small).owner_id
    text, form = {"type": 4, "data": {"content": "x"}}, {"type": 9, "data": MODAL}
    async with bare_client(simulator) as client:
        typed = await simulator.autocomplete("ask", user_id=owner, guild_id=small, focused="role")
        data = (await client.wait_for("INTERACTION_CREATE"))[0]["d"]["data"]
        assert data["options"] == [{"name": "role", "type": 8, "value": "", "focused": True}]
        assert (await answer(simulator, typed, text))[1]["code"] == 50035
        assert (await answer(simulator, typed, {"type": 8, "data": {"choices": []}}))[0] == 204
        assert typed.choices == []
        asked = await simulator.run_command("ask", user_id=owner, guild_id=small)
        assert (await answer(simulator, asked, {"type": 6}))[1]["code"] == 50035
        assert (await answer(simulator, asked, form))[0] == 204
        with pytest.raises(LookupError, match="the form 'Why' has no field age"):
            await simulator.submit(asked, {"age": "5"}, user_id=owner)
        sent = await simulator.submit(asked, {"Reason": "because"}, user_id=owner)
        data = (await client.wait_for("INTERACTION_CREATE", 2))[1]["d"]["data"]
        assert data["components"][0]["components"] == [{"type": 4, "custom_id": "reason", "value": "because"}]
        assert (await answer(simulator, sent, form))[1]["code"] == 50035
        assert (await answer(simulator, sent, {"type": 6}))[1]["code"] == 50035, "there is no message to update"


async def test_selected_values_and_targets_of_menus_are_resolved(
    simulator: Simulator, world: World, small: int
) -> None:
    await register(simulator, small)
    owner = world.guild(small).owner_id
    async with bare_client(simulator) as client:
        await simulator.use_menu("Look", user_id=owner, guild_id=small, target_id=owner)
        data = (await client.wait_for("INTERACTION_CREATE"))[0]["d"]["data"]
        assert (data["target_id"], set(data["resolved"]["members"])) == (str(owner), {str(owner)})
        quoted = {"author_id": owner, "content": "hello"}
        await simulator.use_menu("Quote", user_id=owner, guild_id=small, target_id=77, message=quoted)
        data = (await client.wait_for("INTERACTION_CREATE"))[0]["d"]["data"]
        assert data["resolved"]["messages"]["77"]["content"] == "hello"
        asked = await simulator.run_command("ask", user_id=owner, guild_id=small)
        menu = {"type": 1, "components": [{"type": 5, "custom_id": "who"}]}
        await answer(simulator, asked, {"type": 4, "data": {"content": "x", "components": [menu]}})
        with pytest.raises(LookupError, match="no menu 'whom'"):
            await simulator.select(asked, "whom", [str(owner)], user_id=owner)
        await simulator.select(asked, "who", [str(owner)], user_id=owner)
        data = (await client.wait_for("INTERACTION_CREATE", 2))[1]["d"]["data"]
        assert (data["component_type"], data["values"]) == (5, [str(owner)])
        assert set(data["resolved"]["users"]) == {str(owner)}

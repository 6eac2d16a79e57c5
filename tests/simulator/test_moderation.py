"""The REST routes that change members: what they do, and which permission each needs."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from simulator import Simulator, World
from simulator.entities import Permission

_ALL = Permission.BAN_MEMBERS | Permission.KICK_MEMBERS | Permission.MODERATE_MEMBERS | Permission.MANAGE_ROLES


async def _send(simulator: Simulator, method: str, path: str, **body: Any) -> int:
    """Send a request as the bot; return the status or Discord's error code."""
    headers = {"Authorization": f"Bot {simulator.token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request(method, simulator.api_base + path, json=body) as response,
    ):
        return response.status if response.status < 400 else int((await response.json())["code"])


@pytest.fixture
def user_id(world: World, small: int) -> int:
    """A member who is neither a bot nor the owner."""
    guild = world.guild(small)
    return next(id for id in guild.ordered_member_ids() if id != guild.owner_id and not world.user(id).bot)


async def test_bans_kicks_and_timeouts_change_the_world(
    simulator: Simulator, world: World, small: int, user_id: int
) -> None:
    guild, path = world.guild(small), f"/guilds/{small}"
    world.grant(small, _ALL)
    role_id = next(id for id in guild.roles if id != small and id not in guild.members[user_id].roles)
    until = "2027-01-01T00:00:00+00:00"
    assert await _send(simulator, "PATCH", f"{path}/members/{user_id}", communication_disabled_until=until) == 200
    assert guild.members[user_id].timed_out_until is not None
    assert await _send(simulator, "PUT", f"{path}/members/{user_id}/roles/{role_id}") == 204
    assert role_id in guild.members[user_id].roles
    assert await _send(simulator, "DELETE", f"{path}/members/{user_id}/roles/{role_id}") == 204
    assert role_id not in guild.members[user_id].roles
    assert await _send(simulator, "DELETE", f"{path}/members/{user_id}") == 204
    assert await _send(simulator, "DELETE", f"{path}/members/{user_id}") == 10007
    assert await _send(simulator, "PUT", f"{path}/bans/{user_id}") == 204
    assert user_id in guild.bans
    assert await _send(simulator, "DELETE", f"{path}/bans/{user_id}") == 204
    assert await _send(simulator, "DELETE", f"{path}/bans/{user_id}") == 10026


@pytest.mark.parametrize(
    ("method", "path", "permission"),
    [
        ("PUT", "bans/{user}", Permission.BAN_MEMBERS),
        ("DELETE", "bans/{user}", Permission.BAN_MEMBERS),
        ("DELETE", "members/{user}", Permission.KICK_MEMBERS),
        ("PATCH", "members/{user}", Permission.MODERATE_MEMBERS),
        ("PUT", "members/{user}/roles/1", Permission.MANAGE_ROLES),
        ("DELETE", "members/{user}/roles/1", Permission.MANAGE_ROLES),
    ],
)
async def test_needs_the_permission(
    simulator: Simulator, world: World, small: int, user_id: int, method: str, path: str, permission: Permission
) -> None:
    world.grant(small, _ALL & ~permission)
    sent = await _send(
        simulator, method, f"/guilds/{small}/{path.format(user=user_id)}", communication_disabled_until=None
    )
    assert sent == 50013
    assert user_id in world.guild(small).members

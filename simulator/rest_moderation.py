"""REST routes with which a bot acts on members: bans, kicks, timeouts, nicknames, roles."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .entities import Guild, Permission
from .member_mutations import UNSET
from .payloads import member_payload
from .rest import (
    API,
    INVALID_FORM,
    MISSING_PERMISSIONS,
    UNKNOWN_BAN,
    UNKNOWN_MEMBER,
    UNKNOWN_ROLE,
    UNKNOWN_USER,
    ApiError,
    answer,
    path_id,
    read_body,
    visible_guild,
)

if TYPE_CHECKING:
    from .server import Simulator

#: The permission that each field of PATCH /guilds/{id}/members/{id} needs.
_FIELDS: Mapping[str, Permission] = {
    "nick": Permission.MANAGE_NICKNAMES,
    "roles": Permission.MANAGE_ROLES,
    "communication_disabled_until": Permission.MODERATE_MEMBERS,
}


class ModerationRoutes:
    """Routes under `/guilds` that change members; each sends the events that Discord sends for it."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._world = simulator.world

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class."""
        guild = f"{API}/guilds/{{guild_id}}"
        return [
            web.put(f"{guild}/bans/{{user_id}}", self.ban),
            web.delete(f"{guild}/bans/{{user_id}}", self.unban),
            web.delete(f"{guild}/members/{{user_id}}", self.kick),
            web.patch(f"{guild}/members/{{user_id}}", self.edit),
            web.put(f"{guild}/members/{{user_id}}/roles/{{role_id}}", self.add_role),
            web.delete(f"{guild}/members/{{user_id}}/roles/{{role_id}}", self.remove_role),
        ]

    async def ban(self, request: web.Request) -> web.Response:
        guild = self._permitted(request, Permission.BAN_MEMBERS)
        user_id = path_id(request, "user_id")
        if user_id not in self._world.users:
            raise ApiError(*UNKNOWN_USER)
        if user_id == guild.owner_id:
            raise ApiError(*MISSING_PERMISSIONS)
        if user_id not in guild.bans:
            self._world.ban(guild.id, user_id)
        return web.Response(status=204)

    async def unban(self, request: web.Request) -> web.Response:
        guild = self._permitted(request, Permission.BAN_MEMBERS)
        user_id = path_id(request, "user_id")
        if user_id not in guild.bans:
            raise ApiError(*UNKNOWN_BAN)
        self._world.unban(guild.id, user_id)
        return web.Response(status=204)

    async def kick(self, request: web.Request) -> web.Response:
        guild, user_id = self._member(request, Permission.KICK_MEMBERS)
        if user_id == guild.owner_id:
            raise ApiError(*MISSING_PERMISSIONS)
        self._world.leave(guild.id, user_id)
        return web.Response(status=204)

    async def edit(self, request: web.Request) -> web.Response:
        body = await read_body(request)
        guild, user_id = self._member(request, *(_FIELDS[name] for name in body.keys() & _FIELDS.keys()))
        until: Any = body.get("communication_disabled_until", UNSET)
        try:
            self._world.update_member(
                guild.id,
                user_id,
                nick=body.get("nick", UNSET),
                roles=[int(id) for id in body["roles"]] if "roles" in body else UNSET,
                timed_out_until=datetime.fromisoformat(until) if isinstance(until, str) else until,
            )
        except (TypeError, ValueError):
            raise ApiError(*INVALID_FORM) from None
        return answer(member_payload(guild.members[user_id]))

    async def add_role(self, request: web.Request) -> web.Response:
        guild, user_id = self._member(request, Permission.MANAGE_ROLES)
        roles = guild.members[user_id].roles
        if (role_id := self._role(request, guild)) not in roles:
            self._world.update_member(guild.id, user_id, roles=(*roles, role_id))
        return web.Response(status=204)

    async def remove_role(self, request: web.Request) -> web.Response:
        guild, user_id = self._member(request, Permission.MANAGE_ROLES)
        roles = guild.members[user_id].roles
        if (role_id := self._role(request, guild)) in roles:
            self._world.update_member(guild.id, user_id, roles=[id for id in roles if id != role_id])
        return web.Response(status=204)

    def _permitted(self, request: web.Request, *permissions: Permission) -> Guild:
        guild = visible_guild(self._simulator, request)
        if any(not guild.granted() & permission for permission in permissions):
            raise ApiError(*MISSING_PERMISSIONS)
        return guild

    def _member(self, request: web.Request, *permissions: Permission) -> tuple[Guild, int]:
        guild, user_id = self._permitted(request, *permissions), path_id(request, "user_id")
        if user_id not in guild.members:
            raise ApiError(*UNKNOWN_MEMBER)
        return guild, user_id

    def _role(self, request: web.Request, guild: Guild) -> int:
        role_id = path_id(request, "role_id")
        if role_id not in guild.roles or role_id == guild.id:
            raise ApiError(*UNKNOWN_ROLE)
        return role_id

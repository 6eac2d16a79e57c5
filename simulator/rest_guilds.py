"""REST routes of the bot's account, guilds and members."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from aiohttp import web

from .entities import Json
from .payloads import (
    channel_payload,
    guild_payload,
    member_payload,
    members_json,
    own_user_payload,
    role_payload,
    thread_member_payload,
    thread_payload,
    user_payload,
)
from .rest import API, MISSING_ACCESS, UNKNOWN_MEMBER, UNKNOWN_USER, ApiError, answer, number, path_id, visible_guild
from .state import Intent

if TYPE_CHECKING:
    from .server import Simulator


def _gateway_url(request: web.Request) -> str:
    # A client that connected through a proxy must also use it for the gateway.
    return f"ws://{request.host}/gateway"


class GuildRoutes:
    """Routes under `/gateway`, `/users`, `/applications/@me` and `/guilds`."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._world = simulator.world

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this class."""
        guild = f"{API}/guilds/{{guild_id}}"
        return [
            web.get(f"{API}/gateway", self.gateway),
            web.get(f"{API}/gateway/bot", self.gateway_bot),
            web.get(f"{API}/users/@me", self.own_user),
            web.get(f"{API}/users/@me/guilds", self.own_guilds),
            web.get(f"{API}/users/{{user_id}}", self.user),
            web.get(f"{API}/oauth2/applications/@me", self.application),
            web.get(f"{API}/applications/@me", self.application),
            web.get(guild, self.guild),
            web.get(f"{guild}/channels", self.channels),
            web.get(f"{guild}/roles", self.roles),
            web.get(f"{guild}/members", self.members),
            web.get(f"{guild}/members/{{user_id}}", self.member),
            web.get(f"{guild}/threads/active", self.active_threads),
        ]

    async def gateway(self, request: web.Request) -> web.Response:
        return answer({"url": _gateway_url(request)})

    async def gateway_bot(self, request: web.Request) -> web.Response:
        limit = {"total": 1000, "remaining": 1000, "reset_after": 86_400_000, "max_concurrency": 1}
        return answer({"url": _gateway_url(request), "shards": 1, "session_start_limit": limit})

    async def own_user(self, request: web.Request) -> web.Response:
        return answer(own_user_payload(self._world.bot))

    async def own_guilds(self, request: web.Request) -> web.Response:
        limit, after = number(request, "limit", 200, 1, 200), number(request, "after", 0, 0, (1 << 64) - 1)
        found = sorted((g for g in self._world.guilds.values() if g.present and g.id > after), key=lambda g: g.id)
        names = ("name", "icon", "banner", "features")
        return answer(
            [
                {"id": str(guild.id), "owner": False, "permissions": str(guild.granted())}
                | {name: getattr(guild, name) for name in names}
                for guild in found[:limit]
            ]
        )

    async def user(self, request: web.Request) -> web.Response:
        user = self._world.users.get(path_id(request, "user_id"))
        if user is None:
            raise ApiError(*UNKNOWN_USER)
        return answer(user_payload(user) | {"banner": None, "accent_color": None})

    async def application(self, request: web.Request) -> web.Response:
        world = self._world
        payload: Json = {
            "id": str(world.application_id),
            "name": world.bot.username,
            "icon": None,
            "description": "",
            "bot_public": True,
            "bot_require_code_grant": False,
            "verify_key": "0" * 64,
            "flags": self._simulator.application_flags,
            "owner": user_payload(world.users[world.operator_id]),
            "bot": user_payload(world.bot),
            "team": None,
            "interactions_endpoint_url": None,
            "redirect_uris": [],
            "approximate_guild_count": sum(guild.present for guild in world.guilds.values()),
        }
        return answer(payload)

    async def guild(self, request: web.Request) -> web.Response:
        guild = visible_guild(self._simulator, request)
        payload = guild_payload(guild)
        if request.query.get("with_counts", "").lower() in ("true", "1"):
            payload |= {"approximate_member_count": len(guild.members), "approximate_presence_count": 1}
        return answer(payload)

    async def channels(self, request: web.Request) -> web.Response:
        guild = visible_guild(self._simulator, request)
        return answer([channel_payload(channel) for channel in guild.channels.values() if not channel.hidden])

    async def roles(self, request: web.Request) -> web.Response:
        guild = visible_guild(self._simulator, request)
        return answer([role_payload(role) for role in guild.roles.values()])

    async def members(self, request: web.Request) -> web.Response:
        guild = visible_guild(self._simulator, request)
        if not self._simulator.privileged_intents & Intent.GUILD_MEMBERS:
            raise ApiError(*MISSING_ACCESS)
        limit = number(request, "limit", 1, 1, 1000)
        after = number(request, "after", 0, 0, (1 << 64) - 1)
        ids = guild.ordered_member_ids()
        start = bisect_right(ids, after)
        body = members_json(guild.members[user_id] for user_id in ids[start : start + limit])
        return web.Response(body=b"[" + body + b"]", content_type="application/json")

    async def member(self, request: web.Request) -> web.Response:
        guild = visible_guild(self._simulator, request)
        member = guild.members.get(path_id(request, "user_id"))
        if member is None:
            raise ApiError(*UNKNOWN_MEMBER)
        return answer(member_payload(member))

    async def active_threads(self, request: web.Request) -> web.Response:
        guild = visible_guild(self._simulator, request)
        bot_id = self._world.bot.id
        active = [t for t in guild.threads.values() if not t.archived and guild.sees(t.id)]
        active.sort(key=lambda thread: -thread.id)
        joined = [thread_member_payload(thread, bot_id) for thread in active if thread.joined]
        return answer({"threads": [thread_payload(thread, bot_id) for thread in active], "members": joined})

"""REST: authorization, rate limits, fault injection and error responses of all routes."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from .entities import Channel, Guild, Json, Thread
from .limits import SlidingWindow
from .payloads import to_bytes

if TYPE_CHECKING:
    from .server import Simulator

API = "/api/v10"
_Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Webhook and interaction routes have their own token and do not count against the global limit.
_TOKENLESS = re.compile(rf"^{API}/(webhooks/\d+/[^/]+|interactions/\d+/[^/]+/callback|gateway$)")
_MAX_BUCKETS = 10_000


class ApiError(Exception):
    """An error response with one of Discord's documented codes."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


UNKNOWN_CHANNEL = (404, 10003, "Unknown Channel")
UNKNOWN_GUILD = (404, 10004, "Unknown Guild")
UNKNOWN_MEMBER = (404, 10007, "Unknown Member")
UNKNOWN_MESSAGE = (404, 10008, "Unknown Message")
UNKNOWN_ROLE = (404, 10011, "Unknown Role")
UNKNOWN_USER = (404, 10013, "Unknown User")
UNKNOWN_WEBHOOK = (404, 10015, "Unknown Webhook")
UNKNOWN_BAN = (404, 10026, "Unknown Ban")
UNKNOWN_INTERACTION = (404, 10062, "Unknown interaction")
ALREADY_ACKNOWLEDGED = (400, 40060, "Interaction has already been acknowledged.")
MISSING_ACCESS = (403, 50001, "Missing Access")
MISSING_PERMISSIONS = (403, 50013, "Missing Permissions")
INVALID_WEBHOOK_TOKEN = (401, 50027, "Invalid Webhook Token")
INVALID_FORM = (400, 50035, "Invalid Form Body")
NOT_FOUND = (404, 0, "404: Not Found")


def answer(payload: object, status: int = 200) -> web.Response:
    """Return a JSON response."""
    return web.Response(body=to_bytes(payload), status=status, content_type="application/json")


async def read_body(request: web.Request) -> Json:
    """Read a JSON body, or the `payload_json` part of a multipart form."""
    if request.content_type.startswith("multipart/"):
        part = (await request.post()).get("payload_json")
        text = part if isinstance(part, str) else "{}"
    else:
        text = await request.text()
    try:
        body = json.loads(text or "{}")
    except ValueError:
        raise ApiError(400, 50109, "The request body contains invalid JSON.") from None
    if not isinstance(body, dict):
        raise ApiError(*INVALID_FORM)
    return body


def number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """Read an integer from the query string. Raises `ApiError` if it is out of range."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isdigit() or not low <= int(text) <= high:
        raise ApiError(*INVALID_FORM)
    return int(text)


class RestRules:
    """Middleware of all routes: authorization, rate limits and fault injection."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._global_limit = SlidingWindow(simulator.limits.rest_per_second, 1.0)
        self._buckets: dict[str, SlidingWindow] = {}
        self.requests: Counter[str] = Counter()
        #: Requests answered with 403, injected faults aside.
        self.refused: Counter[str] = Counter()
        self.limited = 0
        self.answered = 0

    def applied_to(self, handler: _Answer) -> _Answer:
        """Return the handler with these rules in front of it.

        Not a middleware: aiohttp caches those with the handlers they wrap, and so keeps every simulator alive.
        """

        async def apply(request: web.Request) -> web.StreamResponse:
            return await self._apply(request, handler)

        return apply

    async def _apply(self, request: web.Request, handler: _Answer) -> web.StreamResponse:
        """Apply the rules to a request, then call its route."""
        if not request.path.startswith(API):
            return await handler(request)
        simulator = self._simulator
        route = f"{request.method} {request.path[len(API) :]}"
        self.requests[route] += 1
        if len(self.requests) > _MAX_BUCKETS:
            del self.requests[next(iter(self.requests))]
        fault, delay = simulator.faults.take_rest_fault(route)
        if simulator.limits.rest_latency:
            await asyncio.sleep(simulator.limits.rest_latency)
        if fault is not None and fault.status == 429:
            return self._rate_limited(fault.retry_after, scope="user")
        if fault is not None:
            return answer({"message": f"{fault.status}: injected fault", "code": 0}, fault.status or 500)
        headers: dict[str, str] = {}
        if not _TOKENLESS.match(request.path):
            if request.headers.get("Authorization") != f"Bot {simulator.token}":
                return answer({"message": "401: Unauthorized", "code": 0}, 401)
            wait = self._global_limit.take()
            if wait:
                return self._rate_limited(wait, scope="global")
            if simulator.limits.route_limit is not None:
                bucket = self._bucket(route)
                wait = bucket.take()
                if wait:
                    return self._rate_limited(wait, scope="user")
                window = simulator.limits.route_window
                headers = {"X-RateLimit-Limit": str(simulator.limits.route_limit), "X-RateLimit-Bucket": "simulated"}
                headers |= {"X-RateLimit-Remaining": f"{bucket.remaining:.0f}"}
                headers |= {"X-RateLimit-Reset-After": f"{window:.3f}", "X-RateLimit-Reset": "0"}
        try:
            response = await handler(request)
        except ApiError as exc:
            response = answer({"message": str(exc), "code": exc.code}, exc.status)
        except web.HTTPException as exc:
            response = answer({"message": f"{exc.status}: {exc.reason}", "code": 0}, exc.status)
        if response.status == 403:
            self.refused[route] += 1
        response.headers.update(headers)
        self.answered += 1
        # The delayed response shows the state at the time of the request.
        if delay:
            await asyncio.sleep(delay)
        return response

    def _bucket(self, route: str) -> SlidingWindow:
        if len(self._buckets) >= _MAX_BUCKETS:
            self._buckets.clear()
        limits = self._simulator.limits
        return self._buckets.setdefault(route, SlidingWindow(limits.route_limit or 0, limits.route_window))

    def _rate_limited(self, seconds: float, *, scope: str) -> web.Response:
        self.limited += 1
        is_global = scope == "global"
        body = {"message": "You are being rate limited.", "retry_after": round(seconds, 3), "global": is_global}
        response = answer(body, 429)
        # discord.py treats a 429 without a Via header as a ban by Cloudflare.
        response.headers.update({"Retry-After": f"{seconds:.3f}", "Via": "1.1 google", "X-RateLimit-Scope": scope})
        if is_global:
            response.headers["X-RateLimit-Global"] = "true"
        return response


def visible_guild(simulator: Simulator, request: web.Request) -> Guild:
    """Return the guild in the path. Raises `ApiError` if the bot cannot access it."""
    guild = simulator.world.guilds.get(path_id(request, "guild_id"))
    if guild is None:
        raise ApiError(*UNKNOWN_GUILD)
    return require_access(guild)


def require_access(guild: Guild) -> Guild:
    """Return the guild. Raises `ApiError` if the bot is not in it or it is unavailable."""
    if not guild.present:
        raise ApiError(*MISSING_ACCESS)
    if not guild.available:
        raise ApiError(503, 0, "503: Service Unavailable")
    return guild


def visible_channel(simulator: Simulator, request: web.Request) -> tuple[Guild, Channel | Thread]:
    """Return the channel or thread in the path. Raises `ApiError`: 404 if unknown, 403 if hidden."""
    channel_id = path_id(request, "channel_id")
    found = simulator.world.find_channel(channel_id)
    if found is None:
        raise ApiError(*UNKNOWN_CHANNEL)
    guild, channel = found
    if not require_access(guild).sees(channel_id):
        raise ApiError(*MISSING_ACCESS)
    return guild, channel


def path_id(request: web.Request, name: str) -> int:
    """Read an id from the path."""
    text = request.match_info[name]
    if not text.isdigit():
        raise ApiError(*INVALID_FORM)
    return int(text)

"""REST: authorization, rate limits, faults and the error form that every route shares."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from aiohttp import web

from .entities import Channel, Guild, Json, Thread
from .limits import Window
from .payloads import to_bytes

if TYPE_CHECKING:
    from .server import Simulator

API = "/api/v10"
_Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
# Webhook and interaction routes carry their own token, and the global limit does not count them.
_TOKENLESS = re.compile(rf"^{API}/(webhooks/\d+/[^/]+|interactions/\d+/[^/]+/callback|gateway$)")
_MAX_BUCKETS = 10_000


class ApiError(Exception):
    """An answer in Discord's error form; the codes are those of its documentation."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


UNKNOWN_CHANNEL = (404, 10003, "Unknown Channel")
UNKNOWN_GUILD = (404, 10004, "Unknown Guild")
UNKNOWN_MEMBER = (404, 10007, "Unknown Member")
UNKNOWN_MESSAGE = (404, 10008, "Unknown Message")
UNKNOWN_USER = (404, 10013, "Unknown User")
UNKNOWN_WEBHOOK = (404, 10015, "Unknown Webhook")
UNKNOWN_INTERACTION = (404, 10062, "Unknown interaction")
ALREADY_ACKNOWLEDGED = (400, 40060, "Interaction has already been acknowledged.")
MISSING_ACCESS = (403, 50001, "Missing Access")
INVALID_WEBHOOK_TOKEN = (401, 50027, "Invalid Webhook Token")
INVALID_FORM = (400, 50035, "Invalid Form Body")
NOT_FOUND = (404, 0, "404: Not Found")


def answer(payload: object, status: int = 200) -> web.Response:
    """Answer with JSON."""
    return web.Response(body=to_bytes(payload), status=status, content_type="application/json")


async def read_body(request: web.Request) -> Json:
    """Read a JSON body, also out of the `payload_json` part of a multipart form."""
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
    """Read a number from the query string, refusing what is out of range."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isdigit() or not low <= int(text) <= high:
        raise ApiError(*INVALID_FORM)
    return int(text)


class RestRules:
    """What stands before every route: who may ask, how often, and the lies told about it."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._everything = Window(simulator.limits.rest_per_second, 1.0)
        self._buckets: dict[str, Window] = {}
        self.requests: Counter[str] = Counter()
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
        """Apply the rules to a request, then let its route answer."""
        if not request.path.startswith(API):
            return await handler(request)
        simulator = self._simulator
        asked = f"{request.method} {request.path[len(API) :]}"
        self.requests[asked] += 1
        if len(self.requests) > _MAX_BUCKETS:
            del self.requests[next(iter(self.requests))]
        fault, delay = simulator.faults.take_rest_fault(asked)
        if simulator.limits.rest_latency:
            await asyncio.sleep(simulator.limits.rest_latency)
        if fault is not None and fault.status == 429:
            return self._too_many(fault.retry_after, scope="user")
        if fault is not None:
            return answer({"message": f"{fault.status}: fault", "code": 0}, fault.status or 500)
        headers: dict[str, str] = {}
        if not _TOKENLESS.match(request.path):
            if request.headers.get("Authorization") != f"Bot {simulator.token}":
                return answer({"message": "401: Unauthorized", "code": 0}, 401)
            wait = self._everything.take()
            if wait:
                return self._too_many(wait, scope="global")
            if simulator.limits.route_limit is not None:
                bucket = self._bucket(asked)
                wait = bucket.take()
                if wait:
                    return self._too_many(wait, scope="user")
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
        response.headers.update(headers)
        self.answered += 1
        # Late means stale: the answer was true when the request came in.
        if delay:
            await asyncio.sleep(delay)
        return response

    def _bucket(self, asked: str) -> Window:
        if len(self._buckets) >= _MAX_BUCKETS:
            self._buckets.clear()
        limits = self._simulator.limits
        return self._buckets.setdefault(asked, Window(limits.route_limit or 0, limits.route_window))

    def _too_many(self, seconds: float, *, scope: str) -> web.Response:
        self.limited += 1
        everywhere = scope == "global"
        body = {"message": "You are being rate limited.", "retry_after": round(seconds, 3), "global": everywhere}
        response = answer(body, 429)
        # discord.py takes a 429 without Via for a ban by Cloudflare.
        response.headers.update({"Retry-After": f"{seconds:.3f}", "Via": "1.1 google", "X-RateLimit-Scope": scope})
        if everywhere:
            response.headers["X-RateLimit-Global"] = "true"
        return response


def visible_guild(simulator: Simulator, request: web.Request) -> Guild:
    """Find the guild a path names, as far as the bot may see it."""
    guild = simulator.world.guilds.get(path_id(request, "guild_id"))
    if guild is None:
        raise ApiError(*UNKNOWN_GUILD)
    return reachable(guild)


def reachable(guild: Guild) -> Guild:
    """Refuse a guild that the bot is not in, and fail for one that is down."""
    if not guild.present:
        raise ApiError(*MISSING_ACCESS)
    if not guild.available:
        raise ApiError(503, 0, "503: Service Unavailable")
    return guild


def visible_channel(simulator: Simulator, request: web.Request) -> tuple[Guild, Channel | Thread]:
    """Find the channel or thread a path names: 404 when it is gone, 403 when it is hidden."""
    channel_id = path_id(request, "channel_id")
    found = simulator.world.find_channel(channel_id)
    if found is None:
        raise ApiError(*UNKNOWN_CHANNEL)
    guild, place = found
    if not reachable(guild).sees(channel_id):
        raise ApiError(*MISSING_ACCESS)
    return guild, place


def path_id(request: web.Request, name: str) -> int:
    """Read an id from the path."""
    text = request.match_info[name]
    if not text.isdigit():
        raise ApiError(*INVALID_FORM)
    return int(text)

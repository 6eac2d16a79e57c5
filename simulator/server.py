"""The simulator: serves one world over HTTP and websocket on a localhost port."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from aiohttp import web

from .faults import FaultInjector
from .gateway import Gateway
from .interactions import InteractionResult, InteractionRoutes
from .limits import Limits
from .rest import API, NOT_FOUND, ApiError, RestRules
from .rest_channels import ChannelRoutes
from .rest_guilds import GuildRoutes
from .rest_moderation import ModerationRoutes
from .state import PRIVILEGED, Intent
from .traffic import Traffic
from .world import World

# Application flags of enabled privileged intents (the "limited" ones, for applications in few guilds).
_INTENT_FLAGS = {Intent.GUILD_PRESENCES: 1 << 13, Intent.GUILD_MEMBERS: 1 << 15, Intent.MESSAGE_CONTENT: 1 << 19}


class Simulator:
    """Serves a world like Discord: `api_base` for REST, `gateway_url` for the gateway.

    `privileged_intents` are those enabled in the developer portal; `heartbeat_interval` is in seconds.
    """

    def __init__(
        self,
        world: World,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        token: str = "simulated.token.for-tests",
        limits: Limits | None = None,
        privileged_intents: int = PRIVILEGED,
        heartbeat_interval: float = 41.25,
    ) -> None:
        self.world = world
        self.token = token
        self.limits = limits if limits is not None else Limits()
        self.privileged_intents = int(privileged_intents)
        self.heartbeat_interval = heartbeat_interval
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None
        self.traffic = Traffic(world, pending=lambda: self.gateway.pending_dispatches)
        self.faults = FaultInjector(world, lambda: list(self.gateway.sessions.values()))
        self.gateway = Gateway(self)
        self.rules = RestRules(self)
        self.channels = ChannelRoutes(self)
        self.interactions = InteractionRoutes(self)
        self._guilds = GuildRoutes(self)
        self._moderation = ModerationRoutes(self)

    def __repr__(self) -> str:
        return f"<Simulator {self._host}:{self._port} {self.world!r}>"

    @property
    def base_url(self) -> str:
        """The base URL of all routes."""
        return f"http://{self._host}:{self._port}"

    @property
    def api_base(self) -> str:
        """The REST base URL, in place of https://discord.com/api/v10."""
        return f"{self.base_url}{API}"

    @property
    def gateway_url(self) -> str:
        """The gateway URL, in place of wss://gateway.discord.gg/."""
        return f"ws://{self._host}:{self._port}/gateway"

    @property
    def application_flags(self) -> int:
        """The application's flags, which include its privileged intents."""
        return sum(flag for intent, flag in _INTENT_FLAGS.items() if self.privileged_intents & intent)

    async def start(self, *extra_routes: web.RouteDef) -> None:
        """Start listening; port 0 selects a free port."""
        if self._runner is not None:
            raise RuntimeError("the simulator is already running")
        self.world.prerender()
        app = web.Application(client_max_size=1 << 24)
        app.router.add_get("/gateway", self.gateway.handle)
        app.router.add_get("/gateway/", self.gateway.handle)
        areas = (self._guilds, self._moderation, self.channels, self.interactions)
        routes = [route for area in areas for route in area.routes()]
        routes += [*extra_routes, web.route("*", API + "/{rest:.*}", self._not_found)]
        applied = self.rules.applied_to
        app.add_routes([web.RouteDef(it.method, it.path, applied(it.handler), it.kwargs) for it in routes])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port)
        await site.start()
        self._port = runner.addresses[0][1]
        self._runner = runner
        self.world.listeners.append(self.gateway.receive)

    async def stop(self) -> None:
        """Reset every connection and stop listening."""
        if self._runner is None:
            return
        await self.traffic.stop()
        self.world.listeners.remove(self.gateway.receive)
        self.faults.resume()
        for connection in list(self.gateway.connections):
            connection.abort()
        await self._runner.cleanup()
        self._runner = None

    async def __aenter__(self) -> Simulator:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def request_reconnect(self) -> int:
        """Ask every connected client to reconnect (op 7); return how many there are."""
        sockets = [s.socket for s in self.gateway.sessions.values() if s.socket is not None]
        for socket in sockets:
            socket.send_soon({"op": 7, "d": None})
        return len(sockets)

    async def run_command(
        self,
        name: str,
        *,
        user_id: int,
        guild_id: int | None = None,
        channel_id: int | None = None,
        subcommand: str | None = None,
        subcommand_group: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> InteractionResult:
        """Run a registered slash command as a user. Raises LookupError if it is not registered there."""
        path = [part for part in (subcommand_group, subcommand) if part is not None]
        return self.interactions.run(name, user_id, guild_id, channel_id, path, options or {})

    async def use_menu(
        self,
        name: str,
        *,
        user_id: int,
        target_id: int,
        guild_id: int | None = None,
        message: dict[str, Any] | None = None,
    ) -> InteractionResult:
        """Use a registered context menu on a user, or on a message of `author_id` and `content`.

        Raises LookupError if it is not registered there.
        """
        return self.interactions.run_menu(name, user_id, guild_id, target_id, message)

    async def autocomplete(
        self,
        name: str,
        *,
        user_id: int,
        focused: str,
        guild_id: int | None = None,
        subcommand: str | None = None,
        subcommand_group: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> InteractionResult:
        """Type into the option `focused` of a command; `options` holds what was typed. The result has `choices`."""
        path = [part for part in (subcommand_group, subcommand) if part is not None]
        return self.interactions.complete(name, user_id, guild_id, path, focused, {focused: "", **(options or {})})

    async def press(self, parent: InteractionResult, custom_id: str, *, user_id: int) -> InteractionResult:
        """Press a button of a reply as a user. Raises LookupError if there is no reply."""
        return self.interactions.press(parent, custom_id, user_id)

    async def select(
        self, parent: InteractionResult, custom_id: str, values: list[str], *, user_id: int
    ) -> InteractionResult:
        """Select values in a menu of a reply as a user. Raises LookupError if there is no such menu."""
        return self.interactions.press(parent, custom_id, user_id, values)

    async def submit(self, parent: InteractionResult, fields: dict[str, str], *, user_id: int) -> InteractionResult:
        """Submit the form that the bot opened in response; `fields` are the texts by custom id or label.

        Raises LookupError if no form was opened, or if it has no such field.
        """
        return self.interactions.submit(parent, fields, user_id)

    async def _not_found(self, request: web.Request) -> web.Response:
        status, code, message = NOT_FOUND
        raise ApiError(status, code, f"{message}: the simulator does not implement {request.method} {request.path}")

"""The HTTP server for GET /healthz, /readyz and /metrics."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from utils.exceptions import SettingsError
from utils.service import metrics

_log = logging.getLogger(__name__)

#: The header that tells whose bot answers.
APPLICATION_HEADER = "X-Guildbook-Application"

#: Whether a check passes, and details for the answer.
Verdict = tuple[bool, dict[str, Any]]


def _always() -> Verdict:
    return True, {}


class HealthServer:
    """A small HTTP server. `ready` and `alive` are called at every request and must not block.

    `host` None binds every address, IPv4 and IPv6. `port` 0 binds a free port, which `port` holds after `start`.
    `application_id` tells the doctor whether it is this bot that uses the port.
    """

    def __init__(
        self,
        host: str | None,
        port: int,
        *,
        ready: Callable[[], Verdict] = _always,
        alive: Callable[[], Verdict] = _always,
        before_metrics: Callable[[], None] | None = None,
        application_id: int | None = None,
    ) -> None:
        self.host: str | None = host or None
        self.port: int = port
        self._ready = ready
        self._alive = alive
        self._before_metrics = before_metrics
        self._application_id = application_id
        self._runner: web.AppRunner | None = None

    def __repr__(self) -> str:
        return f"<HealthServer host={self.host!r} port={self.port} running={self._runner is not None}>"

    async def start(self) -> None:
        """Start answering. Raises `SettingsError` when the address cannot be bound."""
        if self._runner is not None:
            return
        sockets = await bind(self.host, self.port)
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
        await self._runner.setup()
        for bound in sockets:
            await web.SockSite(self._runner, bound).start()
        self.port = sockets[0].getsockname()[1]
        _log.info("health server listening on port %s", self.port)

    async def stop(self, timeout: float = 5.0) -> None:
        """Stop within `timeout` seconds."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        try:
            async with asyncio.timeout(timeout):
                await runner.cleanup()
        except TimeoutError:
            _log.warning("health server did not stop within %s s", timeout)

    async def _healthz(self, request: web.Request) -> web.Response:
        response = _answer(*self._alive())
        response.headers[APPLICATION_HEADER] = str(self._application_id or "")
        return response

    async def _readyz(self, request: web.Request) -> web.Response:
        return _answer(*self._ready())

    async def _metrics(self, request: web.Request) -> web.Response:
        if self._before_metrics is not None:
            self._before_metrics()
        return web.Response(body=metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})


async def bind(host: str | None, port: int) -> list[socket.socket]:
    """Return sockets that listen on a port of the host's addresses. Raises `SettingsError` if that cannot be."""
    try:
        if not host:
            return [_bind_everywhere(port)]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return _bind_each(found)
    except OSError as exc:
        where = host or "any address"
        why = "another process uses it" if exc.errno == errno.EADDRINUSE else exc.strerror or str(exc)
        raise SettingsError(
            f"PORT/HEALTH_PORT: port {port} on {where} cannot be used: {why}; expected a free port (0: any)"
        ) from exc


def _answer(good: bool, details: dict[str, Any]) -> web.Response:
    body = orjson.dumps({"ok": good, **details}, default=str, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(status=200 if good else 503, body=body, content_type="application/json")


def _bind_everywhere(port: int) -> socket.socket:
    """Bind one socket for IPv4 and IPv6, or only IPv4 on a machine without IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("0.0.0.0", port))


def _bind_each(found: list[Any]) -> list[socket.socket]:
    """Bind every address of a host name, all on the port of the first one."""
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in found:
            host, port = address[0], address[1] or (sockets[0].getsockname()[1] if sockets else 0)
            sockets.append(socket.create_server((host, port), family=family))
    except OSError:
        for bound in sockets:
            bound.close()
        raise
    return sockets

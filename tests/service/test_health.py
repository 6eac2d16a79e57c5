"""The health server over real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import aiohttp
import pytest

from utils.exceptions import SettingsError
from utils.service import metrics
from utils.service.health import HealthServer


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, await response.text()


async def test_readyz_and_healthz() -> None:
    state: dict[str, Any] = {"ready": False}
    server = HealthServer("127.0.0.1", 0, ready=lambda: (state["ready"], {"guilds_waiting": 3}))
    await server.start()
    base = f"http://127.0.0.1:{server.port}"
    assert await get(f"{base}/readyz") == (503, '{"ok":false,"guilds_waiting":3}')
    assert (await get(f"{base}/healthz"))[0] == 200
    state["ready"] = True
    assert (await get(f"{base}/readyz"))[0] == 200
    assert (await get(f"{base}/elsewhere"))[0] == 404
    await server.stop()
    with pytest.raises(aiohttp.ClientConnectorError):
        await get(f"{base}/healthz")


async def test_serves_ipv4_and_ipv6() -> None:
    server = HealthServer(None, 0)
    await server.start()
    assert (await get(f"http://127.0.0.1:{server.port}/healthz"))[0] == 200
    if socket.has_dualstack_ipv6():
        assert (await get(f"http://[::1]:{server.port}/healthz"))[0] == 200
    await server.stop()


async def test_serves_all_addresses_of_a_name_on_one_port() -> None:
    server = HealthServer("localhost", 0)
    await server.start()
    assert (await get(f"http://localhost:{server.port}/healthz"))[0] == 200
    await server.stop()


async def test_metrics_are_updated_before_they_are_shown() -> None:
    server = HealthServer("127.0.0.1", 0, before_metrics=lambda: metrics.buffer_rows.set(17))
    await server.start()
    metrics.dispatches_received.labels("GUILD_CREATE").inc()
    metrics.malformed_payloads.labels("MESSAGE_UPDATE").inc(2)
    status, text = await get(f"http://127.0.0.1:{server.port}/metrics")
    assert status == 200
    assert 'guildbook_gateway_events_total{type="GUILD_CREATE"} ' in text
    assert 'guildbook_malformed_payloads_total{event="MESSAGE_UPDATE"} ' in text
    assert "guildbook_buffer_rows 17.0" in text
    assert "python_gc_objects_collected" in text
    await server.stop()


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
async def test_a_used_port_is_one_clear_line(host: str | None) -> None:
    with socket.create_server((host or "0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"port {port} on .* cannot be used: another process uses it"):
            await HealthServer(host, port).start()


async def test_stop_is_bounded_with_an_open_connection() -> None:
    server = HealthServer("127.0.0.1", 0)
    await server.start()
    _reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
    await writer.drain()
    started = time.monotonic()
    await server.stop(timeout=0.3)
    assert time.monotonic() - started < 1.5, "aiohttp itself would wait for 2 s"
    writer.close()
    await server.stop()


async def test_details_that_are_not_json_are_still_answered() -> None:
    server = HealthServer("127.0.0.1", 0, alive=lambda: (False, {"since": socket, "odd": {2}}))
    await server.start()
    assert (await get(f"http://127.0.0.1:{server.port}/healthz"))[0] == 503
    await server.stop()

"""Requests to Discord fail with `SyncError`, listings advance, and waits are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
import discord
import pytest
from discord.http import Route

from utils.exceptions import SyncError
from utils.mirror.discord.source import MEMBERS_PAGE, THREADS_PAGE, DiscordSource

GUILD, CHANNEL = 5, 7
Respond = Callable[[str, dict[str, Any]], Any]


class Response:
    """The part of an HTTP response that discord.py's errors read."""

    reason = "because"

    def __init__(self, status: int) -> None:
        self.status = status


class Http:
    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self.requests: list[tuple[str, dict[str, Any]]] = []

    async def request(self, route: Route, *, params: dict[str, Any]) -> Any:
        path = route.url.removeprefix(route.BASE)
        self.requests.append((f"{route.method} {path}", dict(params)))
        response = self._respond(path, params)
        if isinstance(response, BaseException):
            raise response
        if asyncio.isfuture(response):
            return await response
        return response


class Client:
    def __init__(self, respond: Respond, websocket: Any = None) -> None:
        self.http = Http(respond)
        self._websocket = websocket

    def _get_websocket(self, guild_id: int) -> Any:
        if isinstance(self._websocket, Exception):
            raise self._websocket
        return self._websocket


def source(respond: Respond = lambda path, params: None, **values: Any) -> tuple[DiscordSource, Client]:
    client = Client(respond, **values)
    return DiscordSource(client, timeout=0.05), client  # type: ignore[arg-type]


def member(id: int) -> dict[str, Any]:
    return {"user": {"id": str(id)}}


def http_error(status: int) -> discord.HTTPException:
    kinds = {403: discord.Forbidden, 404: discord.NotFound}
    kind = kinds.get(status, discord.DiscordServerError if status >= 500 else discord.HTTPException)
    return kind(Response(status), {"code": 0, "message": "no"})


FAILURES = [http_error(400), http_error(500), http_error(429), OSError("reset"), None]


@pytest.mark.parametrize("count", [0, 1, MEMBERS_PAGE - 1, MEMBERS_PAGE, MEMBERS_PAGE + 1, 2 * MEMBERS_PAGE])
async def test_lists_members_until_a_page_is_not_full(count: int) -> None:
    discord_source, client = source(
        lambda path, params: [member(id) for id in range(1, count + 1) if id > params["after"]][:MEMBERS_PAGE]
    )
    pages = [page async for page in discord_source.members(GUILD)]
    assert [int(one["user"]["id"]) for page, _ in pages for one in page] == list(range(1, count + 1))
    assert [last for _, last in pages] == [False] * (len(pages) - 1) + [True]
    assert client.http.requests[0] == ("GET /guilds/5/members", {"limit": MEMBERS_PAGE, "after": 0})


async def test_a_member_list_must_advance() -> None:
    discord_source, client = source(lambda path, params: [member(id) for id in range(1, MEMBERS_PAGE + 1)])
    with pytest.raises(SyncError, match="does not advance past 1000"):
        _ = [page async for page in discord_source.members(GUILD)]
    assert len(client.http.requests) == 2


@pytest.mark.parametrize(
    "failure",
    [*FAILURES, http_error(403), http_error(404), pytest.param(aiohttp.ServerDisconnectedError())],
)
async def test_a_failed_request_is_a_sync_error(failure: Exception | None) -> None:
    discord_source, _ = source(lambda path, params: failure or asyncio.get_running_loop().create_future())
    with pytest.raises(SyncError, match="guild 5: its member list could not be read"):
        _ = [page async for page in discord_source.members(GUILD)]
    for read in (discord_source.guild, discord_source.channels):
        with pytest.raises(SyncError, match="guild 5"):
            await read(GUILD)


def thread(id: int) -> dict[str, Any]:
    return {"id": str(id), "thread_metadata": {"archive_timestamp": f"2024-01-01T00:{59 - id // 4:02}:00+00:00"}}


async def test_lists_archived_threads_page_by_page() -> None:
    pages = [{"threads": [thread(1), thread(9)], "has_more": True}, {"threads": [thread(20)], "has_more": False}]
    discord_source, client = source(lambda path, params: pages.pop(0))
    found = [[one["id"] for one in page] async for page in discord_source.archived_threads(CHANNEL, "public")]
    assert found == [["1", "9"], ["20"]]
    first, second = client.http.requests
    assert first == ("GET /channels/7/threads/archived/public", {"limit": THREADS_PAGE})
    assert second[1] == {"limit": THREADS_PAGE, "before": "2024-01-01T00:57:00+00:00"}


@pytest.mark.parametrize("answer", [{}, {"threads": []}, {"threads": [], "has_more": True}, {"threads": [thread(1)]}])
async def test_archived_threads_end_without_has_more(answer: dict[str, Any]) -> None:
    discord_source, client = source(lambda path, params: answer)
    assert [page async for page in discord_source.archived_threads(CHANNEL, "private")] == [answer.get("threads", [])]
    assert len(client.http.requests) == 1


async def test_archived_threads_must_advance() -> None:
    discord_source, _ = source(lambda path, params: {"threads": [thread(1)], "has_more": True})
    with pytest.raises(SyncError, match="does not advance"):
        _ = [page async for page in discord_source.archived_threads(CHANNEL, "public")]


async def test_distinguishes_forbidden_not_found_and_failures() -> None:
    for status, kind in ((403, discord.Forbidden), (404, discord.NotFound)):
        discord_source, _ = source(lambda path, params, status=status: http_error(status))  # type: ignore[misc]
        with pytest.raises(kind):
            _ = [page async for page in discord_source.archived_threads(CHANNEL, "public")]
        with pytest.raises(kind):
            await discord_source.channel(CHANNEL)
    for failure in FAILURES[:-1]:
        discord_source, _ = source(lambda path, params, failure=failure: failure)  # type: ignore[misc]
        with pytest.raises(SyncError):
            await discord_source.channel(CHANNEL)


class Websocket:
    def __init__(self, failure: BaseException | None = None, *, hangs: bool = False) -> None:
        self.sent: list[tuple[int, dict[str, Any]]] = []
        self._failure = failure
        self._hangs = hangs

    async def request_chunks(self, guild_id: int, **values: Any) -> None:
        if self._hangs:
            await asyncio.get_running_loop().create_future()
        if self._failure is not None:
            raise self._failure
        self.sent.append((guild_id, values))


async def test_requests_all_members_with_the_nonce() -> None:
    websocket = Websocket()
    discord_source, _ = source(websocket=websocket)
    await discord_source.request_members(GUILD, "nonce")
    assert websocket.sent == [(GUILD, {"query": "", "limit": 0, "nonce": "nonce"})]


@pytest.mark.parametrize(
    "websocket", [None, KeyError(0), Websocket(ConnectionResetError("gone")), Websocket(hangs=True)]
)
async def test_a_member_request_that_fails_is_a_sync_error(websocket: Any) -> None:
    discord_source, _ = source(websocket=websocket)
    with pytest.raises(SyncError, match="guild 5: could not send the member request"):
        await discord_source.request_members(GUILD, "nonce")

"""Requests to Discord: member lists over the gateway (op 8), everything else over REST."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Literal

import aiohttp
import discord
from discord.http import Route

from utils.exceptions import SyncError
from utils.mirror.discord import permissions
from utils.mirror.translate.objects import Payload, user_id_of

#: Largest page of GET /guilds/{id}/members (Discord API reference, "List Guild Members").
MEMBERS_PAGE = 1_000
#: Largest page of the archived-thread listings (Discord API reference, "List Public Archived Threads").
THREADS_PAGE = 100
#: Gateway commands per minute that op 8 may use. Discord allows 120; heartbeats and discord.py need some of them.
COMMANDS_PER_MINUTE = 100

ThreadKind = Literal["public", "private"]


class RateLimiter:
    """Admits at most `count` callers per `seconds`; the others wait in turn."""

    __slots__ = ("_lock", "_times", "count", "seconds")

    def __init__(self, count: int, seconds: float) -> None:
        self.count = count
        self.seconds = seconds
        self._times: deque[float] = deque(maxlen=count)
        self._lock = asyncio.Lock()

    @property
    def remaining(self) -> int:
        """How many callers would be admitted without waiting."""
        past = time.monotonic() - self.seconds
        return self.count - sum(time_ > past for time_ in self._times)

    async def acquire(self) -> None:
        """Wait for a slot, at most `seconds` for each caller ahead."""
        async with self._lock:
            if len(self._times) == self.count:
                wait = self._times[0] + self.seconds - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
            self._times.append(time.monotonic())


class DiscordSource:
    """Queries Discord through a client's connections.

    Every request is bounded by `timeout` seconds and fails with `SyncError`.
    """

    def __init__(
        self, client: discord.AutoShardedClient, *, timeout: float = 60.0, members_page: int = MEMBERS_PAGE
    ) -> None:
        self._client = client
        #: Seconds that one REST request may take, discord.py's own retries included.
        self.timeout = timeout
        #: Members per page of a REST listing.
        self.members_page = members_page
        self._limiters: dict[int, RateLimiter] = {}

    @property
    def commands_remaining(self) -> int:
        """Gateway commands that the busiest shard may still send in this minute."""
        return min((limiter.remaining for limiter in self._limiters.values()), default=COMMANDS_PER_MINUTE)

    async def acquire_command(self, shard_id: int) -> None:
        """Wait until a shard may send one more gateway command."""
        await self._limiters.setdefault(shard_id, RateLimiter(COMMANDS_PER_MINUTE, 60.0)).acquire()

    async def request_members(self, guild_id: int, nonce: str) -> None:
        """Request all members of a guild with op 8; Discord answers with GUILD_MEMBERS_CHUNK events of this nonce."""
        try:
            ws = self._client._get_websocket(guild_id)
            async with asyncio.timeout(self.timeout):
                await ws.request_chunks(guild_id, query="", limit=0, nonce=nonce)
        except (KeyError, AttributeError, ConnectionError, TimeoutError, discord.DiscordException) as error:
            raise SyncError(f"guild {guild_id}: could not send the member request: {error!r}") from error

    async def members(self, guild_id: int) -> AsyncIterator[tuple[list[Payload], bool]]:
        """List a guild's members over REST, ordered by id; yield each page and whether it is the last."""
        after = 0
        while True:
            page: list[Payload] = await self._get(
                Route("GET", "/guilds/{guild_id}/members", guild_id=guild_id),
                {"limit": self.members_page, "after": after},
                f"guild {guild_id}: its member list",
            )
            is_last = len(page) < self.members_page
            yield page, is_last
            if is_last:
                return
            last = max(filter(None, map(user_id_of, page)), default=0)
            if last <= after:
                raise SyncError(f"guild {guild_id}: the member list does not advance past {after}")
            after = last

    async def guild(self, guild_id: int) -> Payload:
        """Return a guild with all its roles."""
        payload: Payload = await self._get(
            Route("GET", "/guilds/{guild_id}", guild_id=guild_id), {"with_counts": "true"}, f"guild {guild_id}"
        )
        return payload

    async def channels(self, guild_id: int) -> list[Payload]:
        """Return a guild's channels except those hidden from the bot, so a missing channel may still exist."""
        payload: list[Payload] = await self._get(
            Route("GET", "/guilds/{guild_id}/channels", guild_id=guild_id), {}, f"guild {guild_id}: its channels"
        )
        return payload

    def may_list_archived(self, guild_id: int, channel_id: int, kind: ThreadKind) -> bool:
        """Return whether the bot may list a channel's archived threads, as far as discord.py knows."""
        guild = self._client.get_guild(guild_id)
        return permissions.may_list_archived(guild, channel_id, private=kind == "private")

    def may_view_private(self, guild_id: int, channel_id: int) -> bool:
        """Return whether the bot may request any private thread of a channel, as far as discord.py knows."""
        return permissions.may_view_private(self._client.get_guild(guild_id), channel_id)

    async def archived_threads(self, channel_id: int, kind: ThreadKind) -> AsyncIterator[list[Payload]]:
        """List a channel's archived threads page by page, newest first.

        Raises `discord.Forbidden` or `discord.NotFound` if the bot may not see the channel, besides `SyncError`.
        """
        before: str | None = None
        while True:
            parameters: dict[str, Any] = {"limit": THREADS_PAGE}
            if before is not None:
                parameters["before"] = before
            response: Payload = await self._get(
                Route("GET", f"/channels/{{channel_id}}/threads/archived/{kind}", channel_id=channel_id),
                parameters,
                f"channel {channel_id}: its {kind} archived threads",
                reraise=(discord.Forbidden, discord.NotFound),
            )
            threads = response.get("threads", [])
            yield threads
            if not response.get("has_more") or not threads:
                return
            try:
                oldest = threads[-1]["thread_metadata"]["archive_timestamp"]
            except (KeyError, TypeError) as error:
                raise SyncError(f"channel {channel_id}: malformed page of archived threads: {error!r}") from error
            if oldest == before:
                raise SyncError(f"channel {channel_id}: the list of archived threads does not advance past {before}")
            before = oldest

    async def channel(self, channel_id: int) -> Payload:
        """Return a channel or thread.

        Raises `discord.NotFound` if it was deleted, `discord.Forbidden` if the bot may not see it, besides `SyncError`.
        """
        payload: Payload = await self._get(
            Route("GET", "/channels/{channel_id}", channel_id=channel_id),
            {},
            f"channel {channel_id}",
            reraise=(discord.Forbidden, discord.NotFound),
        )
        return payload

    async def _get(
        self, route: Route, parameters: dict[str, Any], what: str, *, reraise: tuple[type[Exception], ...] = ()
    ) -> Any:
        try:
            async with asyncio.timeout(self.timeout):
                return await self._client.http.request(route, params=parameters)
        except reraise:
            raise
        except (discord.DiscordException, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise SyncError(f"{what} could not be read: {error or type(error).__name__}") from error

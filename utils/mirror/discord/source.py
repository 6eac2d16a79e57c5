"""Where the mirror asks Discord for things: op 8 over the gateway, listings over REST."""

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
from utils.mirror.translate.objects import Payload, user_id_of

#: Largest page of GET /guilds/{id}/members (Discord API reference, "List Guild Members").
MEMBERS_PAGE = 1_000
#: Largest page of the archived-thread listings (Discord API reference, "List Public Archived Threads").
THREADS_PAGE = 100
#: Gateway commands a minute that op 8 may use: Discord allows 120, heartbeats and discord.py need some of them.
COMMANDS_A_MINUTE = 100

ThreadKind = Literal["public", "private"]


class RateLimiter:
    """Lets at most `count` through in any `seconds`, and makes the others wait their turn."""

    __slots__ = ("_lock", "_times", "count", "seconds")

    def __init__(self, count: int, seconds: float) -> None:
        self.count = count
        self.seconds = seconds
        self._times: deque[float] = deque(maxlen=count)
        self._lock = asyncio.Lock()

    @property
    def remaining(self) -> int:
        """How many would be let through at once."""
        past = time.monotonic() - self.seconds
        return self.count - sum(moment > past for moment in self._times)

    async def acquire(self) -> None:
        """Return when one more is allowed; never longer than `seconds` for each one that waits before."""
        async with self._lock:
            if len(self._times) == self.count:
                wait = self._times[0] + self.seconds - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
            self._times.append(time.monotonic())


class DiscordSource:
    """Asks Discord through a client's own connections; every wait has a bound, every refusal is a `SyncError`."""

    def __init__(self, client: discord.AutoShardedClient, *, timeout: float = 60.0) -> None:
        self._client = client
        #: Seconds that one REST request may take, discord.py's own retries included.
        self.timeout = timeout
        self._paces: dict[int, RateLimiter] = {}

    @property
    def commands_remaining(self) -> int:
        """Gateway commands that the busiest shard may still send in this minute."""
        return min((pace.remaining for pace in self._paces.values()), default=COMMANDS_A_MINUTE)

    async def acquire_command(self, shard_id: int) -> None:
        """Wait until a shard may send one more gateway command."""
        await self._paces.setdefault(shard_id, RateLimiter(COMMANDS_A_MINUTE, 60.0)).acquire()

    async def request_members(self, guild_id: int, nonce: str) -> None:
        """Send op 8 for all members of a guild; the answer comes as GUILD_MEMBERS_CHUNK with this nonce."""
        try:
            ws = self._client._get_websocket(guild_id)
            async with asyncio.timeout(self.timeout):
                await ws.request_chunks(guild_id, query="", limit=0, nonce=nonce)
        except (KeyError, AttributeError, ConnectionError, TimeoutError, discord.DiscordException) as error:
            raise SyncError(f"guild {guild_id}: the request for its members could not be sent: {error!r}") from error

    async def members(self, guild_id: int) -> AsyncIterator[tuple[list[Payload], bool]]:
        """List a guild's members over REST by id: each page, and whether it was the last (the one that is not full)."""
        after = 0
        while True:
            page: list[Payload] = await self._get(
                Route("GET", "/guilds/{guild_id}/members", guild_id=guild_id),
                {"limit": MEMBERS_PAGE, "after": after},
                f"guild {guild_id}: its member list",
            )
            yield page, len(page) < MEMBERS_PAGE
            if len(page) < MEMBERS_PAGE:
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
        """Return a guild's channels but for those hidden from the bot: absence proves nothing here."""
        payload: list[Payload] = await self._get(
            Route("GET", "/guilds/{guild_id}/channels", guild_id=guild_id), {}, f"guild {guild_id}: its channels"
        )
        return payload

    async def archived_threads(self, channel_id: int, kind: ThreadKind) -> AsyncIterator[list[Payload]]:
        """List a channel's archived threads page by page, newest first; `discord.Forbidden` means unknown, not gone."""
        before: str | None = None
        while True:
            parameters: dict[str, Any] = {"limit": THREADS_PAGE}
            if before is not None:
                parameters["before"] = before
            answer: Payload = await self._get(
                Route("GET", f"/channels/{{channel_id}}/threads/archived/{kind}", channel_id=channel_id),
                parameters,
                f"channel {channel_id}: its {kind} archived threads",
                passes=(discord.Forbidden, discord.NotFound),
            )
            threads = answer.get("threads", [])
            yield threads
            if not answer.get("has_more") or not threads:
                return
            try:
                oldest = threads[-1]["thread_metadata"]["archive_timestamp"]
            except (KeyError, TypeError) as error:
                raise SyncError(f"channel {channel_id}: a page of archived threads cannot be read") from error
            if oldest == before:
                raise SyncError(f"channel {channel_id}: the list of archived threads does not advance past {before}")
            before = oldest

    async def channel(self, channel_id: int) -> Payload:
        """Return a channel or thread; `discord.NotFound` means gone, `discord.Forbidden` unknown."""
        payload: Payload = await self._get(
            Route("GET", "/channels/{channel_id}", channel_id=channel_id),
            {},
            f"channel {channel_id}",
            passes=(discord.Forbidden, discord.NotFound),
        )
        return payload

    async def _get(
        self, route: Route, parameters: dict[str, Any], what: str, *, passes: tuple[type[Exception], ...] = ()
    ) -> Any:
        try:
            async with asyncio.timeout(self.timeout):
                return await self._client.http.request(route, params=parameters)
        except passes:
            raise
        except (discord.DiscordException, aiohttp.ClientError, OSError, TimeoutError) as error:
            raise SyncError(f"{what} could not be read: {error or type(error).__name__}") from error

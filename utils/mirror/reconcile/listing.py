"""A listing of one guild's members under way: pages come in, and only a proven end makes it complete."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from datetime import datetime

from utils.exceptions import SyncError, ValidationError
from utils.mirror.translate.objects import Payload
from utils.mirror.translate.pages import Page, read_page
from utils.mirror.write.overlay import LiveOverlay


class Listing:
    """Pages of one guild's member list, from the gateway or from REST, with the proof that none is missing.

    Everything in it counts as observed at `stamp`, when the request was sent.
    """

    def __init__(
        self,
        guild_id: int,
        *,
        stamp: int,
        source: str,
        reason: str,
        started_at: datetime,
        touched: LiveOverlay,
        refuse: Callable[[ValidationError], None],
    ) -> None:
        self.guild_id = guild_id
        self.stamp = stamp
        self.source = source
        self.reason = reason
        self.started_at = started_at
        #: Pages received so far; duplicates do not count.
        self.pages: int = 0
        #: Pages that the gateway announced; None until the first one, and for REST.
        self.announced: int | None = None
        self.seen: int = 0
        self.unreadable: list[int | None] = []
        self._touched = touched
        self._refuse = refuse
        self._indexes: set[int] = set()
        self._waiting: deque[Page] = deque()
        self._complete = False
        self._error: SyncError | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def waiting(self) -> int:
        """Pages received and not yet taken."""
        return len(self._waiting)

    @property
    def is_complete(self) -> bool:
        """Whether every page has been received."""
        return self._complete

    def chunk(self, payload: Payload) -> None:
        """Take a GUILD_MEMBERS_CHUNK; the listing is complete when every index has come."""
        index, count = int(payload["chunk_index"]), int(payload["chunk_count"])
        if self.announced not in (None, count) or not 0 <= index < count:
            self.fail(
                SyncError(f"guild {self.guild_id}: page {index} of {count} after {self.announced} were announced")
            )
            return
        self.announced = count
        if index in self._indexes:
            return
        self._indexes.add(index)
        self.page(payload["members"], last=len(self._indexes) == count)

    def page(self, payloads: list[Payload], *, last: bool) -> None:
        """Take one page's members; `last` when with it every page has come."""
        page = read_page(self.guild_id, payloads, self.stamp, self._refuse)
        self.pages += 1
        self.seen += page.seen
        self.unreadable += page.unreadable
        self._waiting.append(page)
        self._complete = last
        self._news.set()

    def fail(self, error: SyncError) -> None:
        """End the listing without proof; nobody is tombstoned."""
        if not self._complete and self._error is None:
            self._error = error
            self._news.set()
            self._room.set()

    def abandon(self, error: SyncError) -> None:
        """End the listing although its pages may all have come: nobody takes them."""
        self._error = self._error or error
        self._news.set()
        self._room.set()

    def close(self) -> None:
        """Release whoever waits for room: nobody takes pages any more."""
        self._waiting.clear()
        self.abandon(SyncError(f"guild {self.guild_id}: the listing has ended"))

    async def next(self, timeout: float) -> Page | None:
        """Return the next page, None after the last; `SyncError` if it failed or none came for `timeout` seconds."""
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._complete:
                return None
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                missing = "" if self.announced is None else f" of {self.announced}"
                raise SyncError(
                    f"guild {self.guild_id}: no page for {timeout:g} s, {self.pages}{missing} had come"
                ) from None
        if self._error is not None:
            raise self._error
        page = self._waiting.popleft()
        self._room.set()
        return page

    async def room(self, pages: int) -> None:
        """Wait until fewer than `pages` wait to be taken, or the listing has failed."""
        while self.waiting >= pages and self._error is None:
            self._room.clear()
            await self._room.wait()

    def spared(self) -> set[int] | None:
        """Return ids that are not absent although no page shows them; None when absence proves nothing at all."""
        if None in self.unreadable:
            return None
        listed = {id for id in self.unreadable if id is not None}
        return listed | self._touched.since("members", self.guild_id, self.stamp)

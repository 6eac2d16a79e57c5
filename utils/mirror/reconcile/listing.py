"""A member listing in progress: pages come in, and it is complete only when it is proven that none is missing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from utils.exceptions import SyncError, ValidationError
from utils.mirror.translate.objects import Payload
from utils.mirror.translate.pages import Page, read_page
from utils.mirror.write.overlay import LiveOverlay


class PageSink(Protocol):
    """Takes the payloads of a listing as they are received, beside the tables: discord.py's member cache."""

    def add(self, payloads: list[Payload], /) -> None:
        """Take one page. Never raises."""

    def finish(self, unreadable: list[int | None], /) -> None:
        """Take what the complete listing proves; `unreadable` as in `Listing`. Never raises."""

    def close(self) -> None:
        """Take no more pages: the listing has ended, complete or not. Never raises."""


class Listing:
    """Pages of one guild's member list, from the gateway or from REST.

    Every page counts as observed at `stamp`, when the request was sent. `on_malformed` is called for each member that
    cannot be read. `sink` also gets the pages, until the listing has failed.
    """

    def __init__(
        self,
        guild_id: int,
        *,
        stamp: int,
        source: str,
        reason: str,
        started_at: datetime,
        overlay: LiveOverlay,
        on_malformed: Callable[[ValidationError], None],
        sink: PageSink | None = None,
    ) -> None:
        self.guild_id = guild_id
        self.stamp = stamp
        self.source = source
        self.reason = reason
        self.started_at = started_at
        #: Pages received, duplicates not counted.
        self.pages: int = 0
        #: Pages that the gateway announced; None before the first one, and for REST.
        self.pages_announced: int | None = None
        #: Members received.
        self.seen: int = 0
        #: Ids of members that could not be read; None for one whose id could not be read either.
        self.unreadable: list[int | None] = []
        self._overlay = overlay
        #: Why the first unreadable member could not be read.
        self.first_problem: ValidationError | None = None
        self._on_malformed = on_malformed
        self._sink = sink
        self._indexes: set[int] = set()
        self._waiting: deque[Page] = deque()
        self._complete = False
        self._error: SyncError | None = None
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    @property
    def pages_waiting(self) -> int:
        """Pages received and not yet taken."""
        return len(self._waiting)

    @property
    def is_complete(self) -> bool:
        """Whether every page has been received."""
        return self._complete

    # --- the side that receives

    def add_chunk(self, payload: Payload) -> None:
        """Add a GUILD_MEMBERS_CHUNK; the listing is complete when every index has been received."""
        index, count = int(payload["chunk_index"]), int(payload["chunk_count"])
        if self.pages_announced not in (None, count) or not 0 <= index < count:
            announced = "" if self.pages_announced is None else f", but {self.pages_announced} pages were announced"
            self.fail(SyncError(f"guild {self.guild_id}: Discord sent page {index} of {count}{announced}"))
            return
        self.pages_announced = count
        if index in self._indexes:
            return
        self._indexes.add(index)
        self.add_page(payload["members"], last=len(self._indexes) == count)

    def add_page(self, payloads: list[Payload], *, last: bool) -> None:
        """Add a page of members; `last`: with it, every page has been received."""
        page = read_page(self.guild_id, payloads, self.stamp, self._note_malformed)
        self.pages += 1
        self.seen += page.seen
        self.unreadable += page.unreadable
        self._waiting.append(page)
        self._complete = last
        self._has_news.set()
        if self._sink is not None and self._error is None:
            self._sink.add(payloads)
            if last:
                self._sink.finish(self.unreadable)

    def _note_malformed(self, error: ValidationError) -> None:
        self.first_problem = self.first_problem or error
        self._on_malformed(error)

    def fail(self, error: SyncError) -> None:
        """End the listing unless it is complete; nothing is tombstoned."""
        if not self._complete and self._error is None:
            self.abandon(error)

    def abandon(self, error: SyncError) -> None:
        """End the listing even if it is complete: its pages are not taken."""
        self._error = self._error or error
        self._has_news.set()
        self._has_room.set()

    async def wait_for_room(self, pages: int) -> None:
        """Wait until fewer than `pages` pages wait to be taken, or the listing has ended."""
        while self.pages_waiting >= pages and self._error is None:
            self._has_room.clear()
            await self._has_room.wait()

    # --- the side that writes

    async def next_page(self, timeout: float) -> Page | None:
        """Return the next page, or None after the last one.

        Raises `SyncError` if the listing has failed or no page came within `timeout` seconds.
        """
        while not self._waiting:
            if self._error is not None:
                raise self._error
            if self._complete:
                if self.seen and len(self.unreadable) >= self.seen:
                    raise SyncError(f"guild {self.guild_id}: none of {self.seen:,} members could be read")
                return None
            self._has_news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._has_news.wait()
            except TimeoutError:
                total = "" if self.pages_announced is None else f" of {self.pages_announced}"
                raise SyncError(
                    f"guild {self.guild_id}: no page within {timeout:g} s; {self.pages}{total} received so far"
                ) from None
        if self._error is not None:
            raise self._error
        page = self._waiting.popleft()
        self._has_room.set()
        return page

    def protected_ids(self) -> set[int] | None:
        """Return the ids that must not be tombstoned although no page shows them; None: nothing may be tombstoned."""
        if None in self.unreadable:
            return None
        unreadable = {id for id in self.unreadable if id is not None}
        return unreadable | self._overlay.touched_since("members", self.guild_id, self.stamp)

    def close(self) -> None:
        """Discard what was not taken, and release the receiving side and the sink."""
        self._waiting.clear()
        self.abandon(SyncError(f"guild {self.guild_id}: the listing has ended"))
        if self._sink is not None:
            self._sink.close()

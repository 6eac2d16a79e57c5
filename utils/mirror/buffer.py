"""The write-behind buffer: live events wait here, keyed by row, until the next flush."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

from utils.mirror.rows import Entry, Key, Row

Entries = dict[tuple[str, Key], Entry]


class Buffer:
    """Holds one entry a row, the last write winning; emptied only by what has been committed.

    Its size is bounded by the number of rows that Discord can speak of, not by the number of events.
    """

    __slots__ = ("_due", "_entries", "_since", "flush_rows", "flush_seconds")

    def __init__(self, *, flush_rows: int, flush_seconds: float) -> None:
        self.flush_rows = flush_rows
        #: Seconds that an entry waits at most before a flush is due.
        self.flush_seconds = flush_seconds
        self._entries: Entries = {}
        self._due: asyncio.Event = asyncio.Event()
        self._since: float | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def age(self) -> float:
        """Seconds that the oldest entry has waited; 0 when nothing waits."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def put(self, row: Row, stamp: int) -> None:
        """Lay an observation over what already waits for the same row."""
        slot = (row.table, row.key)
        entry = Entry(row.values, row.appears, stamp)
        earlier = self._entries.get(slot)
        self._entries[slot] = entry if earlier is None else earlier.overlaid(entry)
        if self._since is None:
            self._since = time.monotonic()
        if len(self._entries) >= self.flush_rows:
            self._due.set()

    def take(self, *, hold: frozenset[int] = frozenset()) -> Entries:
        """Hand out what waits, except members of the guilds in `hold`; give it back if it could not be written."""
        if not hold:
            taken, self._entries, self._since = self._entries, {}, None
            return taken
        taken = {
            slot: entry for slot, entry in self._entries.items() if not (slot[0] == "members" and slot[1][0] in hold)
        }
        for slot in taken:
            del self._entries[slot]
        self._since = time.monotonic() if self._entries else None
        return taken

    def give_back(self, entries: Mapping[tuple[str, Key], Entry]) -> None:
        """Put entries back under whatever came meanwhile: they are older."""
        for slot, entry in entries.items():
            later = self._entries.get(slot)
            self._entries[slot] = entry if later is None else entry.overlaid(later)
        if entries and self._since is None:
            self._since = time.monotonic()

    def wake(self) -> None:
        """Make a flush due now."""
        self._due.set()

    async def due(self) -> None:
        """Wait until a flush is due by size or by age, or somebody wakes it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.flush_seconds):
                await self._due.wait()
        self._due.clear()

"""The write-behind buffer: live rows, from dispatches, one entry for each row, until the next flush."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

from utils.mirror.records.rows import Entry, Key, Row

Slot = tuple[str, Key]
Entries = dict[Slot, Entry]


class Buffer:
    """Holds one entry for each row, last write wins by column; an entry is removed only once it is committed.

    Its size is bounded by the number of rows, not by the number of events.
    """

    __slots__ = ("_entries", "_flush_requested", "_held", "_oldest_at", "_taken_oldest_at", "flush_rows",
                 "flush_seconds")  # fmt: skip

    def __init__(self, *, flush_rows: int, flush_seconds: float) -> None:
        #: A flush is due when this many rows are buffered, or this many seconds after the last one.
        self.flush_rows = flush_rows
        self.flush_seconds = flush_seconds
        self._entries: Entries = {}
        #: Held members, by guild id.
        self._held: dict[int, Entries] = {}
        self._flush_requested: asyncio.Event = asyncio.Event()
        #: `time.monotonic()` when the oldest entry came in; None while the buffer is empty.
        self._oldest_at: float | None = None
        self._taken_oldest_at: float | None = None

    def __len__(self) -> int:
        return len(self._entries) + (sum(map(len, self._held.values())) if self._held else 0)

    @property
    def age(self) -> float:
        """Seconds that the oldest entry has waited; 0 when the buffer is empty."""
        return 0.0 if self._oldest_at is None else time.monotonic() - self._oldest_at

    @property
    def held_guilds(self) -> frozenset[int]:
        """Guilds whose members are held until `release`."""
        return frozenset(self._held)

    def put(self, row: Row, stamp: int) -> None:
        """Add an observation on top of the buffered entry of the same row."""
        slot = (row.table, row.key)
        entries = self._entries_for(slot)
        entry = Entry(row.values, row.may_insert, stamp, row.is_created)
        earlier = entries.get(slot)
        entries[slot] = entry if earlier is None else earlier.merged_with(entry)
        if self._oldest_at is None:
            self._oldest_at = time.monotonic()
        if len(self._entries) >= self.flush_rows:
            self._flush_requested.set()

    def take(self) -> Entries:
        """Remove and return every entry that is not held; pass them to `give_back` if they could not be written."""
        taken, self._entries = self._entries, {}
        self._flush_requested.clear()  # this is the flush; left set, it would flush the next entry at once
        self._taken_oldest_at = self._oldest_at
        self._oldest_at = time.monotonic() if self._held and len(self) else None
        return taken

    def give_back(self, entries: Mapping[Slot, Entry]) -> None:
        """Put entries back underneath what came in since: they are older."""
        if not entries:
            return
        newer, self._entries = self._entries, {}
        for slot, entry in entries.items():
            home = self._entries_for(slot)
            above = home.get(slot)  # set for held members only: the other newer entries are added below
            home[slot] = entry if above is None else entry.merged_with(above)
        for slot, entry in newer.items():
            below = self._entries.get(slot)
            self._entries[slot] = entry if below is None else below.merged_with(entry)
        self._oldest_at = self._taken_oldest_at or self._oldest_at or time.monotonic()

    def hold(self, guild_id: int) -> None:
        """Keep the guild's members in the buffer until `release`."""
        if guild_id not in self._held:
            members = {slot: entry for slot, entry in self._entries.items() if slot[0] == "members"}
            self._held[guild_id] = {slot: entry for slot, entry in members.items() if slot[1][0] == guild_id}
            for slot in self._held[guild_id]:
                del self._entries[slot]

    def release(self, guild_id: int) -> None:
        """Stop holding the guild's members."""
        self._entries |= self._held.pop(guild_id, {})

    def release_all(self) -> None:
        """Stop holding any guild's members."""
        for guild_id in list(self._held):
            self.release(guild_id)

    def drop_oldest_members(self, count: int) -> tuple[int, set[int]]:
        """Drop the `count` oldest members with their users; return (rows dropped, their guilds).

        A reconcile of these guilds restores them. Rows of other tables are few and are never dropped.
        """
        oldest: list[Slot] = []
        for slot in self._entries:
            if slot[0] == "members":
                oldest.append(slot)
                if len(oldest) >= count:
                    break
        before = len(self._entries)
        for slot in oldest:
            del self._entries[slot]
            self._entries.pop(("users", slot[1][1:]), None)
        return before - len(self._entries), {slot[1][0] for slot in oldest}

    def request_flush(self) -> None:
        """Make a flush due now."""
        self._flush_requested.set()

    async def wait_until_due(self) -> None:
        """Wait until a flush is due by size or by age, or is requested."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.flush_seconds):
                await self._flush_requested.wait()
        self._flush_requested.clear()

    def _entries_for(self, slot: Slot) -> Entries:
        if self._held and slot[0] == "members":
            return self._held.get(slot[1][0], self._entries)
        return self._entries

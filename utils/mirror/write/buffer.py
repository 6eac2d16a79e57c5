"""The write-behind buffer: live rows wait here, keyed by row, until the next flush."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

from utils.mirror.records.rows import Entry, Key, Row

Entries = dict[tuple[str, Key], Entry]


class Buffer:
    """Holds one entry a row, the last write winning; emptied only by what has been committed.

    Its size is bounded by the number of rows that Discord can speak of, not by the number of events.
    """

    __slots__ = ("_due", "_entries", "_held", "_since", "_taken_since", "flush_rows", "flush_seconds")

    def __init__(self, *, flush_rows: int, flush_seconds: float) -> None:
        self.flush_rows = flush_rows
        #: Seconds that an entry waits at most before a flush is due.
        self.flush_seconds = flush_seconds
        self._entries: Entries = {}
        #: By guild, members' entries that have to wait.
        self._held: dict[int, Entries] = {}
        self._due: asyncio.Event = asyncio.Event()
        self._since: float | None = None
        self._taken_since: float | None = None

    def __len__(self) -> int:
        return len(self._entries) + (sum(map(len, self._held.values())) if self._held else 0)

    @property
    def age(self) -> float:
        """Seconds that the oldest entry has waited; 0 when nothing waits."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    @property
    def held(self) -> frozenset[int]:
        """Guilds whose members wait until `release`."""
        return frozenset(self._held)

    def put(self, row: Row, stamp: int) -> None:
        """Lay an observation over what already waits for the same row."""
        slot = (row.table, row.key)
        entries = self._home(slot)
        entry = Entry(row.values, row.may_insert, stamp)
        earlier = entries.get(slot)
        entries[slot] = entry if earlier is None else earlier.merged_with(entry)
        if self._since is None:
            self._since = time.monotonic()
        if len(self._entries) >= self.flush_rows:
            self._due.set()

    def take(self) -> Entries:
        """Hand out what waits and is not held; give it back if it could not be written."""
        taken, self._entries = self._entries, {}
        self._taken_since, self._since = self._since, time.monotonic() if self._held and len(self) else None
        return taken

    def give_back(self, entries: Mapping[tuple[str, Key], Entry]) -> None:
        """Put entries back under whatever came meanwhile: they are older."""
        if not entries:
            return
        later, self._entries = self._entries, {}
        for slot, entry in entries.items():
            home = self._home(slot)
            above = home.get(slot)  # only where it is held: the others are still to be laid over
            home[slot] = entry if above is None else entry.merged_with(above)
        for slot, entry in later.items():
            below = self._entries.get(slot)
            self._entries[slot] = entry if below is None else below.merged_with(entry)
        self._since = self._taken_since or self._since or time.monotonic()

    def hold(self, guild_id: int) -> None:
        """Keep the guild's members here until `release`."""
        if guild_id not in self._held:
            held = {slot: entry for slot, entry in self._entries.items() if slot[0] == "members"}
            self._held[guild_id] = {slot: entry for slot, entry in held.items() if slot[1][0] == guild_id}
            for slot in self._held[guild_id]:
                del self._entries[slot]

    def release(self, guild_id: int) -> None:
        """Let the guild's members flow again."""
        self._entries |= self._held.pop(guild_id, {})

    def release_all(self) -> None:
        """Let everything flow again."""
        for guild_id in list(self._held):
            self.release(guild_id)

    def drop_oldest(self, count: int) -> tuple[int, set[int]]:
        """Drop the members that have waited longest, with their users; return how many rows, and of which guilds.

        A reconcile of these guilds brings them back. Nothing else is dropped: there are few of all other rows.
        """
        oldest: list[tuple[str, Key]] = []
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

    def wake(self) -> None:
        """Make a flush due now."""
        self._due.set()

    async def due(self) -> None:
        """Wait until a flush is due by size or by age, or somebody wakes it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.flush_seconds):
                await self._due.wait()
        self._due.clear()

    def _home(self, slot: tuple[str, Key]) -> Entries:
        if self._held and slot[0] == "members":
            return self._held.get(slot[1][0], self._entries)
        return self._entries

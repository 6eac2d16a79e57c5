"""What the reconcile knows of each guild, and which guild's turn it is."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from utils.mirror.discord.source import MEMBERS_PAGE
from utils.mirror.reconcile.listing import Listing
from utils.mirror.records.rows import Run

#: Where a guild stands in line whose size nobody knows: op 8 is good for any size.
UNKNOWN_SIZE = 2**31


@dataclass(eq=False, slots=True)
class GuildState:
    """One guild of the connected session."""

    id: int
    shard_id: int
    #: Members as Discord said last; None before GUILD_CREATE. It drifts, so it only decides whose turn it is.
    size: int | None = None
    available: bool = False
    #: Whether the GUILD_CREATE of this session is in the database.
    has_snapshot: bool = False
    #: Whether a listing asked for in this session is in the database.
    is_reconciled: bool = False
    #: Reconciles that failed in a row.
    failures: int = 0
    #: True when the next listing comes from REST whatever the guild's size: chunks failed.
    rest_next: bool = False
    #: Whether the database refused a row of an earlier listing.
    has_bad_row: bool = False
    #: `time.monotonic()` of the last op 8 for this guild; None when there was none.
    asked_at: float | None = None
    listing: Listing | None = None
    last_run: Run | None = None
    #: Why the guild waits for a reconcile; None when it does not wait.
    reason: str | None = None
    #: Threads that Discord showed as active in this session, and the channels they are in.
    active_threads: dict[int, int | None] = field(default_factory=dict)
    waiters: list[asyncio.Future[Run]] = field(default_factory=list)

    @property
    def is_small(self) -> bool:
        """Whether one REST page is expected to hold, and so to prove, the whole member list."""
        return self.size is not None and self.size < MEMBERS_PAGE


class Queue:
    """Guilds that wait for a reconcile, small ones first; two lanes take from it, each what it is good at.

    No guild is handed out twice at a time: a listing that has ended is never written after one asked for later.
    """

    def __init__(self, *, cooldown: float, rest_workers: int) -> None:
        #: Seconds between two full member requests of one guild: Discord's bound.
        self.cooldown = cooldown
        self._rest_workers = rest_workers
        self._waiting: list[tuple[int, int, GuildState]] = []
        self._running: set[int] = set()
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[GuildState]:
        return (state for _, _, state in self._waiting)

    async def add(self, state: GuildState, reason: str) -> None:
        """Put a guild in line; one that waits already keeps its place."""
        if state.reason is None:
            state.reason = reason
            bisect.insort(self._waiting, (UNKNOWN_SIZE if state.size is None else state.size, state.id, state))
        async with self._changed:
            self._changed.notify_all()

    async def done(self, state: GuildState) -> None:
        """Say that a guild handed out is done with."""
        self._running.discard(state.id)
        async with self._changed:
            self._changed.notify_all()

    def remove_shard(self, shard_id: int) -> None:
        """Take every guild of a shard out of the line."""
        for _, _, state in self._waiting:
            if state.shard_id == shard_id:
                state.reason = None
        self._waiting = [item for item in self._waiting if item[2].shard_id != shard_id]

    def remove(self, state: GuildState) -> None:
        """Take a guild out of the line."""
        if state.reason is not None:
            state.reason = None
            self._waiting = [item for item in self._waiting if item[2] is not state]

    async def take_for_rest(self) -> GuildState:
        """Wait for the smallest guild that REST is good for."""
        return await self._take(self._next_for_rest)

    async def take_for_gateway(self, may_help: Callable[[], bool]) -> GuildState:
        """Wait for the smallest large guild; with `may_help` and many small ones waiting, for the largest of those."""
        return await self._take(lambda: self._next_for_gateway(may_help()))

    async def _take(self, pick: Callable[[], int | None]) -> GuildState:
        async with self._changed:
            while (index := pick()) is None:
                # A guild may become due by time alone: when its cool-down ends. (Not `wait_for`: in Python 3.11 it may
                # swallow a cancellation, and the lane would outlive its stop.)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()
            state = self._waiting.pop(index)[2]
            self._running.add(state.id)
            return state

    def _next_for_rest(self) -> int | None:
        for index, (_, _, state) in enumerate(self._waiting):
            if (state.rest_next or state.is_small) and state.id not in self._running:
                return index
        return None

    def _next_for_gateway(self, may_help: bool) -> int | None:
        for index in range(bisect.bisect_left(self._waiting, (MEMBERS_PAGE,)), len(self._waiting)):
            if self._may_ask(self._waiting[index][2]):
                return index
        if may_help and len(self._waiting) > self._rest_workers:
            for index in range(len(self._waiting) - 1, -1, -1):
                if self._may_ask(self._waiting[index][2]):
                    return index
        return None

    def _may_ask(self, state: GuildState) -> bool:
        if state.rest_next or state.id in self._running:
            return False
        return state.asked_at is None or time.monotonic() - state.asked_at >= self.cooldown

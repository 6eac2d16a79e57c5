"""The state of each guild, and the queue of guilds that wait for a reconcile."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from utils.mirror.discord.source import MEMBERS_PAGE, ThreadKind
from utils.mirror.reconcile.listing import Listing
from utils.mirror.records.rows import Run

#: Sort key of a guild of unknown size: op 8 works for any size.
UNKNOWN_SIZE = 2**31


@dataclass(eq=False, slots=True)
class GuildState:
    """One guild of the current gateway session."""

    id: int
    shard_id: int
    #: Members according to GUILD_CREATE; None before it. The number drifts, so it decides the order only.
    size: int | None = None
    available: bool = False
    #: Whether the GUILD_CREATE of this session has been written.
    has_snapshot: bool = False
    #: Whether a listing requested in this session has been written.
    is_reconciled: bool = False
    #: Consecutive failed reconciles.
    failures: int = 0
    #: Whether the next listing must use REST whatever the guild's size: the last one over the gateway failed.
    needs_rest: bool = False
    #: Whether the database refused a row of an earlier listing.
    has_bad_row: bool = False
    #: `time.monotonic()` of the last op 8 for this guild; None if there was none.
    requested_at: float | None = None
    listing: Listing | None = None
    last_run: Run | None = None
    #: Why the guild waits for a reconcile; None if it does not.
    reason: str | None = None
    #: Parent channel of each thread that Discord showed as active in this session.
    active_threads: dict[int, int | None] = field(default_factory=dict)
    #: Channels and kinds of archived threads that were not listed, because the bot lacks the permission.
    skipped_archives: set[tuple[int, ThreadKind]] = field(default_factory=set)
    #: Futures of callers that wait for the next finished reconcile.
    waiters: list[asyncio.Future[Run]] = field(default_factory=list)


class GuildQueue:
    """Guilds that wait for a reconcile, small ones first; the REST and the gateway lanes each take what suits them.

    A guild is never handed out twice at a time, so an older listing is never written after a later one.
    """

    def __init__(self, *, cooldown: float, rest_workers: int, members_page: int = MEMBERS_PAGE) -> None:
        """`cooldown`: seconds between two full member requests of one guild. `members_page`: members on a REST page."""
        self.cooldown = cooldown
        self._rest_workers = rest_workers
        self._members_page = members_page
        self._waiting: list[tuple[int, int, GuildState]] = []
        self._running: set[int] = set()
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[GuildState]:
        return (state for _, _, state in self._waiting)

    def is_small(self, state: GuildState) -> bool:
        """Return whether one REST page is expected to hold, and so to prove, the whole member list."""
        return state.size is not None and state.size < self._members_page

    async def add(self, state: GuildState, reason: str) -> None:
        """Add a guild; one that already waits keeps its place."""
        if state.reason is None:
            state.reason = reason
            bisect.insort(self._waiting, (UNKNOWN_SIZE if state.size is None else state.size, state.id, state))
        async with self._changed:
            self._changed.notify_all()

    def remove(self, state: GuildState) -> None:
        """Remove a guild if it waits."""
        if state.reason is not None:
            state.reason = None
            self._waiting = [item for item in self._waiting if item[2] is not state]

    def remove_shard(self, shard_id: int) -> None:
        """Remove every guild of a shard."""
        for _, _, state in self._waiting:
            if state.shard_id == shard_id:
                state.reason = None
        self._waiting = [item for item in self._waiting if item[2].shard_id != shard_id]

    async def take_for_rest(self) -> GuildState:
        """Wait for and return the smallest guild that suits REST."""
        return await self._take(self._next_for_rest)

    async def take_for_gateway(self, has_spare_commands: Callable[[], bool]) -> GuildState:
        """Wait for the smallest large guild; if many wait and commands are to spare, for the largest small one."""
        return await self._take(lambda: self._next_for_gateway(has_spare_commands()))

    async def release(self, state: GuildState) -> None:
        """Return a guild that was taken: it may be handed out again."""
        self._running.discard(state.id)
        async with self._changed:
            self._changed.notify_all()

    async def _take(self, pick: Callable[[], int | None]) -> GuildState:
        async with self._changed:
            while (index := pick()) is None:
                # A guild may become due by time alone, when its cool-down ends. Not `wait_for`: in Python 3.11 it may
                # swallow a cancellation, and the lane would not stop.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()
            state = self._waiting.pop(index)[2]
            self._running.add(state.id)
            return state

    def _next_for_rest(self) -> int | None:
        for index, (_, _, state) in enumerate(self._waiting):
            if (state.needs_rest or self.is_small(state)) and state.id not in self._running:
                return index
        return None

    def _next_for_gateway(self, has_spare_commands: bool) -> int | None:
        first_large = bisect.bisect_left(self._waiting, (self._members_page,))
        for index in range(first_large, len(self._waiting)):
            if self._may_request(self._waiting[index][2]):
                return index
        if has_spare_commands and len(self._waiting) > self._rest_workers:
            for index in range(len(self._waiting) - 1, -1, -1):
                if self._may_request(self._waiting[index][2]):
                    return index
        return None

    def _may_request(self, state: GuildState) -> bool:
        if state.needs_rest or state.id in self._running:
            return False
        return state.requested_at is None or time.monotonic() - state.requested_at >= self.cooldown

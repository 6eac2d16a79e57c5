"""Fault injection: misbehaviour on demand, and a count of the faults that took effect."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .malformed import malformed_events

if TYPE_CHECKING:
    from .world import World

_UNSTORABLE_NAMES = {"nul": "n\0l", "lone_surrogate": "half \ud800 pair"}
Index = int | Literal["last", "middle", "first"]


class FaultySession(Protocol):
    """The part of a gateway session that faults are injected into."""

    def drop_socket(self) -> bool: ...
    def invalidate(self, *, resumable: bool) -> bool: ...
    def inject(self, message: bytes | dict[str, Any]) -> None: ...


@dataclass(slots=True)
class _PageFault:
    kind: str
    index: Index
    times: int


@dataclass(slots=True)
class RestFault:
    """An error or a delay for the REST requests whose "METHOD /path" contains a pattern; `status` None is a delay."""

    pattern: str
    status: int | None
    times: int
    retry_after: float
    seconds: float = 0.0


def page_number(index: Index, count: int) -> int:
    """Return the number of the page that `index` names among `count` pages."""
    if index == "last":
        return count - 1
    if index == "middle":
        return count // 2
    return 0 if index == "first" else index


class FaultInjector:
    """Injects faults into a running simulator; `injected` counts, by kind, those that took effect."""

    def __init__(self, world: World, sessions: Callable[[], Sequence[FaultySession]]) -> None:
        self.injected: Counter[str] = Counter()
        self.rng = random.Random(world.seed)
        self._world = world
        #: Cleared while the gateway is paused.
        self.running = asyncio.Event()
        self.running.set()
        self.duplicate_probability = 0.0
        self._sessions = sessions
        self._pages: dict[int, list[_PageFault]] = defaultdict(list)
        self._ignored_requests: Counter[int] = Counter()
        self._rate_limits: dict[int, list[float]] = defaultdict(list)
        self._drop_after_pages: dict[int, int] = {}
        self._drop_after_events: int | None = None
        self._refused_resumes = 0
        self._rest: list[RestFault] = []

    # Member pages.

    def drop_page(self, guild_id: int, index: Index = "middle", times: int = 1) -> None:
        """Omit one page of each of the guild's next `times` full member requests."""
        self._pages[guild_id].append(_PageFault("drop_page", index, times))

    def duplicate_page(self, guild_id: int, index: Index = "middle", times: int = 1) -> None:
        """Send one page of each of the guild's next `times` full member requests twice."""
        self._pages[guild_id].append(_PageFault("duplicate_page", index, times))

    def reorder_pages(self, guild_id: int, times: int = 1) -> None:
        """Shuffle the pages of each of the guild's next `times` full member requests."""
        self._pages[guild_id].append(_PageFault("reorder_pages", 0, times))

    def ignore_member_request(self, guild_id: int, times: int = 1) -> None:
        """Never answer the guild's next `times` full member requests."""
        self._ignored_requests[guild_id] += times

    def rate_limit_next(self, guild_id: int, retry_after: float = 1.0, times: int = 1) -> None:
        """Answer the guild's next `times` full member requests with RATE_LIMITED."""
        self._rate_limits[guild_id] += [retry_after] * times

    def drop_socket_after_pages(self, guild_id: int, n: int) -> None:
        """Drop the socket after `n` pages of the guild's member request."""
        self._drop_after_pages[guild_id] = n

    # Sockets and sessions.

    def drop_socket(self) -> int:
        """Drop every gateway socket without a close handshake; return how many there were."""
        return self._count("drop_socket", sum(session.drop_socket() for session in self._sessions()))

    def drop_socket_after_events(self, n: int) -> None:
        """Drop the socket after the next `n` dispatches."""
        self._drop_after_events = n

    def invalidate_session(self, resumable: bool = False) -> int:
        """Send op 9 to every connected session; return how many there were."""
        sessions = self._sessions()
        return self._count("invalidate_session", sum(s.invalidate(resumable=resumable) for s in sessions))

    def refuse_resume(self, times: int = 1) -> None:
        """Answer the next `times` RESUMEs with op 9."""
        self._refused_resumes += times

    def pause(self) -> None:
        """Stop sending over the gateway, heartbeat acknowledgements included, until `resume`."""
        self.injected["pause"] += 1
        self.running.clear()

    def resume(self) -> None:
        """Undo `pause`."""
        self.running.set()

    # Events.

    def duplicate_events(self, probability: float) -> None:
        """Send each event twice with this probability: same sequence number, immediately or a few events later."""
        self.duplicate_probability = probability

    def inject_raw(self, message: bytes | dict[str, Any]) -> None:
        """Send bytes verbatim, or a dict {"t", "d"} as a dispatch with a sequence number, to every session."""
        self.injected["inject_raw"] += 1
        for session in self._sessions():
            session.inject(message)

    def send_malformed(self, kind: str, guild_id: int | None = None) -> None:
        """Send a malformed event about a guild, by default the first one.

        The kinds are those of `simulator.malformed`, plus "nul" and "lone_surrogate", which rename the guild's owner
        to a name that contains such a character. Raises ValueError for an unknown kind.
        """
        world = self._world
        guild = world.guild(guild_id) if guild_id is not None else next(iter(world.guilds.values()))
        events = malformed_events(guild)
        if kind in _UNSTORABLE_NAMES:
            world.rename_user(guild.owner_id, global_name=_UNSTORABLE_NAMES[kind])
        elif kind in events:
            self.inject_raw(events[kind])
        else:
            known = ", ".join([*events, *_UNSTORABLE_NAMES])
            raise ValueError(f"unknown kind of malformed payload {kind!r}: choose from {known}")
        self.injected[f"malformed {kind}"] += 1

    # REST.

    def rest_fail(self, pattern: str, status: int = 500, times: int = 1, retry_after: float = 0.1) -> None:
        """Fail the next `times` requests whose "METHOD /path" contains `pattern`."""
        self._rest.append(RestFault(pattern, status, times, retry_after))

    def rest_delay(self, pattern: str, seconds: float, times: int = 1_000_000) -> None:
        """Delay responses to requests whose "METHOD /path" contains `pattern`; they show the state at request time."""
        self._rest.append(RestFault(pattern, None, times, 0.0, seconds))

    def clear(self) -> None:
        """Cancel every fault; the counts remain."""
        self.running.set()
        self.duplicate_probability = 0.0
        self._drop_after_events, self._refused_resumes = None, 0
        for pending in (self._pages, self._ignored_requests, self._rate_limits, self._drop_after_pages, self._rest):
            pending.clear()

    # Called by the gateway and the REST routes; each call uses up one occurrence of the fault.

    def take_page_order(self, guild_id: int, count: int) -> list[int]:
        """Return which pages to send, in order, for a full member request of `count` pages."""
        order = list(range(count))
        for fault in self._pages.pop(guild_id, []):
            page = page_number(fault.index, count)
            if fault.kind == "reorder_pages":
                self.rng.shuffle(order)
                if count > 1 and order == list(range(count)):
                    order.reverse()
                had_effect = count > 1
            elif fault.kind == "drop_page":
                had_effect = page in order
                order = [number for number in order if number != page]
            else:
                had_effect = page in order
                order = [number for number in order for _ in range(2 if number == page else 1)]
            self.injected[fault.kind] += had_effect
            if fault.times > 1:
                self._pages[guild_id].append(_PageFault(fault.kind, fault.index, fault.times - 1))
        return order

    def take_ignored_request(self, guild_id: int) -> bool:
        """Return whether to ignore a full member request."""
        if self._ignored_requests[guild_id] <= 0:
            return False
        self._ignored_requests[guild_id] -= 1
        return bool(self._count("ignore_member_request", 1))

    def take_rate_limit(self, guild_id: int) -> float | None:
        """Return the `retry_after` with which to refuse a full member request, or None."""
        pending = self._rate_limits.get(guild_id)
        if not pending:
            return None
        self.injected["rate_limit_next"] += 1
        return pending.pop(0)

    def take_drop_after_page(self, guild_id: int) -> bool:
        """Count a page as sent; return whether to drop the socket now."""
        left = self._drop_after_pages.get(guild_id)
        if left is None:
            return False
        if left > 1:
            self._drop_after_pages[guild_id] = left - 1
            return False
        del self._drop_after_pages[guild_id]
        return bool(self._count("drop_socket_after_pages", 1))

    def take_drop_after_event(self) -> bool:
        """Count an event as sent; return whether to drop the socket now."""
        if self._drop_after_events is None:
            return False
        self._drop_after_events -= 1
        if self._drop_after_events > 0:
            return False
        self._drop_after_events = None
        return bool(self._count("drop_socket_after_events", 1))

    def take_refused_resume(self) -> bool:
        """Return whether to refuse a RESUME."""
        if self._refused_resumes <= 0:
            return False
        self._refused_resumes -= 1
        return bool(self._count("refuse_resume", 1))

    def take_duplicate_delay(self) -> int | None:
        """Return after how many further events to send an event again, or None to send it once."""
        if self.duplicate_probability <= 0 or self.rng.random() >= self.duplicate_probability:
            return None
        self.injected["duplicate_events"] += 1
        return self.rng.choice((0, 0, 1, 3))

    def take_rest_fault(self, request: str) -> tuple[RestFault | None, float]:
        """Return the error (or None) and the delay in seconds for a request "METHOD /path"."""
        error, delay = None, 0.0
        for fault in list(self._rest):
            if fault.pattern not in request or (fault.status is not None and error is not None):
                continue
            fault.times -= 1
            if fault.times <= 0:
                self._rest.remove(fault)
            if fault.status is None:
                delay += fault.seconds
                self.injected["rest_delay"] += 1
            else:
                error = fault
                self.injected["rest_fail"] += 1
        return error, delay

    def _count(self, kind: str, number: int) -> int:
        self.injected[kind] += number
        return number

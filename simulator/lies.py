"""Lies: the ways in which the simulator can be told to misbehave, and a count of what it did."""

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

_HARD_NAMES = {"nul": "n\0l", "lone_surrogate": "half \ud800 pair"}
Index = int | Literal["last", "middle", "first"]


class LiveSession(Protocol):
    """What a lie needs of a gateway session."""

    def drop_socket(self) -> bool: ...
    def invalidate(self, *, resumable: bool) -> bool: ...
    def inject(self, message: bytes | dict[str, Any]) -> None: ...


@dataclass(slots=True)
class _PageLie:
    kind: str
    index: Index
    times: int


@dataclass(slots=True)
class RestLie:
    """A fault or a delay of the REST requests whose "METHOD /path" contains a pattern."""

    pattern: str
    status: int | None
    times: int
    retry_after: float
    seconds: float = 0.0


def locate(index: Index, count: int) -> int:
    """Turn a page's name into its number among `count` pages."""
    if index == "last":
        return count - 1
    if index == "middle":
        return count // 2
    return 0 if index == "first" else index


class Lies:
    """Everything can be set while the simulator runs; `done` counts the lies that were actually told."""

    def __init__(self, world: World, sessions: Callable[[], Sequence[LiveSession]]) -> None:
        self.done: Counter[str] = Counter()
        self.rng = random.Random(world.seed)
        self._world = world
        self.running = asyncio.Event()
        self.running.set()
        self.duplicate_probability = 0.0
        self._sessions = sessions
        self._pages: dict[int, list[_PageLie]] = defaultdict(list)
        self._silence: Counter[int] = Counter()
        self._rate_limits: dict[int, list[float]] = defaultdict(list)
        self._drop_after_pages: dict[int, int] = {}
        self._drop_after_events: int | None = None
        self._refused_resumes = 0
        self._rest: list[RestLie] = []

    # Member pages.

    def drop_page(self, guild_id: int, index: Index = "middle", times: int = 1) -> None:
        """Lose one page of each of the guild's next `times` full member requests."""
        self._pages[guild_id].append(_PageLie("drop_page", index, times))

    def duplicate_page(self, guild_id: int, index: Index = "middle", times: int = 1) -> None:
        """Send one page twice."""
        self._pages[guild_id].append(_PageLie("duplicate_page", index, times))

    def reorder_pages(self, guild_id: int, times: int = 1) -> None:
        """Send the pages in a shuffled order."""
        self._pages[guild_id].append(_PageLie("reorder_pages", 0, times))

    def silence(self, guild_id: int, times: int = 1) -> None:
        """Never answer the guild's next `times` full member requests."""
        self._silence[guild_id] += times

    def rate_limit_next(self, guild_id: int, retry_after: float = 1.0, times: int = 1) -> None:
        """Answer the guild's next `times` full member requests with RATE_LIMITED."""
        self._rate_limits[guild_id] += [retry_after] * times

    def drop_socket_after_pages(self, guild_id: int, n: int) -> None:
        """Drop the socket once `n` pages of the guild's member request were sent."""
        self._drop_after_pages[guild_id] = n

    # Sockets and sessions.

    def drop_socket(self) -> int:
        """Drop every gateway socket now, without a closing handshake; returns how many."""
        return self._count("drop_socket", sum(session.drop_socket() for session in self._sessions()))

    def drop_socket_after_events(self, n: int) -> None:
        """Drop the socket after the next `n` dispatched events."""
        self._drop_after_events = n

    def invalidate_session(self, resumable: bool = False) -> int:
        """Send op 9 to every connected session; returns how many."""
        sessions = self._sessions()
        return self._count("invalidate_session", sum(s.invalidate(resumable=resumable) for s in sessions))

    def refuse_resume(self, times: int = 1) -> None:
        """Answer the next `times` RESUMEs with op 9."""
        self._refused_resumes += times

    def pause(self) -> None:
        """Stop sending anything over the gateway, heartbeat acknowledgements included."""
        self.done["pause"] += 1
        self.running.clear()

    def resume(self) -> None:
        """Send again."""
        self.running.set()

    # Events.

    def duplicate_events(self, probability: float) -> None:
        """Send events twice with this probability: same sequence number, at once or a few events later."""
        self.duplicate_probability = probability

    def inject_raw(self, message: bytes | dict[str, Any]) -> None:
        """Send something as it is: bytes verbatim, a dict {"t", "d"} as a dispatch with a sequence number."""
        self.done["inject_raw"] += 1
        for session in self._sessions():
            session.inject(message)

    def malformed(self, kind: str, guild_id: int | None = None) -> None:
        """Send a broken event about a guild, the first one by default.

        The kinds are those of `simulator.malformed` and, in place of a false event, "nul" and "lone_surrogate": the
        owner really takes a name with that in it.
        """
        world = self._world
        guild = world.guild(guild_id) if guild_id is not None else next(iter(world.guilds.values()))
        events = malformed_events(guild)
        if kind in _HARD_NAMES:
            world.rename_user(guild.owner_id, global_name=_HARD_NAMES[kind])
        elif kind in events:
            self.inject_raw(events[kind])
        else:
            known = ", ".join([*events, *_HARD_NAMES])
            raise ValueError(f"unknown kind of malformed payload {kind!r}: choose from {known}")
        self.done[f"malformed {kind}"] += 1

    # REST.

    def rest_fail(self, pattern: str, status: int = 500, times: int = 1, retry_after: float = 0.1) -> None:
        """Fail the next `times` requests whose "METHOD /path" contains `pattern`."""
        self._rest.append(RestLie(pattern, status, times, retry_after))

    def rest_delay(self, pattern: str, seconds: float, times: int = 1_000_000) -> None:
        """Answer requests whose "METHOD /path" contains `pattern` late, with what was true when they came."""
        self._rest.append(RestLie(pattern, None, times, 0.0, seconds))

    def clear(self) -> None:
        """Tell the truth from now on; the counts stay."""
        self.running.set()
        self.duplicate_probability = 0.0
        self._drop_after_events, self._refused_resumes = None, 0
        for told in (self._pages, self._silence, self._rate_limits, self._drop_after_pages, self._rest):
            told.clear()

    # What the simulator asks.

    def take_plan(self, guild_id: int, count: int) -> list[int]:
        """Say which pages, in which order, answer a full member request."""
        plan = list(range(count))
        for lie in self._pages.pop(guild_id, []):
            page = locate(lie.index, count)
            if lie.kind == "reorder_pages":
                self.rng.shuffle(plan)
                if count > 1 and plan == list(range(count)):
                    plan.reverse()
                told = count > 1
            elif lie.kind == "drop_page":
                told = page in plan
                plan = [number for number in plan if number != page]
            else:
                told = page in plan
                plan = [number for number in plan for _ in range(2 if number == page else 1)]
            self.done[lie.kind] += told
            if lie.times > 1:
                self._pages[guild_id].append(_PageLie(lie.kind, lie.index, lie.times - 1))
        return plan

    def take_silence(self, guild_id: int) -> bool:
        """Say whether a full member request is to be ignored."""
        if self._silence[guild_id] <= 0:
            return False
        self._silence[guild_id] -= 1
        return bool(self._count("silence", 1))

    def take_rate_limit(self, guild_id: int) -> float | None:
        """Say whether a full member request is to be refused, and for how long."""
        waiting = self._rate_limits.get(guild_id)
        if not waiting:
            return None
        self.done["rate_limit_next"] += 1
        return waiting.pop(0)

    def take_page_drop(self, guild_id: int) -> bool:
        """Count a page sent, and say whether the socket drops after it."""
        left = self._drop_after_pages.get(guild_id)
        if left is None:
            return False
        if left > 1:
            self._drop_after_pages[guild_id] = left - 1
            return False
        del self._drop_after_pages[guild_id]
        return bool(self._count("drop_socket_after_pages", 1))

    def take_event_drop(self) -> bool:
        """Count an event sent, and say whether the socket drops after it."""
        if self._drop_after_events is None:
            return False
        self._drop_after_events -= 1
        if self._drop_after_events > 0:
            return False
        self._drop_after_events = None
        return bool(self._count("drop_socket_after_events", 1))

    def take_refusal(self) -> bool:
        """Say whether a RESUME is to be refused."""
        if self._refused_resumes <= 0:
            return False
        self._refused_resumes -= 1
        return bool(self._count("refuse_resume", 1))

    def take_echo(self) -> int | None:
        """Say whether an event is sent twice: after how many further events, or None."""
        if self.duplicate_probability <= 0 or self.rng.random() >= self.duplicate_probability:
            return None
        self.done["duplicate_events"] += 1
        return self.rng.choice((0, 0, 1, 3))

    def take_rest(self, request: str) -> tuple[RestLie | None, float]:
        """Say how a request "METHOD /path" fails, if it does, and how late it is answered."""
        fault, delay = None, 0.0
        for lie in list(self._rest):
            if lie.pattern not in request or (lie.status is not None and fault is not None):
                continue
            lie.times -= 1
            if lie.times <= 0:
                self._rest.remove(lie)
            if lie.status is None:
                delay += lie.seconds
                self.done["rest_delay"] += 1
            else:
                fault = lie
                self.done["rest_fail"] += 1
        return fault, delay

    def _count(self, kind: str, number: int) -> int:
        self.done[kind] += number
        return number

"""Discord's rate limits and the sliding windows that enforce them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from math import inf


@dataclass(slots=True, frozen=True)
class Limits:
    """Rate limits and response times; all times in seconds.

    `chunk_cooldown`: minimum time between two full member requests (op 8) of a guild.
    `gateway_commands` per `gateway_window`: above it the gateway closes with 4008.
    `rest_per_second`: the global REST limit. `route_limit` per `route_window`: a bucket for each route and resource,
    None for no buckets. `rest_latency`: added to each REST answer. `pages_per_second`: rate of member pages on the
    gateway, None for as fast as the socket accepts them. `members_per_page`: size of these pages; Discord's is 1,000.
    """

    chunk_cooldown: float = 30.0
    gateway_commands: float = 120
    gateway_window: float = 60.0
    rest_per_second: float = 50
    route_limit: int | None = None
    route_window: float = 1.0
    rest_latency: float = 0.0
    pages_per_second: float | None = None
    members_per_page: int = 1000

    @classmethod
    def none(
        cls, *, rest_latency: float = 0.0, pages_per_second: float | None = None, members_per_page: int = 1000
    ) -> Limits:
        """Return limits that never reject a request."""
        return cls(0.0, inf, 60.0, inf, None, 1.0, rest_latency, pages_per_second, members_per_page)


class SlidingWindow:
    """Counts events in a sliding window."""

    __slots__ = ("_limit", "_seconds", "_times")

    def __init__(self, limit: float, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._times: deque[float] = deque()

    @property
    def remaining(self) -> float:
        """Number of further events allowed now."""
        return self._limit - len(self._times)

    def take(self) -> float:
        """Count an event and return 0; if the window is full, return the seconds to wait without counting it."""
        if self._limit == inf:
            return 0.0
        now = time.monotonic()
        while self._times and self._times[0] <= now - self._seconds:
            self._times.popleft()
        if len(self._times) >= self._limit:
            return self._times[0] + self._seconds - now
        self._times.append(now)
        return 0.0

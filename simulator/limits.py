"""The limits Discord sets, and the counters that keep to them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from math import inf


@dataclass(slots=True, frozen=True)
class Limits:
    """What a bot may ask, and how fast the simulator answers; times in seconds.

    `chunk_cooldown`: one full member request (op 8) a guild in that time.
    `gateway_commands` per `gateway_window`: above it the gateway closes with 4008.
    `rest_per_second`: the global REST limit. `route_limit` per `route_window`: a bucket for each route and resource,
    None for no buckets. `rest_latency`: added to each REST answer. `pages_per_second`: pace of member pages on the
    gateway, None for as fast as the socket takes them. `members_per_page`: size of these pages; Discord's is 1,000.
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
        """Make limits that never refuse anything."""
        return cls(0.0, inf, 60.0, inf, None, 1.0, rest_latency, pages_per_second, members_per_page)


class Window:
    """Counts what happened within a sliding window and says how long to wait when it is full."""

    __slots__ = ("_limit", "_moments", "_seconds")

    def __init__(self, limit: float, seconds: float) -> None:
        self._limit = limit
        self._seconds = seconds
        self._moments: deque[float] = deque()

    @property
    def remaining(self) -> float:
        """How many more fit in now."""
        return self._limit - len(self._moments)

    def take(self) -> float:
        """Count one and return 0, or return the seconds until there is room without counting it."""
        if self._limit == inf:
            return 0.0
        now = time.monotonic()
        while self._moments and self._moments[0] <= now - self._seconds:
            self._moments.popleft()
        if len(self._moments) >= self._limit:
            return self._moments[0] + self._seconds - now
        self._moments.append(now)
        return 0.0

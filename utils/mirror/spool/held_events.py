"""Events that a process hears just after it was stopped: another one may act since, and have heard them in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from utils.mirror.records.events import Event, Message

#: Events kept back; beyond it memory counts more than the time of a leave.
MOST = 20_000
#: Seconds between two looks whether the lease has been asked for.
LOOK_SECONDS = 0.1


class HeldEvents:
    """Keeps events back while it is open whether this process still acts.

    If it does they are told as ever. If it does not, messages are told all the same: their ids say which are counted.
    Joins and leaves are not: the time at which they were heard is wrong by as long as the process was stopped, which is
    how two processes' leaves are told apart; the one that acts has heard them, or its listing proves them.
    """

    __slots__ = ("_events", "_has_slept", "_settled", "_tell", "_timer")

    def __init__(self, tell: Callable[[Event], None], has_slept: Callable[[], bool]) -> None:
        self._tell = tell
        self._has_slept = has_slept
        self._events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self._settled.set()

    def __len__(self) -> int:
        return len(self._events)

    def tell(self, event: Event) -> None:
        """Tell of an event, now or when the doubt is settled."""
        if not self._events and not self._has_slept():
            self._tell(event)
            return
        self._events.append(event)
        self._settled.clear()
        if self._timer is None:
            self._look()

    def end(self, *, is_lost: bool) -> None:
        """Settle it: `is_lost` when another process acts."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        events, self._events = self._events, []
        for event in events:
            if not is_lost or isinstance(event, Message):
                self._tell(event)
        self._settled.set()

    async def settled(self) -> None:
        """Wait until nothing is in doubt: for as long as the database does not answer, at most until memory is full."""
        await self._settled.wait()

    def _look(self) -> None:
        if not self._has_slept() or len(self._events) >= MOST:
            self.end(is_lost=False)
        else:
            self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

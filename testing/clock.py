"""Time that a test moves forward: what cooldowns and loops go by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import discord
from discord.ext import tasks

from testing.people import wait_for
from utils import packs
from utils.base_cog import BaseCog
from utils.bot.periodic import RetryingLoop, loops_of

if TYPE_CHECKING:
    from testing.running import RunningBot

#: Seconds for one iteration of a loop.
ITERATION_SECONDS = 15.0


class Clock:
    """The time of interactions, messages and `discord.utils.utcnow`; loops run as often as they would have."""

    def __init__(self, bot: RunningBot) -> None:
        self._bot = bot
        self._seconds = 0.0
        self._utcnow: Callable[[], datetime] = discord.utils.utcnow

    def now(self) -> datetime:
        """Return the current time."""
        return self._utcnow() + timedelta(seconds=self._seconds)

    async def advance(self, seconds: float) -> None:
        """Move the time forward, and wait until the loops of the packs' cogs have run as often as is then due.

        Cooldowns see it, and so does what the cogs read by `discord.utils.utcnow()`. The database, timeouts,
        `asyncio.sleep`, and work whose next run the database keeps (`key=`) do not.
        """
        self._seconds += seconds
        self._bot.simulator.interactions.clock_offset = self._seconds
        self._bot.world.now_us += round(seconds * 1e6)
        discord.utils.utcnow = self.now
        for loop in list(self._loops()):
            if isinstance(loop, RetryingLoop) and loop.key is not None:
                await self._run_when_due(loop)
            else:
                await self._catch_up(loop)

    def reset(self) -> None:
        """Return to the time of the machine."""
        self._seconds = 0.0
        self._bot.simulator.interactions.clock_offset = 0.0
        discord.utils.utcnow = self._utcnow

    def _loops(self) -> Iterator[tasks.Loop[Any]]:
        """Yield the running loops of cogs that are in packs: those of `every`, and of discord.ext.tasks."""
        for cog in self._bot.bot.cogs.values():
            if packs.module_owner(type(cog).__module__) is None:
                continue
            for loop in vars(cog).values() if not isinstance(cog, BaseCog) else loops_of(cog):
                if isinstance(loop, tasks.Loop) and loop.is_running():
                    yield loop

    async def _run_when_due(self, loop: RetryingLoop) -> None:
        """Run work whose next run the database remembers, by its own clock, as often as it is due by now."""
        due = loop.next_iteration
        while due is not None and due <= self.now():
            await loop()
            due += timedelta(seconds=loop.interval)

    async def _catch_up(self, loop: tasks.Loop[Any]) -> None:
        while loop.is_running() and (due := loop.next_iteration) is not None and due <= self.now():
            handle = loop._handle
            assert handle is not None, "it runs, and so it sleeps or has slept"
            handle.recalculate(datetime.now(UTC) - timedelta(seconds=1))

            def is_asleep_again(previous: object = handle) -> bool:
                return not loop.is_running() or loop._handle is not previous

            late = f"an iteration of {loop.coro.__qualname__} took longer than {ITERATION_SECONDS:g} s"
            await wait_for(is_asleep_again, ITERATION_SECONDS, late)

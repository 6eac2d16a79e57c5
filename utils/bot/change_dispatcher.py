"""Calls the listeners of `on_mirror_change`: in order for each guild, a few at once, and each for a bounded time."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import stamina
from discord.ext import commands

from utils.bot.command_errors import new_reference
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable, GuildbookError
from utils.mirror.change_feed import MirrorChange
from utils.mirror.write.dead_letters import bury_change
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

Listener = Callable[[MirrorChange], Coroutine[Any, Any, Any]]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Coroutine[Any, Any, Any]])

#: The attribute that `idempotent` sets.
_IDEMPOTENT = "__guildbook_idempotent__"
#: Seconds between two checks whether a listener is back, and whether there is room.
_CHECK_SECONDS = 0.05


class DispatchPolicy(NamedTuple):
    """How listeners are called; times are seconds."""

    #: Calls of one listener at once: guilds are independent of each other.
    concurrency: int = 8
    #: How long one call may take.
    timeout: float = 60.0
    #: Calls of an idempotent listener for one change, and the delay before the second; it doubles up to the maximum.
    attempts: int = 5
    retry_seconds: float = 1.0
    retry_max_seconds: float = 30.0
    #: Changes that may wait for listeners before no more are read.
    max_waiting: int = 2_000
    #: How long a listener that is gone is waited for: its cog may be reloading.
    reload_seconds: float = 30.0
    #: How long a call that was cancelled may take to end.
    cancel_seconds: float = 5.0


def idempotent(listener: FunctionT) -> FunctionT:
    """Declare that a listener of `on_mirror_change` may be called again for a change: if it raises or hangs, it is.

    It is called up to five times, with growing delays. Then the change becomes a row of `ops.dead_letters`, with the
    cog's name, and the listener goes on with the next change of the guild. A listener without this decorator is called
    once.

    Example::

        @commands.Cog.listener()
        @idempotent
        async def on_mirror_change(self, change: MirrorChange) -> None:
            if change.action == "leave":
                await self.db.execute("DELETE FROM carts WHERE user_id = $1", change.user_id)
    """
    setattr(listener, _IDEMPOTENT, True)
    return listener


def is_idempotent(listener: Callable[..., Any]) -> bool:
    """Return whether a listener was declared `idempotent`."""
    return bool(getattr(listener, _IDEMPOTENT, False))


class _Progress:
    """Which changes one listener has received."""

    def __init__(self, concurrency: int, delivered_before: int) -> None:
        #: An earlier process has delivered every change up to this id.
        self.delivered_before = delivered_before
        #: Ids of the changes that were not delivered yet, in order.
        self.waiting: dict[int, None] = {}
        self.slots = asyncio.Semaphore(concurrency)


class ChangeDispatcher:
    """Passes changes on to listeners: for each listener and guild, one after the other.

    A listener that raises or hangs delays only itself, and only for changes of the same guild.
    """

    def __init__(
        self, pool: Pool, listeners: Callable[[], Sequence[Listener]], policy: DispatchPolicy | None = None
    ) -> None:
        """`listeners` returns those that are registered now."""
        self._pool = pool
        self._listeners = listeners
        self._policy = policy or DispatchPolicy()
        self._progress: dict[str, _Progress] = {}
        self._delivered_before: dict[str, int] = {}
        #: By listener and guild (None: users), the changes that wait, and the tasks that pass them on.
        self._lanes: dict[tuple[str, int | None], deque[MirrorChange]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        #: Calls of listeners that are running.
        self._calls: set[asyncio.Task[Any]] = set()
        self._is_paused = False
        #: Id of the first change that came while the bot was closing; None if there was none.
        self._first_undelivered: int | None = None

    def resume_from(self, positions: dict[str, int]) -> None:
        """Take up where an earlier process stopped: the id of the last change that each listener received."""
        self._delivered_before |= positions

    # --- what the feed calls

    def dispatch(self, change: MirrorChange) -> None:
        """Queue a change for every listener."""
        if self._is_paused:
            self._first_undelivered = self._first_undelivered or change.id
            return
        for name in self._registered():
            progress = self._progress.get(name)
            if progress is None:
                progress = self._progress[name] = _Progress(
                    self._policy.concurrency, self._delivered_before.get(name, 0)
                )
            if change.id <= progress.delivered_before:
                continue
            progress.waiting[change.id] = None
            lane = self._lanes.get((name, change.guild_id))
            if lane is not None:
                lane.append(change)
                continue
            self._lanes[name, change.guild_id] = deque((change,))
            task = asyncio.get_running_loop().create_task(
                self._work(name, change.guild_id), name=f"changes for {name}", context=contextvars.Context()
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def wait_for_room(self) -> None:
        """Wait until few enough changes wait for listeners; forever once the bot is closing."""
        while self._is_paused or self.waiting > self._policy.max_waiting:  # noqa: ASYNC110 - many things make room
            await asyncio.sleep(_CHECK_SECONDS)

    @property
    def waiting(self) -> int:
        """How many changes wait for listeners, counted for each of them."""
        return sum(len(progress.waiting) for progress in self._progress.values())

    def positions(self, read: int) -> tuple[int, dict[str, int]]:
        """Return up to which id all listeners have received the changes, and which of them more, up to which.

        `read`: the id up to which changes were dispatched.
        """
        if self._first_undelivered is not None:
            read = min(read, self._first_undelivered - 1)
        delivered = {
            name: next(iter(progress.waiting)) - 1 if progress.waiting else read
            for name, progress in self._progress.items()
        }
        lowest = min((read, *delivered.values()))
        return lowest, {name: position for name, position in delivered.items() if position > lowest}

    # --- the end

    def pause(self) -> None:
        """Call no listener any more: the bot closes, and its cogs go. What waits is for the next process."""
        self._is_paused = True

    async def stop(self, timeout: float) -> None:
        """Wait for calls that are running, for at most `timeout` seconds, and end them."""
        self.pause()
        if self._calls:
            await asyncio.wait(self._calls, timeout=timeout)
        await cancel_and_wait(self._tasks, timeout)

    # --- one lane

    async def _work(self, name: str, guild_id: int | None) -> None:
        lane, waiting = self._lanes[name, guild_id], self._progress[name].waiting
        try:
            while lane:
                await self._deliver(name, lane[0])
                waiting.pop(lane.popleft().id, None)
        finally:
            del self._lanes[name, guild_id]

    async def _deliver(self, name: str, change: MirrorChange) -> None:
        """Call a listener for one change, again if it may be. Raises nothing but its cancellation."""
        listener = await self._find(name)
        if listener is None:
            return  # it was unloaded
        policy, may_repeat = self._policy, is_idempotent(listener)
        try:
            async for attempt in stamina.retry_context(
                on=lambda error: may_repeat and isinstance(error, Exception),
                attempts=policy.attempts if may_repeat else 1,
                timeout=None,
                wait_initial=policy.retry_seconds,
                wait_max=policy.retry_max_seconds,
                wait_jitter=policy.retry_seconds / 2,
            ):
                with attempt:
                    await self._call(name, change)
        except Exception as error:
            reference = new_reference()
            _log.error(
                "on_mirror_change failed: %s: change %s (ref %s)%s", name, change.id, reference,
                f"; it was called {policy.attempts} times, and the change is in ops.dead_letters" if may_repeat else "",
                exc_info=error, extra={"reference": reference, "guild_id": change.guild_id},
            )  # fmt: skip
            if may_repeat:
                await self._bury(listener, change, error)

    async def _call(self, name: str, change: MirrorChange) -> None:
        """Call a listener once. Raises what it raises, and `TimeoutError` if it does not end in time."""
        policy, progress = self._policy, self._progress[name]
        async with progress.slots:
            listener = await self._find(name)
            if listener is None:
                return
            context = contextvars.Context()
            task = asyncio.get_running_loop().create_task(listener(change), name=name, context=context)
            self._calls.add(task)
            try:
                await asyncio.wait((task,), timeout=policy.timeout)
            finally:
                self._calls.discard(task)
                is_late = not task.done()
                if await cancel_and_wait((task,), policy.cancel_seconds):
                    _log.critical("%s ignored its cancellation and keeps running in the background", name)
                if asyncio.current_task().cancelling() and not is_idempotent(listener):  # type: ignore[union-attr]
                    progress.waiting.pop(change.id, None)  # delivered, and not to be delivered again
            if is_late:
                raise TimeoutError(f"it did not end within {policy.timeout:g} s and was cancelled")
            if task.cancelled():
                raise GuildbookError("it was cancelled")
            task.result()

    async def _bury(self, listener: Listener, change: MirrorChange, error: Exception) -> None:
        """Store a change that a listener failed on; waits for the database if need be."""
        cog = getattr(listener, "__self__", None)
        owner = cog.qualified_name if isinstance(cog, commands.Cog) else _name_of(listener)
        payload = {"listener": _name_of(listener), "change": {**asdict(change), "at": change.at.isoformat()}}
        try:
            async for attempt in stamina.retry_context(on=DatabaseUnavailable, attempts=None, timeout=None):
                with attempt:
                    await bury_change(
                        self._pool,
                        owner,
                        table=change.table,
                        key=change.key,
                        user_id=change.user_id,
                        payload=payload,
                        id=change.id,
                        error=error,
                    )
        except GuildbookError:
            _log.exception("could not store a change that a listener failed on", extra={"change": change.id})

    # --- listeners by name: a reload replaces the functions

    async def _find(self, name: str) -> Listener | None:
        """Return a registered listener; wait for one whose cog is being reloaded, and return None if it is gone."""
        ends_at = asyncio.get_running_loop().time() + self._policy.reload_seconds
        while self._is_paused or (listener := self._registered().get(name)) is None:
            if not self._is_paused and asyncio.get_running_loop().time() > ends_at:
                return None
            await asyncio.sleep(_CHECK_SECONDS)
        return listener

    def _registered(self) -> dict[str, Listener]:
        found: dict[str, Listener] = {}
        for listener in self._listeners():
            name, number = _name_of(listener), 1
            while name in found:
                number += 1
                name = f"{_name_of(listener)} {number}"
            found[name] = listener
        return found


def _name_of(listener: Callable[..., Awaitable[Any]]) -> str:
    """Return a name that is the same in the next process."""
    return f"{getattr(listener, '__module__', '?')}.{getattr(listener, '__qualname__', repr(listener))}"

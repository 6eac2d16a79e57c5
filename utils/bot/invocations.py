"""Every run of a command, a component or a form, from its receipt to its answer: nobody is left without one.

An interaction that nobody has responded to after 2.5 seconds is deferred. One that takes longer than its bound is given
up: its statements are cancelled, its transaction is rolled back, and the user is told. An error that no handler has
caught is answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import discord
from discord.ext import commands

from utils.bot import command_errors
from utils.bot.positions import describe_position
from utils.bot.responses import FirstResponse
from utils.database import deadline
from utils.database.deadline import ROLLBACK_SECONDS, Deadline
from utils.exceptions import CommandTimedOut, CommitUnknown, Declined, GuildbookError
from utils.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

#: Seconds after which an interaction is deferred. Discord shows a failure after 3.
DEFER_SECONDS = 2.5
#: How much earlier it is deferred for each run in progress, because all of their requests go out one after the other,
#: and the shortest time that a run has.
STAGGER_SECONDS, LEAST_SECONDS = 0.01, 0.5
#: Seconds for a commit that is under way when its command is given up.
COMMIT_SECONDS = 5.0
#: Seconds for commands to end by themselves when the bot stops.
STOP_SECONDS = 1.0
#: Seconds to ask Discord whether a deferral was followed by a message.
ASK_SECONDS = 10.0

NO_ANSWER = "The command has ended without an answer."
INACTIVE = "This is not active any more. Run the command again."
STOPPING = "The bot is restarting, so this was given up. Try again in a minute."

FunctionT = TypeVar("FunctionT")
_ATTRIBUTE = "__guildbook_bound__"


@dataclass(frozen=True, slots=True)
class Bound:
    """How long a command may take, and how it is deferred."""

    #: Seconds; None: COMMAND_TIMEOUT_SECONDS; 0: as long as it wants.
    seconds: float | None = None
    #: Whether a deferral is shown to the user only; None: if the code of the callback mentions `ephemeral`.
    ephemeral: bool | None = None


def bounded(seconds: float | None = None, *, ephemeral: bool | None = None) -> Callable[[FunctionT], FunctionT]:
    """Return a decorator for a command, a component's callback or `on_submit`: how long it may take.

    seconds: after so long without an answer, or with one statement or transaction, it is given up; None:
        COMMAND_TIMEOUT_SECONDS, 0: never.
    ephemeral: whether a deferral after 2.5 seconds is shown to the user only. None: if the callback's own code mentions
        `ephemeral`.

    Example::

        @app_commands.command()
        @bounded(300, ephemeral=True)
        async def report(self, interaction: discord.Interaction[Guildbook]) -> None: ...
    """

    def decorate(function: FunctionT) -> FunctionT:
        setattr(getattr(function, "callback", function), _ATTRIBUTE, Bound(seconds, ephemeral))
        return function

    return decorate


def find_bound(callback: Any) -> Bound:
    """Return the bound of a callback: what `bounded` says, or the defaults."""
    callback = getattr(callback, "callback", callback)  # a button's is an object that holds the function
    callback = getattr(callback, "__func__", callback)
    bound = getattr(callback, _ATTRIBUTE, Bound())
    if bound.ephemeral is not None:
        return bound
    code = getattr(callback, "__code__", None)
    names = () if code is None else (*code.co_names, *code.co_varnames, *code.co_consts)
    is_private = any(name == "ephemeral" or (isinstance(name, tuple) and "ephemeral" in name) for name in names)
    return Bound(bound.seconds, is_private)


class Invocations:
    """The runs that have not ended. Times are in seconds and may be changed at any time.

    `bound` is for commands that declare none; 0: as long as they want.
    """

    def __init__(
        self,
        *,
        bound: float,
        defer_after: float = DEFER_SECONDS,
        commit_timeout: float = COMMIT_SECONDS,
        stop_timeout: float = STOP_SECONDS,
    ) -> None:
        self.bound: float = bound
        self.defer_after: float = defer_after
        self.commit_timeout: float = commit_timeout
        self.stop_timeout: float = stop_timeout
        self._running: dict[Invocation, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def time_to_defer(self) -> float:
        """Return after how many seconds a run that begins now is deferred: earlier, the more there are."""
        return min(self.defer_after, max(LEAST_SECONDS, self.defer_after - STAGGER_SECONDS * len(self)))

    def __iter__(self) -> Iterator[Invocation]:
        return iter(list(self._running))

    def run(
        self, where: discord.Interaction[Any] | commands.Context[Any], work: Coroutine[Any, Any, Any], name: str
    ) -> asyncio.Task[Any]:
        """Run a command in a task of its own, and return that."""
        invocation = Invocation(self, where)
        context = contextvars.copy_context()
        context.run(deadline.current.set, invocation.deadline)
        task = asyncio.get_running_loop().create_task(work, name=name, context=context)
        self.watch(invocation, task)
        return task

    @contextlib.contextmanager
    def starting(self, interaction: discord.Interaction[Any]) -> Iterator[Invocation]:
        """Yield a run whose task is made in the block, where its deadline is set; `watch` takes the task then."""
        invocation = Invocation(self, interaction)
        token = deadline.current.set(invocation.deadline)
        try:
            yield invocation
        finally:
            deadline.current.reset(token)

    def watch(self, invocation: Invocation, task: asyncio.Task[Any] | None) -> None:
        """Supervise a run until it is answered. `task` None: nobody handles the interaction."""
        invocation.deadline.task = task
        watching = asyncio.get_running_loop().create_task(
            invocation.watch(task), name=f"answer of {invocation}", context=contextvars.Context()
        )
        self._running[invocation] = watching
        watching.add_done_callback(lambda _: self._running.pop(invocation, None))

    async def stop(self) -> None:
        """Give up what is running, after a short wait, and tell its users."""
        running = dict(self._running)
        if running:
            await asyncio.wait(running.values(), timeout=self.stop_timeout)
            left = [invocation for invocation, watching in running.items() if not watching.done()]
            for invocation in left:
                invocation.stop()
            if left:
                await asyncio.wait(running.values(), timeout=self.commit_timeout + self.stop_timeout)
        await cancel_and_wait(self._running.values(), self.stop_timeout)


class Invocation:
    """One run of a command, a component's callback, a form or an autocomplete."""

    def __init__(self, invocations: Invocations, where: discord.Interaction[Any] | commands.Context[Any]) -> None:
        self.deadline: Deadline = Deadline()
        #: What is run, for log lines; the default names the command.
        self.name: str = command_errors.describe(where)
        self.log: logging.Logger = _log
        self.bound: Bound = Bound()
        self._invocations = invocations
        self._where = where
        self._began = time.monotonic()
        self._first = FirstResponse.install(where) if isinstance(where, discord.Interaction) else None
        self._stopping = asyncio.Event()
        if isinstance(where, commands.Context) or where.type in (
            discord.InteractionType.application_command, discord.InteractionType.autocomplete
        ):  # fmt: skip
            self.describe(None, getattr(where.command, "callback", None))

    def __str__(self) -> str:
        return self.name

    def describe(self, name: str | None, callback: Any) -> None:
        """Take the bound and the logger of the callback that runs. `name` None: leave the name."""
        self.name = name or self.name
        self.bound = find_bound(callback)
        self.log = command_errors.logger_of(callback)

    def stop(self) -> None:
        """Give it up because the bot is stopping."""
        self._stopping.set()

    async def report(self, error: Exception) -> None:
        """Log and answer an error that no handler of the author has caught."""
        where = self._where
        if isinstance(where, discord.Interaction) and where.type is discord.InteractionType.autocomplete:
            command_errors.log_error(where, error, self.log, self.name)
            await self._defer()
        else:
            await command_errors.report_command_error(where, error, self.log, self.name)

    async def watch(self, task: asyncio.Task[Any] | None) -> None:
        """Wait for the end of the task; meanwhile defer, and give it up when its time is over."""
        try:
            if task is None:
                await self._answer_inactive()
                return
            await self._wait(task, self._invocations.time_to_defer())
            if not task.done() and not self._stopping.is_set():
                await self._defer()
                if self._is_autocomplete:  # nobody waits for its choices
                    await self._end(task, None)
            while not task.done():
                seconds = self._invocations.bound if self.bound.seconds is None else self.bound.seconds
                waiting = None if not seconds or not self.deadline.is_active else seconds
                await self._wait(task, None if waiting is None else self._time_left(waiting))
                if task.done():
                    break
                if self._stopping.is_set():
                    if not self.deadline.is_active:  # an operator's action, which ends and answers by itself
                        return
                    await self._end(task, Declined(STOPPING))
                elif waiting is not None and self.deadline.is_active and await self._is_overdue(waiting):
                    await self._end(task, CommandTimedOut(command_errors.timed_out(waiting)))
            await self._finish(task)
        except Exception:
            _log.exception("could not supervise %s", self.name)
        finally:
            self.deadline.is_active = self.deadline.is_over

    @property
    def _is_autocomplete(self) -> bool:
        where = self._where
        return isinstance(where, discord.Interaction) and where.type is discord.InteractionType.autocomplete

    async def _wait(self, task: asyncio.Task[Any], seconds: float | None) -> None:
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()

    def _time_left(self, bound: float) -> float:
        """Return the seconds until the run must be looked at: at its bound, then once in each."""
        return bound - (time.monotonic() - self._began) % bound

    async def _is_overdue(self, bound: float) -> bool:
        """Return whether the user has no answer, or something has kept the database busy for too long.

        A command that has answered may wait for its user as long as it wants.
        """
        return self.deadline.busy_seconds >= bound or not await self._is_answered()

    async def _is_answered(self) -> bool:
        first, where = self._first, self._where
        if first is None:
            return bool(getattr(where, "is_answered", False))
        if not first.is_done():
            return False
        if first.is_answered or first.type is not discord.InteractionResponseType.deferred_channel_message:
            return first.is_answered
        assert isinstance(where, discord.Interaction)
        try:  # the deferral may have been edited
            async with asyncio.timeout(ASK_SECONDS):
                return not (await where.original_response()).flags.loading
        except discord.NotFound:  # it was deleted
            return True
        except (discord.DiscordException, OSError, TimeoutError):
            return False

    async def _defer(self) -> None:
        if self._first is None:
            return
        try:
            async with asyncio.timeout(ASK_SECONDS):
                was_deferred = await self._first.defer_in_time(ephemeral=bool(self.bound.ephemeral))
        except (discord.DiscordException, OSError, TimeoutError) as exc:
            _log.warning("%s could not be deferred: %r", self.name, exc)
        else:
            if was_deferred and not self._is_autocomplete:
                _log.debug("deferred, because there was no response in time: %s", self.name)

    async def _end(self, task: asyncio.Task[Any], error: GuildbookError | None) -> None:
        """Give the run up and tell the user why. `error` None: nobody is told."""
        bound, position = self.deadline, describe_position(task)
        if bound.is_committing:  # its outcome is better than a doubt
            await asyncio.wait({task}, timeout=self._invocations.commit_timeout)
            if task.done():
                return
        is_in_doubt = bound.is_committing
        bound.is_over = True
        task.cancel()
        if error is None:
            if command_errors.is_logged(self._where):
                self.log.warning("no suggestions in time: %s, at %s", self.name, position)
        else:
            if is_in_doubt:
                error = CommitUnknown(f"{self.name} was given up while the database was committing")
            self.name = f"{self.name}, at {position},"
            await self.report(error)
        await asyncio.wait({task}, timeout=ROLLBACK_SECONDS + 1.0)
        if not task.done() and await cancel_and_wait((task,), ROLLBACK_SECONDS):
            _log.critical("ignored its cancellation and keeps running in the background: %s, at %s", self.name,
                          describe_position(task))  # fmt: skip

    async def _finish(self, task: asyncio.Task[Any]) -> None:
        """Report what escaped from the task, and answer if it ended without an answer."""
        if self.deadline.is_over:
            if not task.cancelled():
                task.exception()  # retrieved; the user was told already
            return
        if task.cancelled():
            await self.report(GuildbookError(f"{self.name} was cancelled before it had ended"))
            return
        error = task.exception()
        if isinstance(error, Exception):
            await self.report(error)
            return
        if self._first is None:
            return
        if not self._first.is_done():  # something that it started may still respond
            await asyncio.sleep(max(0.0, self._invocations.defer_after - (time.monotonic() - self._began)))
        where = self._where
        assert isinstance(where, discord.Interaction)
        if where.type in (discord.InteractionType.component, discord.InteractionType.autocomplete):
            await self._defer()
        elif not self._first.is_done() or (self._first.is_open and not await self._is_answered()):
            self.log.warning("ended without an answer: %s", self.name)
            await command_errors.answer(where, NO_ANSWER)

    async def _answer_inactive(self) -> None:
        """Tell the user of a component or form that nobody knows any more, unless a listener has responded."""
        await asyncio.sleep(self._invocations.defer_after)
        assert self._first is not None
        if not self._first.is_done():
            assert isinstance(self._where, discord.Interaction)
            await command_errors.answer(self._where, INACTIVE)


class Context(commands.Context[Any]):
    """The context of a text command. It knows whether the command has answered."""

    is_answered: bool = False

    async def send(self, *args: Any, **options: Any) -> Any:
        """Send a message to where the command was used."""
        message = await super().send(*args, **options)
        self.is_answered = True
        return message

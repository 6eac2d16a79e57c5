"""`Prefixes`: which prefixes of text commands apply to a message: COMMAND_PREFIX, or what cogs say for its guild."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import discord
from discord.ext import commands

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: The method of a cog that returns the prefixes for a message.
HOOK = "command_prefix"
#: Attribute that marks a `command_prefix` which no cog has overridden.
DEFAULT_MARK = "__guildbook_default__"
#: Seconds for all hooks of one message. Discord shows the message at once, so a slow answer looks like none.
HOOK_TIMEOUT = 1.0
#: Seconds after a failure of a hook in which it is not called: an outage would otherwise delay every message.
HOOK_PAUSE = 5.0
#: Messages whose hooks may run at the same time; beyond it the default applies.
MAX_WAITING = 200


class Prefixes:
    """Finds the prefixes for a message. A mention of the bot is always one.

    A cog may have `async def command_prefix(self, message)`, which returns a prefix, several, or None for the default.
    One that fails or is slow is left out for a while, and the default applies. Times are in seconds and may be changed
    at any time.
    """

    def __init__(
        self,
        default: Iterable[str] = (),
        *,
        timeout: float = HOOK_TIMEOUT,
        pause: float = HOOK_PAUSE,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self.default: tuple[str, ...] = tuple(_longest_first(default))
        self.timeout: float = timeout
        self.pause: float = pause
        self.max_waiting: int = max_waiting
        #: The cogs that decide on prefixes, in the order of loading. To look at every cog for every message would cost
        #: as much as the rest of a message.
        self.hooks: list[commands.Cog] = []
        self._waiting = 0
        #: When a cog's hook may be called again, on the monotonic clock.
        self._paused: dict[str, float] = {}
        #: Cogs whose hook failed when it was called last.
        self._failing: set[str] = set()

    async def find(self, bot: Guildbook, message: discord.Message) -> list[str]:
        """Return the prefixes for a message, longer ones first. Never raises an `Exception`."""
        mentions = commands.when_mentioned(bot, message)
        if not self.hooks or self._waiting >= self.max_waiting:
            return [*mentions, *self.default]
        self._waiting += 1
        try:
            found = await self._ask(message)
        finally:
            self._waiting -= 1
        return [*mentions, *(self.default if found is None else _longest_first(found))]

    def find_hooks(self, cogs: Iterable[commands.Cog]) -> None:
        """Look which of the bot's cogs decide on prefixes. Call it when their number has changed."""
        self.hooks = [cog for cog in cogs if has_hook(cog)]

    async def _ask(self, message: discord.Message) -> list[str] | None:
        """Return what the hooks return; None if none of them says anything."""
        found: list[str] | None = None
        for cog in self.hooks:
            name = cog.qualified_name
            if time.monotonic() < self._paused.get(name, 0.0):
                continue
            try:
                async with asyncio.timeout(self.timeout):
                    answer = getattr(cog, HOOK)(message)
                    if inspect.isawaitable(answer):
                        answer = await answer
                prefixes = _validate(answer)
            except Exception as exc:
                self._paused[name] = time.monotonic() + self.pause
                self._report_failure(name, exc)
                continue
            if name in self._failing:
                self._failing.discard(name)
                _log.info("command_prefix of %s works again", name)
            if prefixes is not None:
                found = [*(found or ()), *prefixes]
        return found

    def _report_failure(self, name: str, error: Exception) -> None:
        """Log that a hook fails, once until it works again."""
        if name not in self._failing:
            self._failing.add(name)
            reason = f"no answer within {self.timeout:g} s" if isinstance(error, TimeoutError) else repr(error)
            _log.error("command_prefix of %s failed, COMMAND_PREFIX applies: %s", name, reason, exc_info=error)


def has_hook(cog: commands.Cog) -> bool:
    """Return whether a cog decides on prefixes."""
    hook = getattr(type(cog), HOOK, None)
    return callable(hook) and not hasattr(hook, DEFAULT_MARK)


def _validate(answer: Any) -> list[str] | None:
    """Return what a hook returned as a list without empty prefixes. Raises `TypeError` if it is something else."""
    if answer is None or isinstance(answer, str):
        return None if answer is None else [answer] if answer else []
    prefixes = list(answer)
    if not all(isinstance(prefix, str) for prefix in prefixes):
        raise TypeError(f"a prefix must be text, not {prefixes!r:.100}")
    return [prefix for prefix in prefixes if prefix]


def _longest_first(prefixes: Iterable[str]) -> list[str]:
    """Sort so that `!!` is found before `!`."""
    return sorted(dict.fromkeys(prefixes), key=len, reverse=True)

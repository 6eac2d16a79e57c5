"""What a cog puts on a bot: found out when it is loaded, and taken away with it, or when the load fails."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import discord
from discord import app_commands
from discord.ext import commands, tasks
from sqlalchemy import Table

from models import Base

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: How long each of a cog's `start`, `stop` and the end of its tasks may take, in seconds.
LIFECYCLE_SECONDS = 30.0

#: Every BaseCog that may still hold resources, added to the bot or not.
live_cogs: weakref.WeakSet[commands.Cog] = weakref.WeakSet()
#: Classes whose tables were taken out: SQLAlchemy still lists them while somebody holds one.
_forgotten: weakref.WeakSet[type[Any]] = weakref.WeakSet()

AppCommand = app_commands.Command[Any, ..., Any] | app_commands.Group | app_commands.ContextMenu


@dataclass(frozen=True, slots=True)
class Registrations:
    """What is on a bot at one moment."""

    cogs: frozenset[str]
    listeners: dict[str, list[Callable[..., Any]]]
    commands: list[commands.Command[Any, ..., Any]]
    slash_commands: list[tuple[int | None, AppCommand]]
    checks: list[tuple[bool, Callable[..., Any]]]
    views: list[Any]
    tasks: frozenset[asyncio.Task[Any]]

    @classmethod
    def of(cls, bot: Guildbook) -> Registrations:
        """Note what is there now."""
        return cls(
            cogs=frozenset(bot.cogs),
            listeners={event: list(found) for event, found in bot.extra_events.items()},
            commands=list(bot.commands),
            slash_commands=list(_slash_commands(bot)),
            checks=list(_checks(bot)),
            views=list(bot.persistent_views),
            tasks=frozenset(asyncio.all_tasks()),
        )

    def since(self, before: Registrations, module: str) -> Registrations:
        """Return what came since `before`; of the tasks only those that run the module's code."""
        fresh = self.tasks - before.tasks - {asyncio.current_task()}
        return Registrations(
            cogs=self.cogs - before.cogs,
            listeners={event: _but(found, before.listeners.get(event, [])) for event, found in self.listeners.items()},
            commands=_but(self.commands, before.commands),
            slash_commands=_but(self.slash_commands, before.slash_commands),
            checks=_but(self.checks, before.checks),
            views=_but(self.views, before.views),
            tasks=frozenset(task for task in fresh if runs_code_of(task, module)),
        )

    async def remove(self, bot: Guildbook) -> None:
        """Take away as much of this as is still there."""
        for task in self.tasks:
            task.cancel()
        for event, listeners in self.listeners.items():
            for listener in listeners:
                bot.remove_listener(listener, event)
        for command in self.commands:
            if bot.get_command(command.name) is command:
                bot.remove_command(command.name)
        for guild_id, slash in self.slash_commands:
            kind = slash.type if isinstance(slash, app_commands.ContextMenu) else discord.AppCommandType.chat_input
            if bot.tree.get_command(slash.name, guild=_scope(guild_id), type=kind) is slash:
                bot.tree.remove_command(slash.name, guild=_scope(guild_id), type=kind)
        for is_once, check in self.checks:
            bot.remove_check(check, call_once=is_once)
        for view in self.views:
            view.stop()
        await asyncio.gather(*(bot.remove_cog(name) for name in self.cogs))


def runs_code_of(task: asyncio.Task[Any], module: str) -> bool:
    """Tell whether a task's coroutine, or the loop of discord.ext.tasks that it is, was written in a module."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    if frame is None:
        return False
    loop = frame.f_locals.get("self")
    if isinstance(loop, tasks.Loop):
        return is_within(loop.coro.__module__, module)
    return is_within(frame.f_globals.get("__name__"), module)


def forget_tables(module: str) -> None:
    """Take a module's tables out of the metadata, so that it can declare them once more."""
    for mapper in list(Base.registry.mappers):
        if is_within(mapper.class_.__module__, module) and mapper.class_ not in _forgotten:
            table = mapper.local_table
            if isinstance(table, Table) and (mapper.inherits is None or table is not mapper.inherits.local_table):
                Base.metadata.remove(table)
            Base.registry._dispose_cls(mapper.class_)
            _forgotten.add(mapper.class_)


def _but(now: list[Any], before: list[Any]) -> list[Any]:
    left, fresh = list(before), []
    for it in now:
        if it in left:
            left.remove(it)
        else:
            fresh.append(it)
    return fresh


def _slash_commands(bot: Guildbook) -> Iterator[tuple[int | None, AppCommand]]:
    menus = {guild_id for _, guild_id, _ in bot.tree._context_menus}
    for guild_id in {None, *bot.tree._guild_commands, *menus}:
        for command in bot.tree.get_commands(guild=_scope(guild_id)):
            yield guild_id, command


def _scope(guild_id: int | None) -> discord.Object | None:
    return None if guild_id is None else discord.Object(guild_id)


def _checks(bot: Guildbook) -> Iterator[tuple[bool, Callable[..., Any]]]:
    yield from ((False, check) for check in bot._checks)
    yield from ((True, check) for check in bot._check_once)


async def end_cogs(module: str) -> None:
    """Unload the cogs of a module that the bot never added or has already removed."""
    found = [cog for cog in list(live_cogs) if is_within(type(cog).__module__, module)]
    for outcome in await asyncio.gather(*(cog.cog_unload() for cog in found), return_exceptions=True):
        if isinstance(outcome, BaseException):  # of a class that overrides cog_unload
            _log.error("cog_unload of a cog in %s failed", module, exc_info=outcome)


def is_within(name: str | None, module: str) -> bool:
    """Return whether `name` is `module` or one of its submodules."""
    return name is not None and (name == module or name.startswith(module + "."))

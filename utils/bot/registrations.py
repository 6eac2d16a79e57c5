"""What a cog registers on a bot: recorded when it is loaded, removed when it is unloaded or its load fails.

discord.py and SQLAlchemy have no public way to list checks, guild commands and context menus, or to remove a mapped
class: the private attributes read for that are all in this module.
"""

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
from discord.ext.commands import HelpCommand
from sqlalchemy import Table

from models import Base

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: Seconds for each of: a cog's `start`, its `stop`, and its tasks after they were cancelled.
LIFECYCLE_TIMEOUT = 30.0

#: Every BaseCog that was not unloaded yet, whether it was added to the bot or not.
live_cogs: weakref.WeakSet[commands.Cog] = weakref.WeakSet()
#: Models that were removed. SQLAlchemy still lists them as long as they are referenced.
_removed_models: weakref.WeakSet[type[Any]] = weakref.WeakSet()

AppCommand = app_commands.Command[Any, ..., Any] | app_commands.Group | app_commands.ContextMenu


@dataclass(frozen=True, slots=True)
class Registrations:
    """What is registered on a bot at one moment."""

    cogs: frozenset[str]
    listeners: dict[str, list[Callable[..., Any]]]
    commands: list[commands.Command[Any, ..., Any]]
    #: With the guild; None for global commands.
    app_commands: list[tuple[int | None, AppCommand]]
    #: With whether it is a `call_once` check.
    checks: list[tuple[bool, Callable[..., Any]]]
    views: list[Any]
    tasks: frozenset[asyncio.Task[Any]]
    #: None if there is none, or none was added.
    help_command: HelpCommand | None = None

    @classmethod
    def capture(cls, bot: Guildbook) -> Registrations:
        """Return what is registered now."""
        return cls(
            cogs=frozenset(bot.cogs),
            listeners={event: list(listeners) for event, listeners in bot.extra_events.items()},
            commands=list(bot.commands),
            app_commands=list(_app_commands(bot)),
            checks=list(_checks(bot)),
            views=list(bot.persistent_views),
            tasks=frozenset(asyncio.all_tasks()),
            help_command=bot.help_command,
        )

    def added_since(self, before: Registrations, module: str) -> Registrations:
        """Return what was added since `before`. Of the tasks, only those that run code of `module`."""
        new_tasks = self.tasks - before.tasks - {asyncio.current_task()}
        return Registrations(
            cogs=self.cogs - before.cogs,
            listeners={
                event: _new_items(listeners, before.listeners.get(event, []))
                for event, listeners in self.listeners.items()
            },
            commands=_new_items(self.commands, before.commands),
            app_commands=_new_items(self.app_commands, before.app_commands),
            checks=_new_items(self.checks, before.checks),
            views=_new_items(self.views, before.views),
            tasks=frozenset(task for task in new_tasks if runs_code_from(task, module)),
            help_command=None if self.help_command is before.help_command else self.help_command,
        )

    async def remove(self, bot: Guildbook) -> None:
        """Remove what is still registered."""
        for task in self.tasks:
            task.cancel()
        for event, listeners in self.listeners.items():
            for listener in listeners:
                bot.remove_listener(listener, event)
        if self.help_command is not None and bot.help_command is self.help_command:
            bot.reset_help_command()
        for command in self.commands:
            if bot.get_command(command.name) is command:
                bot.remove_command(command.name)
        for guild_id, app_command in self.app_commands:
            name, guild = app_command.name, guild_object(guild_id)
            kind = (
                app_command.type
                if isinstance(app_command, app_commands.ContextMenu)
                else discord.AppCommandType.chat_input
            )
            if bot.tree.get_command(name, guild=guild, type=kind) is app_command:
                bot.tree.remove_command(name, guild=guild, type=kind)
        for is_once, check in self.checks:
            bot.remove_check(check, call_once=is_once)
        for view in self.views:
            view.stop()
        await asyncio.gather(*(bot.remove_cog(name) for name in self.cogs))


def runs_code_from(task: asyncio.Task[Any], module: str) -> bool:
    """Return whether a task's coroutine, or the `discord.ext.tasks` loop that it runs, is defined in `module`."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    if frame is None:
        return False
    loop = frame.f_locals.get("self")
    if isinstance(loop, tasks.Loop):
        return is_within(loop.coro.__module__, module)
    return is_within(frame.f_globals.get("__name__"), module)


def remove_tables(module: str) -> None:
    """Remove a module's tables from the metadata, so that it can declare them again."""
    for mapper in list(Base.registry.mappers):
        if is_within(mapper.class_.__module__, module) and mapper.class_ not in _removed_models:
            table = mapper.local_table
            if isinstance(table, Table) and (mapper.inherits is None or table is not mapper.inherits.local_table):
                Base.metadata.remove(table)
            Base.registry._dispose_cls(mapper.class_)
            _removed_models.add(mapper.class_)


async def unload_orphaned_cogs(module: str) -> None:
    """Unload the cogs of a module that were never added to the bot, or were removed from it already."""
    cogs = [cog for cog in list(live_cogs) if is_within(type(cog).__module__, module)]
    for result in await asyncio.gather(*(cog.cog_unload() for cog in cogs), return_exceptions=True):
        if isinstance(result, BaseException):  # only from a class that overrides cog_unload
            _log.error("cog_unload failed: %s", module, exc_info=result)


def command_scopes(bot: Guildbook) -> set[int | None]:
    """Return the guilds that have commands of their own, and None for the global commands."""
    menu_guilds = {guild_id for _, guild_id, _ in bot.tree._context_menus}
    return {None, *bot.tree._guild_commands, *menu_guilds}


def guild_object(guild_id: int | None) -> discord.Object | None:
    """Return a guild as the methods of a command tree take it; None for the global commands."""
    return None if guild_id is None else discord.Object(guild_id)


def is_within(name: str | None, module: str) -> bool:
    """Return whether `name` is `module` or one of its submodules."""
    return name is not None and (name == module or name.startswith(module + "."))


def _app_commands(bot: Guildbook) -> Iterator[tuple[int | None, AppCommand]]:
    for guild_id in command_scopes(bot):
        for command in bot.tree.get_commands(guild=guild_object(guild_id)):
            yield guild_id, command


def _checks(bot: Guildbook) -> Iterator[tuple[bool, Callable[..., Any]]]:
    yield from ((False, check) for check in bot._checks)
    yield from ((True, check) for check in bot._check_once)


def _new_items(now: list[Any], before: list[Any]) -> list[Any]:
    """Return the items of `now` that are not in `before`, counting duplicates."""
    remaining, new = list(before), []
    for item in now:
        if item in remaining:
            remaining.remove(item)
        else:
            new.append(item)
    return new

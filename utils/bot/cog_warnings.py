"""What of a loaded cog cannot work with the present intents and settings, in lines that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import discord
from discord.ext import commands

from utils.bot.intents import declared_intents
from utils.bot.listeners import AwaitedEvent, find_content_problem, find_problem, how_to_declare
from utils.bot.registrations import Registrations

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

#: Commands that a line names.
SHOWN_COMMANDS = 5


def find_warnings(bot: Guildbook, registered: Registrations, awaited: Iterable[AwaitedEvent]) -> list[str]:
    """Return what of a module cannot work: intents that need a restart, listeners, `wait_for`, text commands."""
    cogs = [cog for name in sorted(registered.cogs) if (cog := bot.get_cog(name)) is not None]
    declared = discord.Intents.none()
    lines = []
    for cog in cogs:
        declared |= declared_intents(cog)
        if lacking := bot.gateway_intents.lacking(cog):
            lines.append(
                f"{cog.qualified_name} needs the intents {', '.join(lacking)}, which the bot did not connect with:"
                " restart it"
            )
    # What a cog declares is not asked for again: the line above says what is to be done.
    present = replace(bot.present(), intents=bot.intents | declared)
    for event, listeners in sorted(registered.listeners.items()):
        name = event.removeprefix("on_")
        for listener in listeners:
            problem = find_problem(name, present) or find_content_problem(name, listener, present)
            if problem is not None:
                lines.append(f"{event} ({getattr(listener, '__qualname__', listener)!s}) {problem}")
    for event, where in awaited:
        if (problem := find_problem(event, present)) is not None:
            lines.append(f"on_{event} (wait_for in {where}) {problem}")
    lines += _prefix_warnings(bot, registered, has_content=present.intents.message_content)
    return lines


def _prefix_warnings(bot: Guildbook, registered: Registrations, *, has_content: bool) -> Iterator[str]:
    found = [command for command in registered.commands if type(command).__module__ != commands.help.__name__]
    text_only = [command for command in found if not isinstance(command, commands.HybridCommand | commands.HybridGroup)]
    has_prefix = bool(bot.prefixes.default or bot.prefixes.hooks)
    if has_prefix and found and not has_content:
        yield (
            f"{_describe(found)} in guilds only after a mention of the bot, because Discord leaves other messages"
            f" empty; {how_to_declare('message_content')}"
        )
    elif text_only and not has_prefix:
        yield f"{_describe(text_only)} only after a mention of the bot; set COMMAND_PREFIX, for example to !"


def _describe(found: list[commands.Command[Any, ..., Any]]) -> str:
    names = sorted(command.name for command in found)
    more = f" and {len(names) - SHOWN_COMMANDS} more" if len(names) > SHOWN_COMMANDS else ""
    listed = ", ".join(names[:SHOWN_COMMANDS]) + more
    return f"the text command {listed} works" if len(names) == 1 else f"the text commands {listed} work"

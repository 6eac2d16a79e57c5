"""What of a cog cannot work with the present intents and settings, in lines that say what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import discord
from discord.ext import commands

from utils.bot.intents import declared_intents
from utils.bot.listeners import Present, find_content_problem, find_problem, how_to_declare, names_read

if TYPE_CHECKING:
    from utils.bot.client import Guildbook
    from utils.bot.registrations import Registrations

#: Commands that a line names.
SHOWN_COMMANDS = 5


class ListenerUse(NamedTuple):
    """A listener of a cog."""

    #: The event's name without `on_`.
    event: str
    #: The function: `Levels.on_message`.
    name: str
    #: The attributes that it reads.
    reads: frozenset[str]


class AwaitedEvent(NamedTuple):
    """A call of `bot.wait_for`."""

    #: The event's name without `on_`.
    event: str
    #: Module and line.
    where: str


class SourceCalls(NamedTuple):
    """What the source of a cog's modules calls."""

    awaited: list[AwaitedEvent] = []  # noqa: RUF012 - never changed
    #: Events that it dispatches, without `on_`.
    dispatched: frozenset[str] = frozenset()


@dataclass(slots=True)
class CogUse:
    """What a cog uses of Discord."""

    #: Its short name.
    name: str
    #: Those that it declares.
    intents: discord.Intents = field(default_factory=discord.Intents.none)
    listeners: list[ListenerUse] = field(default_factory=list)
    awaited: list[AwaitedEvent] = field(default_factory=list)
    #: Names of text commands, and of those that are slash commands too.
    text: list[str] = field(default_factory=list)
    hybrid: list[str] = field(default_factory=list)
    #: Events that it dispatches itself, without `on_`.
    dispatched: set[str] = field(default_factory=set)
    #: Whether it chooses prefixes.
    has_hook: bool = False


def find_warnings(
    bot: Guildbook, name: str, registered: Registrations, awaited: Iterable[AwaitedEvent], own: frozenset[str]
) -> list[str]:
    """Return what of a loaded module cannot work: intents that need a restart, and what `find_problems` finds.

    `own` are the events that cogs dispatch themselves.
    """
    use, lines = CogUse(name, awaited=list(awaited)), []
    for cog_name in sorted(registered.cogs):
        if (cog := bot.get_cog(cog_name)) is not None:
            use.intents |= declared_intents(cog)
            if lacking := bot.gateway_intents.lacking(cog):
                lines.append(
                    f"{cog_name} needs the intents {', '.join(lacking)}, which the bot did not connect with: restart it"
                )
    for event, listeners in sorted(registered.listeners.items()):
        for listener in listeners:
            label = str(getattr(listener, "__qualname__", listener))
            use.listeners.append(ListenerUse(event.removeprefix("on_"), label, names_read(listener)))
    for command in registered.commands:
        if type(command).__module__ != commands.help.__name__:
            is_hybrid = isinstance(command, commands.HybridCommand | commands.HybridGroup)
            (use.hybrid if is_hybrid else use.text).append(command.name)
    present = replace(bot.present(), own=own)
    return lines + find_problems(use, present, has_prefix=bool(bot.prefixes.default or bot.prefixes.hooks))


def find_problems(use: CogUse, present: Present, *, has_prefix: bool) -> list[str]:
    """Return what of a cog cannot work: listeners, `wait_for` and text commands, one line each."""
    # What a cog declares is not asked for again: another line says that it is refused or needs a restart.
    present = replace(present, intents=present.intents | use.intents)
    lines = []
    for event, name, reads in use.listeners:
        problem = find_problem(event, present) or find_content_problem(event, reads, present)
        if problem is not None:
            lines.append(f"on_{event} ({name}) {problem}")
        if event == "message" and "process_commands" in reads:
            twice = "calls process_commands, as the bot does: each command runs twice; remove it"
            lines.append(f"on_message ({name}) {twice}")
    for event, where in use.awaited:
        if (problem := find_problem(event, present)) is not None:
            lines.append(f"on_{event} (wait_for in {where}) {problem}")
    return [*lines, *_prefix_problems(use, has_prefix=has_prefix, has_content=present.intents.message_content)]


def _prefix_problems(use: CogUse, *, has_prefix: bool, has_content: bool) -> Iterator[str]:
    if has_prefix and not has_content and (use.text or use.hybrid):
        yield (
            f"{_describe(use.text + use.hybrid)} in guilds only after a mention of the bot, because Discord leaves"
            f" other messages empty; {how_to_declare('message_content')}"
        )
    elif use.text and not has_prefix:
        yield f"{_describe(use.text)} only after a mention of the bot; set COMMAND_PREFIX, for example to !"


def _describe(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_COMMANDS} more" if len(names) > SHOWN_COMMANDS else ""
    listed = ", ".join(sorted(names)[:SHOWN_COMMANDS]) + more
    return f"the text command {listed} works" if len(names) == 1 else f"the text commands {listed} work"

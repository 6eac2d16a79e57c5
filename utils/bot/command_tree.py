"""The command tree: checks the values of options, watches every command, and answers what its cog does not.

`_from_interaction` and the two methods that it calls are private parts of discord.py 2.7.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import discord
from discord import AppCommandOptionType, app_commands
from discord.ext import commands

from utils.bot.command_errors import InvalidOption, logger_of, report_command_error

#: What Discord sends for each type of option, and what it is called. Other types are ids, which Discord resolves.
_TYPES: dict[AppCommandOptionType, tuple[tuple[type, ...], str]] = {
    AppCommandOptionType.string: ((str,), "text"),
    AppCommandOptionType.integer: ((int,), "a whole number"),
    AppCommandOptionType.number: ((int, float), "a number"),
    AppCommandOptionType.boolean: ((bool,), "true or false"),
}


class CommandTree(app_commands.CommandTree[Any]):
    """Refuses values that an option does not allow: clients with an older version of a command send them.

    discord.py passes on such a value of a `Literal` or a `Range`.
    """

    async def interaction_check(self, interaction: discord.Interaction[Any], /) -> bool:
        """Return True. Raises `InvalidOption` for a value that its option does not allow."""
        command = interaction.command
        if interaction.type is discord.InteractionType.application_command and isinstance(
            command, app_commands.Command
        ):
            check_options(command, {name: value for name, value in interaction.namespace})  # noqa: C416 - a Namespace is no mapping
        return True

    def _from_interaction(self, interaction: discord.Interaction[Any]) -> None:
        """Run a command or an autocomplete in a task that is watched: nobody is left without an answer."""
        self.client.invocations.run(interaction, self._run(interaction), "CommandTree-invoker")

    async def _run(self, interaction: discord.Interaction[Any]) -> None:
        try:
            if interaction.type is discord.InteractionType.autocomplete:
                await self._complete(interaction)
            else:
                await self._call(interaction)
        except app_commands.AppCommandError as error:
            if interaction.type is discord.InteractionType.autocomplete:
                raise
            await self._dispatch_error(interaction, error)

    async def _complete(self, interaction: discord.Interaction[Any]) -> None:
        """Do what `_call` does for an autocomplete, which logs an error and lets the user wait."""
        if not await self.interaction_check(interaction):
            return
        data: Any = interaction.data
        command, options = self._get_app_command_options(data)
        interaction._cs_command = command  # type: ignore[attr-defined]
        namespace = app_commands.Namespace(interaction, data.get("resolved", {}), options)
        interaction._cs_namespace = namespace  # type: ignore[attr-defined]
        focused = next((option["name"] for option in options if option.get("focused")), None)
        if focused is not None:
            await command._invoke_autocomplete(interaction, focused, namespace)

    async def on_error(self, interaction: discord.Interaction[Any], error: app_commands.AppCommandError, /) -> None:
        """Log and answer an error, unless the command, its group or its cog does."""
        if not _has_handler(interaction.command):
            await report_command_error(interaction, error, logger_of(interaction.command))


def check_options(command: app_commands.Command[Any, ..., Any], given: dict[str, Any]) -> None:
    """Raise `InvalidOption` for the first value that its option does not allow."""
    for parameter in command.parameters:
        value = given.get(parameter.display_name)
        if value is not None and (expected := _find_violation(parameter, value)) is not None:
            raise InvalidOption(parameter.display_name, value, expected)


def _find_violation(parameter: app_commands.Parameter, value: Any) -> str | None:
    """Return what the option allows, if the value is something else."""
    if parameter.type not in _TYPES:
        return None
    types, expected = _TYPES[parameter.type]
    is_of_type = isinstance(value, types) and (type(value) is not bool or bool in types)
    if not is_of_type:
        return expected
    if parameter.choices and not any(choice.value == value for choice in parameter.choices):
        names = [str(choice.name) for choice in parameter.choices]
        return f"one of {', '.join(names)}"
    size = len(value) if isinstance(value, str) else value
    low, high = parameter.min_value, parameter.max_value
    if (low is not None and size < low) or (high is not None and size > high):
        return _describe_range(low, high, "characters" if isinstance(value, str) else "")
    return None


def _describe_range(low: float | None, high: float | None, unit: str) -> str:
    if low is not None and high is not None:
        limits = f"{low:,} to {high:,}"
    else:
        limits = f"at least {low:,}" if low is not None else f"at most {high:,}"
    return f"{limits} {unit}".rstrip()


def _has_handler(command: Any) -> bool:
    """Return whether a command, one of its groups or its cog handles errors."""
    if command is None:
        return False
    if isinstance(command, app_commands.ContextMenu):
        return command.on_error is not None
    return any(_handles_errors(owner) for owner in (command, *_groups(command), command.binding))


def _groups(command: app_commands.Command[Any, ..., Any] | app_commands.Group) -> Iterator[app_commands.Group]:
    parent = command.parent
    while parent is not None:
        yield parent
        parent = parent.parent


def _handles_errors(owner: Any) -> bool:
    match owner:
        case app_commands.Command():
            return owner.on_error is not None
        case app_commands.Group():
            return getattr(owner.on_error, "__func__", owner.on_error) is not app_commands.Group.on_error
        case commands.Cog():
            return owner.has_app_command_error_handler()
    return False

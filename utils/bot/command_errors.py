"""What people are told when a command fails: one line, with a reference that stands in the log too."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import discord
from discord import app_commands
from discord.ext import commands

from utils.exceptions import DatabaseUnavailable, Declined, GuildbookError
from utils.operations.slash import MESSAGE_LENGTH

_log = logging.getLogger(__name__)

#: Seconds for an answer to reach Discord.
ANSWER_SECONDS = 30.0
#: Seconds to find out whether an operator asked: a first answer has three.
OPERATOR_SECONDS = 1.0

_WRAPPERS = (app_commands.CommandInvokeError, commands.CommandInvokeError, commands.HybridCommandError)

AWAY = "The database cannot be reached just now: try again in a minute."
INTERNAL = "Something went wrong in here; it was written down."


@dataclass(frozen=True, slots=True)
class Finding:
    """What an error means: the line for people, and whether somebody has to mend something."""

    text: str
    is_fault: bool = False
    #: What only operators are shown; None when there is no more to say.
    detail: str | None = None


def reference() -> str:
    """Return a new short id that leads from an answer to its line in the log."""
    return secrets.token_hex(4)


async def report_command_error(
    where: discord.Interaction[Any] | commands.Context[Any], error: Exception, log: logging.Logger
) -> None:
    """Say in one line, seen by the person alone where Discord can, what went wrong, and log it; raises nothing."""
    try:
        id, finding = reference(), explain(error)
        asked = where if isinstance(where, discord.Interaction) else where.interaction
        user = where.user if isinstance(where, discord.Interaction) else where.author
        guild_id = where.guild.id if where.guild is not None else None
        name = where.command.qualified_name if where.command is not None else "?"
        log.log(
            logging.ERROR if finding.is_fault else logging.INFO,
            "/%s of user %s failed (%s): %r", name, user.id, id, bare(error),
            exc_info=bare(error) if finding.is_fault else None,
            extra={"reference": id, "guild_id": guild_id},
        )  # fmt: skip
        text = finding.text
        if finding.detail and asked is not None and await _is_operator(asked):
            text = f"{text} {finding.detail}"
        text = f"{' '.join(text.split())[: MESSAGE_LENGTH - 30]} (reference {id})"
        async with asyncio.timeout(ANSWER_SECONDS):
            if asked is not None:
                await _say(asked, text)
            elif isinstance(where, commands.Context):
                await where.reply(text, mention_author=False)
    except (discord.DiscordException, OSError, TimeoutError) as exc:
        log.warning("nobody could be told of it (%s): %r", id, exc)
    except Exception:
        _log.exception("an error could not be explained: %r", error)


def bare(error: BaseException) -> BaseException:
    """Return what a command raised, without what discord.py wraps around it."""
    while isinstance(
        error, app_commands.CommandInvokeError | commands.CommandInvokeError | commands.HybridCommandError
    ):
        error = error.original
    if isinstance(error, app_commands.TransformerError | commands.ConversionError):
        cause = error.__cause__
        return cause if isinstance(cause, GuildbookError) else error
    return error


def explain(error: BaseException) -> Finding:
    """Return what an error means for whoever used the command."""
    error = bare(error)
    if isinstance(error, Declined):
        return Finding(str(error))
    if isinstance(error, DatabaseUnavailable):
        return Finding(AWAY, is_fault=True, detail=str(error))
    if isinstance(error, GuildbookError):
        return Finding(INTERNAL, is_fault=True, detail=str(error))
    text = _of_discord_py(error)
    return Finding(INTERNAL, is_fault=True, detail=f"{type(error).__name__}") if text is None else Finding(text)


def _of_discord_py(error: BaseException) -> str | None:
    """Return plain words for what discord.py itself refuses; None for everything else."""
    match error:
        case app_commands.MissingPermissions() | commands.MissingPermissions():
            return f"You need {_permissions(error.missing_permissions)} for that."
        case app_commands.BotMissingPermissions() | commands.BotMissingPermissions():
            return f"I need {_permissions(error.missing_permissions)} for that: ask an administrator of this server."
        case app_commands.CommandOnCooldown() | commands.CommandOnCooldown():
            return f"Not so fast: try again in {max(1, round(error.retry_after))} s."
        case app_commands.MissingRole() | commands.MissingRole():
            return f"You need the role {_role(error.missing_role)} for that."
        case app_commands.MissingAnyRole() | commands.MissingAnyRole():
            return f"You need one of these roles for that: {', '.join(map(_role, error.missing_roles))}."
        case app_commands.NoPrivateMessage() | commands.NoPrivateMessage():
            return "That works in a server only."
        case app_commands.TransformerError():
            return f"{_short(error.value)} does not fit there: expected {_kind(error)}."
        case app_commands.CommandSignatureMismatch() | app_commands.CommandNotFound():
            return "This command has just changed: restart Discord (Ctrl+R), then try again."
        case commands.UserInputError():
            return f"That does not fit: {error}."
        case app_commands.CheckFailure() | commands.CheckFailure():
            return "You may not do that here."
        case commands.MaxConcurrencyReached():
            return "That is being done already: wait until it has finished."
        case commands.DisabledCommand():
            return "That is switched off."
    return None


def _permissions(names: list[str]) -> str:
    words = ", ".join(name.replace("_", " ").title() for name in names)
    return f"the permission {words}" if len(names) == 1 else f"the permissions {words}"


def _role(role: str | int) -> str:
    return f"<@&{role}>" if isinstance(role, int) else _short(role)


def _short(value: Any) -> str:
    return repr(str(value)[:50])


def _kind(error: app_commands.TransformerError) -> str:
    name = type(error.transformer).__name__.removesuffix("Transformer").removesuffix("Transform")
    return f"{error.type.name}" if not name or name.startswith("_") or name == "Identity" else name.lower()


async def _is_operator(interaction: discord.Interaction[Any]) -> bool:
    try:
        async with asyncio.timeout(OPERATOR_SECONDS):
            return bool(await interaction.client.operators.includes(interaction.user.id))
    except Exception:
        return False


async def _say(interaction: discord.Interaction[Any], text: str) -> None:
    response = interaction.response
    if not response.is_done():
        try:
            await response.send_message(text, ephemeral=True)
        except discord.InteractionResponded:
            pass
        else:
            return
    if response.type is discord.InteractionResponseType.deferred_channel_message:
        original = await interaction.original_response()
        # The first follow-up takes the place of "thinking…", which everybody may see: it has to go before.
        if original.flags.loading and not original.flags.ephemeral:
            await original.delete()
    await interaction.followup.send(text, ephemeral=True)

"""What users see when a command fails: one line, with a reference to the log."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import discord
from discord import app_commands
from discord.ext import commands

from utils.exceptions import DatabaseUnavailable, Declined, GuildbookError, TransactionConflict, translate
from utils.logs import RateLimit
from utils.operations.slash import MESSAGE_LENGTH

_log = logging.getLogger(__name__)

#: Seconds to deliver the answer to Discord.
ANSWER_TIMEOUT = 30.0
#: Seconds to find out whether the user is an operator. Discord expects the answer within 3 seconds.
OPERATOR_TIMEOUT = 1.0

DATABASE_UNAVAILABLE = "The database is not available right now. Try again in a minute."
TRANSACTION_CONFLICT = "Somebody else changed the same thing at the same moment, so nothing was done. Try again."
INTERNAL_ERROR = "Something went wrong. The error was logged."


@dataclass(frozen=True, slots=True)
class Explanation:
    """How an error is presented."""

    #: For the user.
    text: str
    #: True if somebody must fix something: it is logged as an error with its traceback.
    is_fault: bool = False
    #: Shown to operators only; None if there is nothing more to say.
    detail: str | None = None


class InvalidOption(app_commands.AppCommandError):
    """An option of a slash command has a value that it does not allow. The message is the answer."""

    def __init__(self, option: str, value: object, expected: str) -> None:
        super().__init__(f"{option}: {_quote(value)} is not valid here. Expected: {expected}.")


def new_reference() -> str:
    """Return a short random id that links an answer to its log line."""
    return secrets.token_hex(4)


async def report_command_error(
    where: discord.Interaction[Any] | commands.Context[Any], error: Exception, log: logging.Logger
) -> None:
    """Log a command's error and answer the user in one line, which only they see if Discord allows it. Never raises."""
    try:
        explanation, cause = explain(error), unwrap(error)
        interaction = where if isinstance(where, discord.Interaction) else where.interaction
        user = where.user if isinstance(where, discord.Interaction) else where.author
        limit: RateLimit = (where.client if isinstance(where, discord.Interaction) else where.bot).logged_user_errors
        reference = new_reference() if explanation.is_fault or limit.admits(user.id) else None
        if reference is not None:
            fields = {"reference": reference, "guild_id": where.guild.id if where.guild is not None else None}
            if unlogged := limit.take_refused():
                fields["errors_not_logged"] = unlogged
            log.log(
                logging.ERROR if explanation.is_fault else logging.INFO,
                "command failed: /%s by user %s (ref %s): %r",
                where.command.qualified_name if where.command is not None else "?", user.id, reference, cause,
                exc_info=cause if explanation.is_fault else None,
                extra=fields,
            )  # fmt: skip
        text = explanation.text
        if explanation.detail and interaction is not None and await _is_operator(interaction):
            text = f"{text} Details: {explanation.detail}"
        text = _as_line(text) if reference is None else _with_reference(text, reference)
        async with asyncio.timeout(ANSWER_TIMEOUT):
            if interaction is not None:
                await _answer(interaction, text)
            elif isinstance(where, commands.Context):
                await where.reply(text, mention_author=False)
    except (discord.DiscordException, OSError, TimeoutError) as exc:
        log.warning("could not report the error of a command (ref %s): %r", reference, exc)
    except Exception:
        _log.exception("could not explain the error of a command: %r", error)


def unwrap(error: BaseException) -> BaseException:
    """Return what a command raised, without discord.py's wrappers."""
    while isinstance(
        error, app_commands.CommandInvokeError | commands.CommandInvokeError | commands.HybridCommandError
    ):
        error = error.original
    if isinstance(error, app_commands.TransformerError | commands.ConversionError):
        cause = error.__cause__
        return cause if isinstance(cause, GuildbookError) else error
    return error


def explain(error: BaseException) -> Explanation:
    """Return how to present an error to the user who ran the command."""
    error = unwrap(error)
    error = translate(error) or error  # sessions and connections held by hand raise errors of the drivers
    if isinstance(error, Declined):
        return Explanation(str(error))
    if isinstance(error, TransactionConflict):
        return Explanation(TRANSACTION_CONFLICT, is_fault=True, detail=str(error))
    if isinstance(error, DatabaseUnavailable):
        return Explanation(DATABASE_UNAVAILABLE, is_fault=True, detail=str(error))
    if isinstance(error, GuildbookError):
        return Explanation(INTERNAL_ERROR, is_fault=True, detail=str(error))
    text = _explain_discord_error(error)
    if text is None:
        return Explanation(INTERNAL_ERROR, is_fault=True, detail=type(error).__name__)
    return Explanation(text)


def _explain_discord_error(error: BaseException) -> str | None:
    """Return the answer for an error of discord.py's own checks and converters; None for any other error."""
    match error:
        case app_commands.MissingPermissions() | commands.MissingPermissions():
            return f"You need {_permissions(error.missing_permissions)} to use this command."
        case app_commands.BotMissingPermissions() | commands.BotMissingPermissions():
            return f"I need {_permissions(error.missing_permissions)} to do that. Ask an administrator of this server."
        case app_commands.CommandOnCooldown() | commands.CommandOnCooldown():
            return f"This command is on cooldown. Try again in {max(1, round(error.retry_after))} s."
        case app_commands.MissingRole() | commands.MissingRole():
            return f"You need the role {_role(error.missing_role)} to use this command."
        case app_commands.MissingAnyRole() | commands.MissingAnyRole():
            return f"You need one of these roles to use this command: {', '.join(map(_role, error.missing_roles))}."
        case app_commands.NoPrivateMessage() | commands.NoPrivateMessage():
            return "This command works only in a server."
        case InvalidOption():
            return str(error)
        case app_commands.TransformerError():
            return f"{_quote(error.value)} is not valid here. Expected: {_type_name(error)}."
        case commands.ConversionError():
            return f"One of the values is not valid here. Expected: {_converter_name(error.converter)}."
        case app_commands.CommandSignatureMismatch() | app_commands.CommandNotFound():
            return "This command has changed. Restart Discord (Ctrl+R), then try again."
        case commands.UserInputError():
            return f"Invalid input: {error}"
        case app_commands.CheckFailure() | commands.CheckFailure():
            return "You are not allowed to use this command here."
        case commands.MaxConcurrencyReached():
            return "This command is already running. Wait until it has finished."
        case commands.DisabledCommand():
            return "This command is disabled."
    return None


def _permissions(names: list[str]) -> str:
    words = ", ".join(name.replace("_", " ").title() for name in names)
    return f"the permission {words}" if len(names) == 1 else f"the permissions {words}"


def _role(role: str | int) -> str:
    return f"<@&{role}>" if isinstance(role, int) else _quote(role)


def _quote(value: Any) -> str:
    return repr(str(value)[:50])


def _type_name(error: app_commands.TransformerError) -> str:
    choices = error.transformer.choices
    if choices:
        return f"one of {', '.join(str(choice.name) for choice in choices)}"
    name = type(error.transformer).__name__.removesuffix("Transformer").removesuffix("Transform")
    return f"{error.type.name}" if not name or name.startswith("_") or name == "Identity" else name.lower()


def _converter_name(converter: Any) -> str:
    name = getattr(converter, "__name__", None) or type(converter).__name__
    return name.removesuffix("Converter").lower()


def _with_reference(text: str, reference: str) -> str:
    """Return a text as one line that fits into a message, with the reference at its end."""
    line = _as_line(text)
    return f"{line[:-1]} (ref {reference})." if line.endswith(".") else f"{line} (ref {reference})"


def _as_line(text: str) -> str:
    return " ".join(text.split())[: MESSAGE_LENGTH - 30]


async def _is_operator(interaction: discord.Interaction[Any]) -> bool:
    try:
        async with asyncio.timeout(OPERATOR_TIMEOUT):
            return bool(await interaction.client.operators.includes(interaction.user.id))
    except Exception:
        return False


async def _answer(interaction: discord.Interaction[Any], text: str) -> None:
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
        # The first follow-up replaces a public "thinking…" and would be public too, so that is deleted first.
        if original.flags.loading and not original.flags.ephemeral:
            await original.delete()
    await interaction.followup.send(text, ephemeral=True)

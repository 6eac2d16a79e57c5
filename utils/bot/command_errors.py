"""What users see when a command, a component or a form fails: one line, with a reference to the log."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from typing import Any

import asyncpg
import discord
import pydantic
from discord import app_commands
from discord.ext import commands
from sqlalchemy.exc import SQLAlchemyError

from utils.bot.responses import TooLate
from utils.exceptions import (
    CommandTimedOut,
    CommitUnknown,
    DatabaseUnavailable,
    Declined,
    GuildbookError,
    TransactionConflict,
    translate,
)
from utils.logs import RateLimit
from utils.operations.slash import MESSAGE_LENGTH

_log = logging.getLogger(__name__)

#: Seconds to deliver the answer to Discord.
ANSWER_TIMEOUT = 30.0
#: Seconds to find out whether the user is an operator. Discord expects the answer within 3 seconds.
OPERATOR_TIMEOUT = 1.0

DATABASE_UNAVAILABLE = "The database is not available right now. Try again in a minute."
TRANSACTION_CONFLICT = "Somebody else changed the same thing at the same moment, so nothing was done. Try again."
COMMIT_UNKNOWN = (
    "The database did not confirm the change, so it may or may not have been saved. Check before you try again."
)
INTERNAL_ERROR = "Something went wrong. The error was logged."
TOO_LATE = "This took too long to open. Try again."
#: Wrong values that an answer names.
MAX_PROBLEMS = 3


@dataclass(frozen=True, slots=True)
class Explanation:
    """How an error is presented."""

    #: For the user.
    text: str
    #: True if somebody must fix something: it is logged as an error with its traceback.
    is_fault: bool = False
    #: Shown to operators only; None if there is nothing more to say.
    detail: str | None = None
    #: True if the text is sent as it is written, without a reference.
    is_verbatim: bool = False


class InvalidOption(app_commands.AppCommandError):
    """An option of a slash command has a value that it does not allow. The message is the answer."""

    def __init__(self, option: str, value: object, expected: str) -> None:
        super().__init__(f"{option}: {_quote(value)} is not valid here. Expected: {expected}.")


def new_reference() -> str:
    """Return a short random id that links an answer to its log line."""
    return secrets.token_hex(4)


def describe(where: discord.Interaction[Any] | commands.Context[Any]) -> str:
    """Return what a user did, for log lines: "/name", or the kind of component with its custom id."""
    command = where.command
    if command is not None:
        is_menu = isinstance(command, app_commands.ContextMenu)
        return f"menu {command.name!r}" if is_menu else f"/{command.qualified_name}"
    if isinstance(where, commands.Context):
        return "/?"
    if where.type is discord.InteractionType.modal_submit:
        return f"form {where.custom_id!r}"
    return f"component {where.custom_id!r}" if where.type is discord.InteractionType.component else "/?"


def logger_of(command: Any) -> logging.Logger:
    """Return the logger of the module that a command, a component's callback or a form is written in."""
    callback = getattr(command, "callback", command)
    return logging.getLogger(getattr(callback, "__module__", None) or __name__)


def is_logged(where: discord.Interaction[Any] | commands.Context[Any]) -> bool:
    """Return whether to log one more thing that any user can cause, and count it."""
    user, limit = _user_and_limit(where)
    return limit.admits(user.id)


def _user_and_limit(
    where: discord.Interaction[Any] | commands.Context[Any],
) -> tuple[discord.User | discord.Member, RateLimit]:
    if isinstance(where, discord.Interaction):
        return where.user, where.client.logged_user_errors
    return where.author, where.bot.logged_user_errors


def log_error(
    where: discord.Interaction[Any] | commands.Context[Any],
    error: Exception,
    log: logging.Logger,
    name: str | None = None,
) -> str | None:
    """Log an error and return its reference; None if it was not logged. `name`: see `report_command_error`."""
    explanation, cause = explain(error), unwrap(error)
    if not explanation.is_fault and not is_logged(where):
        return None
    user, limit = _user_and_limit(where)
    reference = new_reference()
    fields = {"reference": reference, "guild_id": where.guild.id if where.guild is not None else None}
    if unlogged := limit.take_refused():
        fields["errors_not_logged"] = unlogged
    log.log(
        logging.ERROR if explanation.is_fault else logging.INFO,
        "command failed: %s by user %s (ref %s): %s",
        name or describe(where), user.id, reference, _as_line(repr(cause)),
        exc_info=cause if explanation.is_fault and cause.__traceback__ is not None else None,
        extra=fields,
    )  # fmt: skip
    return reference


async def report_command_error(
    where: discord.Interaction[Any] | commands.Context[Any],
    error: Exception,
    log: logging.Logger,
    name: str | None = None,
) -> None:
    """Log an error and answer the user in one line, which only they see if Discord allows it. Never raises.

    name: what failed, such as "button 'Pay' of Shop". None: the command, or the component's custom id.
    """
    try:
        reference, explanation = log_error(where, error, log, name), explain(error)
        text = explanation.text
        interaction = where if isinstance(where, discord.Interaction) else where.interaction
        if explanation.detail and interaction is not None and await _is_operator(interaction):
            text = f"{text} Details: {explanation.detail}"
        if explanation.is_verbatim:
            text = text[:MESSAGE_LENGTH]
        else:
            text = _as_line(text) if reference is None else _with_reference(text, reference)
        await answer(where, text)
    except Exception:
        _log.exception("could not explain the error of a command: %r", error)


async def answer(where: discord.Interaction[Any] | commands.Context[Any], text: str) -> None:
    """Answer the user, who alone sees it if Discord allows it. A failure is logged."""
    interaction = where if isinstance(where, discord.Interaction) else where.interaction
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            if interaction is not None:
                await _answer(interaction, text)
            elif isinstance(where, commands.Context):
                await where.reply(text, mention_author=False)
    except (discord.DiscordException, OSError, TimeoutError, RuntimeError) as exc:  # a closed session at a stop
        _log.warning("could not answer %s: %r", describe(where), exc)


def timed_out(seconds: float) -> str:
    """Return the answer to a command that took longer than `seconds`."""
    return f"This took longer than {seconds:g} s and was given up. Nothing more of it will be saved."


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
    if isinstance(error, SQLAlchemyError | asyncpg.PostgresError | asyncpg.InterfaceError):  # of what is held by hand
        error = translate(error) or error
    if isinstance(error, Declined):
        return Explanation(str(error), is_verbatim=True)
    if isinstance(error, TransactionConflict):
        return Explanation(TRANSACTION_CONFLICT, is_fault=True, detail=str(error))
    if isinstance(error, CommitUnknown):
        return Explanation(COMMIT_UNKNOWN, is_fault=True, detail=str(error))
    if isinstance(error, CommandTimedOut):
        return Explanation(str(error), is_fault=True)
    if isinstance(error, TooLate):
        return Explanation(TOO_LATE, is_fault=True, detail=str(error))
    if isinstance(error, pydantic.ValidationError):
        return Explanation(_explain_validation(error))
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


def _explain_validation(error: pydantic.ValidationError) -> str:
    """Return pydantic's findings as a sentence."""
    found = []
    for problem in error.errors(include_url=False)[:MAX_PROBLEMS]:
        name = ".".join(map(str, problem["loc"]))
        is_own = problem["type"] in ("value_error", "assertion_error")  # raised by the model's own validator
        text = (str(problem["ctx"]["error"]) if is_own else problem["msg"]).rstrip(".")
        text = text.replace("Input should", "should", 1) if name else text
        found.append(f"{name} {text}" if text.startswith("should") else f"{name}: {text}" if name else text)
    if (unnamed := error.error_count() - len(found)) > 0:
        found.append(f"and {unnamed} more")
    return f"Invalid input: {'; '.join(found)}."


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

"""Checks of the settings, of variable names, of the token's format, and of what the host does at a stop."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import Finding
from utils.settings import DEVELOPER_PORTAL, DISCORD_API_BASE, application_of_token, variables

#: How similar to a setting a variable's name must be to count as misspelt; less in `.env`, which holds only ours.
SIMILARITY, SIMILARITY_IN_FILE = 0.86, 0.75
#: Variables that libpq (PostgreSQL manual, 34.15) or the host reads, although they look like ours.
_FOREIGN = re.compile(r"(RAILWAY_.*|PG(HOSTADDR|PASSFILE|SERVICE\w*|OPTIONS|DATA|APPNAME|SSL\w+|CLIENTENCODING|TZ))$")

#: How long Railway waits between SIGTERM and SIGKILL, in seconds; 0 if it is not set.
DRAINING = "RAILWAY_DEPLOYMENT_DRAINING_SECONDS"
#: Seconds by which it should exceed SHUTDOWN_SECONDS.
DRAINING_MARGIN = 5.0

_TOKEN_PAGE = f"{DEVELOPER_PORTAL} > your application > Bot > Reset Token"


async def check_settings(context: DoctorContext) -> Sequence[Finding]:
    """Report every invalid setting."""
    advice = "correct it in the environment or in .env"
    errors = [Finding("fail", "settings", line, advice) for line in context.settings_errors]
    return errors or [Finding("ok", "settings", f"{len(context.settings.model_fields_set)} set, all valid")]


async def check_variables(context: DoctorContext) -> Sequence[Finding]:
    """Report variables that look like a misspelt setting."""
    known = set(variables())
    misspelt: dict[str, str] = {}
    for names, similarity in ((list(context.environ), SIMILARITY), (names_in_file(context), SIMILARITY_IN_FILE)):
        for name in names:
            intended = _intended_name(name.upper(), known, similarity)
            if intended is not None:
                misspelt[name] = intended
    return [
        Finding("warn", "variables", f"{name} is not read", f"did you mean {intended}?")
        for name, intended in misspelt.items()
    ] or [Finding("ok", "variables", "none looks misspelt")]


def names_in_file(context: DoctorContext) -> list[str]:
    """Return the variables that `.env` sets."""
    from dotenv import dotenv_values

    if context.env_file is None:
        return []
    try:
        return list(dotenv_values(context.env_file, interpolate=False))
    except (OSError, UnicodeDecodeError):  # check_settings reports it
        return []


def _intended_name(name: str, known: set[str], similarity: float) -> str | None:
    if name in known or _FOREIGN.match(name):
        return None
    return next(iter(difflib.get_close_matches(name, known, 1, similarity)), None)


async def check_token(context: DoctorContext) -> Sequence[Finding]:
    """Check that the token has the format of a bot token."""
    context.require("DISCORD_TOKEN")
    token = context.settings.discord_token
    if token is None:
        return [Finding("fail", "token", "DISCORD_TOKEN is not set", f"get one at {_TOKEN_PAGE}")]
    problem = find_token_problem(token.get_secret_value())
    if problem is None:
        return [Finding("ok", "token", "has the format of a bot token")]
    is_discord = context.settings.discord_api_base == DISCORD_API_BASE
    return [Finding("fail" if is_discord else "warn", "token", problem, f"get a new one at {_TOKEN_PAGE}")]


def find_token_problem(token: str) -> str | None:
    """Return what is wrong with a token's format, without any part of the token; None if nothing is.

    A bot token is the application's id, a time and a signature in base64, separated by dots.
    """
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        kind = "is it a client secret?" if re.fullmatch(r"[\w-]{32}", token) else f"parts: {len(parts)}"
        return f"a bot token has three parts separated by dots, this one does not ({kind})"
    if application_of_token(token) is None:
        return "its first part does not contain the application's id"
    return None


async def check_cogs(context: DoctorContext) -> Sequence[Finding]:
    """Report what of cogs cannot work with the intents and caches, and in the running bot those that are not loaded."""
    problems = context.cog_problems()
    if problems is None:
        return []
    findings = [Finding("warn", "cogs", problem) for problem in problems]
    return findings or [Finding("ok", "cogs", "no listener and no command lacks what it needs")]


async def check_draining(context: DoctorContext) -> Sequence[Finding]:
    """Check that Railway gives the bot the time for a clean shutdown."""
    context.require("SHUTDOWN_SECONDS")
    if not is_on_railway(context.environ):
        return [Finding("ok", "draining", "this is not Railway: the host's own limit is not known here")]
    problem = find_draining_problem(context.environ, context.settings.shutdown_seconds)
    if problem is not None:
        return [Finding("warn", "draining", *problem)]
    return [Finding("ok", "draining", f"{DRAINING} is {context.environ[DRAINING]}")]


def is_on_railway(environ: Mapping[str, str]) -> bool:
    """Return whether this runs on Railway."""
    return any(name.startswith("RAILWAY_") for name in environ)


def find_draining_problem(environ: Mapping[str, str], shutdown_seconds: float) -> tuple[str, str] | None:
    """Return why Railway kills the bot before its shutdown is complete, and what to do; None if it does not."""
    if not is_on_railway(environ):
        return None
    value = environ.get(DRAINING, "").strip()
    try:
        seconds = float(value or 0)
    except ValueError:
        seconds = 0.0
    if value and seconds >= shutdown_seconds:
        return None
    unless = "" if value else " unless the service's settings say otherwise"
    seen = f"{DRAINING} is {value or 'not set'}, so Railway kills the bot {seconds:g} s after SIGTERM{unless}"
    advice = f"set it to {shutdown_seconds + DRAINING_MARGIN:g}, above SHUTDOWN_SECONDS ({shutdown_seconds:g})"
    return f"{seen}: what waits to be written may be lost at each deployment", advice

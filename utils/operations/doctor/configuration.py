"""Checks of the settings, of variable names, and of the token's format."""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Sequence

from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import Finding
from utils.settings import DEVELOPER_PORTAL, DISCORD_API_BASE, variables

#: How similar to a setting a variable's name must be to count as misspelt; less in `.env`, which holds only ours.
SIMILARITY, SIMILARITY_IN_FILE = 0.86, 0.75
#: Variables that libpq (PostgreSQL manual, 34.15) or the host reads, although they look like ours.
_FOREIGN = re.compile(r"(RAILWAY_.*|PG(HOSTADDR|PASSFILE|SERVICE\w*|OPTIONS|DATA|APPNAME|SSL\w+|CLIENTENCODING|TZ))$")

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
    for names, similarity in ((list(context.environ), SIMILARITY), (_names_in_file(context), SIMILARITY_IN_FILE)):
        for name in names:
            intended = _intended_name(name.upper(), known, similarity)
            if intended is not None:
                misspelt[name] = intended
    return [
        Finding("warn", "variables", f"{name} is not read", f"did you mean {intended}?")
        for name, intended in misspelt.items()
    ] or [Finding("ok", "variables", "none looks misspelt")]


def _names_in_file(context: DoctorContext) -> list[str]:
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
    try:
        digits = base64.b64decode(parts[0] + "=" * (-len(parts[0]) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return "its first part does not contain the application's id"
    if not re.fullmatch(r"\d{17,20}", digits) or not 0 < int(digits) < 2**63:
        return "its first part does not contain the application's id"
    return None

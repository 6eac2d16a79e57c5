"""Checks of the settings and of the token, which nobody but us is asked about."""

from __future__ import annotations

import base64
import binascii
import difflib
import re
from collections.abc import Sequence

from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import Finding
from utils.settings import DEVELOPER_PORTAL, DISCORD_API_BASE, variables

#: How alike a name of the environment must be to one of ours to be taken for it; `.env` is ours alone.
ALIKE, ALIKE_IN_FILE = 0.86, 0.75
#: What others read, however like ours it looks: libpq's (PostgreSQL manual, 34.15) and the host's.
_OTHERS = re.compile(r"(RAILWAY_.*|PG(HOSTADDR|PASSFILE|SERVICE\w*|OPTIONS|DATA|APPNAME|SSL\w+|CLIENTENCODING|TZ))$")

_TOKEN_PAGE = f"{DEVELOPER_PORTAL} > your application > Bot > Reset Token"


async def check_settings(patient: DoctorContext) -> Sequence[Finding]:
    """Every value that is wrong, one finding each."""
    wrong = [Finding("fail", "settings", line, "correct it in the environment or in .env") for line in patient.wrong]
    return wrong or [Finding("ok", "settings", f"{len(patient.settings.model_fields_set)} are set, none is wrong")]


async def check_names(patient: DoctorContext) -> Sequence[Finding]:
    """Variables that nobody reads, and that look like one that is read."""
    known = set(variables())
    found: dict[str, str] = {}
    for name in patient.environ:
        meant = _meant(name.upper(), known, ALIKE)
        if meant is not None:
            found[name] = meant
    for name in _in_file(patient):
        meant = _meant(name.upper(), known, ALIKE_IN_FILE)
        if meant is not None:
            found[name] = meant
    return [
        Finding("warn", "variables", f"{name} is not read", f"did you mean {meant}?") for name, meant in found.items()
    ] or [Finding("ok", "variables", "none looks misspelt")]


def _in_file(patient: DoctorContext) -> list[str]:
    from dotenv import dotenv_values

    if patient.env_file is None:
        return []
    try:
        return list(dotenv_values(patient.env_file, interpolate=False))
    except (OSError, UnicodeDecodeError):  # what is wrong with it is among the settings
        return []


def _meant(name: str, known: set[str], alike: float) -> str | None:
    if name in known or _OTHERS.match(name):
        return None
    return next(iter(difflib.get_close_matches(name, known, 1, alike)), None)


async def check_token(patient: DoctorContext) -> Sequence[Finding]:
    """Whether the token has a bot token's shape: the application's id, a time and a signature, in base64."""
    patient.needs("DISCORD_TOKEN")
    token = patient.settings.discord_token
    if token is None:
        return [Finding("fail", "token", "DISCORD_TOKEN is not set", f"get one at {_TOKEN_PAGE}")]
    wrong = shape_of(token.get_secret_value())
    if wrong is None:
        return [Finding("ok", "token", "it has the shape of a bot token")]
    is_discord = patient.settings.discord_api_base == DISCORD_API_BASE
    return [Finding("fail" if is_discord else "warn", "token", wrong, f"get a new one at {_TOKEN_PAGE}")]


def shape_of(token: str) -> str | None:
    """Return what is wrong with a token's shape, without anything of it; None: nothing."""
    parts = token.split(".")
    if len(parts) != 3 or not all(parts):
        kind = "a client secret?" if re.fullmatch(r"[\w-]{32}", token) else f"parts: {len(parts)}"
        return f"a bot token has three parts with dots between them, and this has not ({kind})"
    try:
        digits = base64.b64decode(parts[0] + "=" * (-len(parts[0]) % 4), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        return "its first part does not hold the application's id"
    if not re.fullmatch(r"\d{17,20}", digits) or not 0 < int(digits) < 2**63:
        return "its first part does not hold the application's id"
    return None

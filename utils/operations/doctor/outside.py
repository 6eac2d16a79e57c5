"""Checks that ask Discord."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime

import aiohttp

from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import CheckSkipped, Finding
from utils.settings import DEVELOPER_PORTAL

#: Seconds for Discord's answer.
SECONDS = 5.0
#: Flags of an application that may see members, in any number of guilds and in fewer than 100 (API reference,
#: "Application Flags").
_MEMBERS = 1 << 14 | 1 << 15
#: Seconds by which a clock may be off: Discord's header counts whole seconds, and nothing of ours trusts our own clock.
SKEW_SECONDS = 5.0


async def check_discord(patient: DoctorContext) -> Sequence[Finding]:
    """Whether Discord knows the token, whether members may be seen, and whether the clocks agree."""
    patient.needs("DISCORD_TOKEN", "DISCORD_API_BASE")
    token, base = patient.settings.discord_token, patient.settings.discord_api_base
    if token is None:
        raise CheckSkipped("there is no token to ask with")
    headers = {"Authorization": f"Bot {token.get_secret_value()}", "User-Agent": "DiscordBot (guildbook doctor)"}
    asked = time.time()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS)) as session,
            session.get(f"{base}/applications/@me", headers=headers, allow_redirects=False) as response,
        ):
            status, date = response.status, response.headers.get("Date")
            ours = (asked + time.time()) / 2
            content = await response.json(content_type=None) if status == 200 else None
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError) as exc:
        why = "no answer in time" if isinstance(exc, TimeoutError) else patient.hidden(f"{type(exc).__name__}: {exc}")
        return [
            Finding("fail", "discord", f"{base} is out of reach: {why[:200]}",
                    "check the network and DISCORD_API_BASE, and https://discordstatus.com")
        ]  # fmt: skip
    clock = _clock(date, ours)
    if status == 401:
        todo = f"get a new one at {DEVELOPER_PORTAL} > your application > Bot > Reset Token"
        return [Finding("fail", "discord", "it does not know this token", todo), *clock]
    if not isinstance(content, dict):
        return [Finding("fail", "discord", f"{base}/applications/@me answered {status}",
                        "try again; if it stays so, check DISCORD_API_BASE"), *clock]  # fmt: skip
    name = str(content.get("name", "?"))[:40]
    return [Finding("ok", "discord", f"it knows the application {name!r}"), _intents(content.get("flags")), *clock]


def _intents(flags: object) -> Finding:
    if isinstance(flags, int) and flags & _MEMBERS:
        return Finding("ok", "intents", "Server Members Intent is on")
    todo = f"switch it on at {DEVELOPER_PORTAL} > your application > Bot > Privileged Gateway Intents"
    return Finding("fail", "intents", "Server Members Intent is off: members cannot be mirrored", todo)


def _clock(date: str | None, ours: float) -> list[Finding]:
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return []
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=UTC)
    return [skew("Discord", theirs.timestamp() + 0.5 - ours)]  # the header has whole seconds, rounded down


def skew(of: str, seconds: float) -> Finding:
    """Return what to say of a clock that is `seconds` ahead of ours."""
    if abs(seconds) <= SKEW_SECONDS:
        return Finding("ok", f"clock ({of})", f"agrees with ours to {SKEW_SECONDS:g} s")
    how = "behind" if seconds > 0 else "ahead of"
    return Finding("warn", f"clock ({of})", f"ours is {abs(seconds):.0f} s {how} it",
                   "set this machine's clock by NTP: times in logs and backups are wrong")  # fmt: skip

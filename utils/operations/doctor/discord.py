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

REQUEST_SECONDS = 5.0
#: The application flags for the Server Members Intent, with and without Discord's verification (API reference,
#: "Application Flags").
_MEMBERS_INTENT = 1 << 14 | 1 << 15
#: Tolerated difference of clocks: Discord's header has whole seconds, and nothing of ours relies on our own clock.
MAX_SKEW_SECONDS = 5.0


async def check_discord(context: DoctorContext, *, timeout: float = REQUEST_SECONDS) -> Sequence[Finding]:
    """Check that Discord accepts the token, that the Server Members Intent is on, and that the clocks agree."""
    context.require("DISCORD_TOKEN", "DISCORD_API_BASE")
    token, base = context.settings.discord_token, context.settings.discord_api_base
    if token is None:
        raise CheckSkipped("DISCORD_TOKEN is not set")
    headers = {"Authorization": f"Bot {token.get_secret_value()}", "User-Agent": "DiscordBot (guildbook doctor)"}
    started = time.time()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
            session.get(f"{base}/applications/@me", headers=headers, allow_redirects=False) as response,
        ):
            status, date = response.status, response.headers.get("Date")
            answered = (started + time.time()) / 2
            content = await response.json(content_type=None) if status == 200 else None
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError) as exc:
        reason = (
            "no answer in time" if isinstance(exc, TimeoutError) else context.redact(f"{type(exc).__name__}: {exc}")
        )
        advice = "check the network, DISCORD_API_BASE, and https://discordstatus.com"
        return [Finding("fail", "discord", f"{base} cannot be reached: {reason[:200]}", advice)]
    clock = _compare_clock(date, answered)
    if status == 401:
        advice = f"get a new one at {DEVELOPER_PORTAL} > your application > Bot > Reset Token"
        return [Finding("fail", "discord", "it does not accept this token", advice), *clock]
    if not isinstance(content, dict):
        seen = f"{base}/applications/@me answered with status {status}"
        return [Finding("fail", "discord", seen, "try again later; if it persists, check DISCORD_API_BASE"), *clock]
    name = str(content.get("name", "?"))[:40]
    return [
        Finding("ok", "discord", f"the token is of the application {name!r}"),
        _check_intent(content.get("flags")),
        *clock,
    ]


def _check_intent(flags: object) -> Finding:
    if isinstance(flags, int) and flags & _MEMBERS_INTENT:
        return Finding("ok", "intents", "Server Members Intent is on")
    advice = f"switch it on at {DEVELOPER_PORTAL} > your application > Bot > Privileged Gateway Intents"
    return Finding("fail", "intents", "Server Members Intent is off: members cannot be mirrored", advice)


def _compare_clock(date: str | None, ours: float) -> list[Finding]:
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return []
    if theirs.tzinfo is None:
        theirs = theirs.replace(tzinfo=UTC)
    return [report_skew("Discord", theirs.timestamp() + 0.5 - ours)]  # the header is rounded down to whole seconds


def report_skew(other: str, seconds: float) -> Finding:
    """Return the finding for a clock that is `seconds` ahead of ours."""
    name = f"clock ({other})"
    if abs(seconds) <= MAX_SKEW_SECONDS:
        return Finding("ok", name, f"agrees with ours within {MAX_SKEW_SECONDS:g} s")
    direction = "behind" if seconds > 0 else "ahead of"
    seen = f"ours is {abs(seconds):.0f} s {direction} it"
    return Finding("warn", name, seen, "synchronize this machine's clock (NTP): times in logs and backups are wrong")

"""Checks that ask Discord."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import discord

from utils.mirror.discord.intents import PRIVILEGED, granted_intents, how_to_switch_on, parse_intents
from utils.mirror.discord.permissions import UsedPermission, find_missing, invite_url
from utils.operations.doctor.context import DoctorContext
from utils.operations.doctor.report import CheckSkipped, Finding
from utils.settings import DEVELOPER_PORTAL
from utils.text import format_count

REQUEST_SECONDS = 5.0
_REQUEST_ERRORS = (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError)
#: Largest page of GET /users/@me/guilds (Discord API reference, "Get Current User Guilds"), and how many are read.
GUILDS_PER_PAGE, GUILD_PAGES = 200, 5
#: Guilds with missing permissions of which each is a finding of its own.
SHOWN_GUILDS = 10
#: Tolerated difference of clocks: Discord's header has whole seconds, and nothing of ours relies on our own clock.
MAX_SKEW_SECONDS = 5.0


async def check_discord(context: DoctorContext, *, timeout: float = REQUEST_SECONDS) -> Sequence[Finding]:
    """Check the token, the clocks, and that the Server Members Intent and the privileged ones of INTENTS are on."""
    base, headers = _endpoint(context)
    started = time.time()
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
            session.get(f"{base}/applications/@me", headers=headers, allow_redirects=False) as response,
        ):
            status, date = response.status, response.headers.get("Date")
            answered = (started + time.time()) / 2
            content = await response.json(content_type=None) if status == 200 else None
    except _REQUEST_ERRORS as exc:
        advice = "check the network, DISCORD_API_BASE, and https://discordstatus.com"
        return [Finding("fail", "discord", f"{base} cannot be reached: {_reason(context, exc)}", advice)]
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
        *_check_intents(content.get("flags"), context),
        *clock,
    ]


def _check_intents(flags: object, context: DoctorContext) -> list[Finding]:
    """Check the privileged intents of the mirror, of INTENTS and of cogs."""
    granted = granted_intents(flags) if isinstance(flags, int) else frozenset()
    added, declared = parse_intents(context.settings.intents), context.cog_intents()
    findings = []
    for name, intent in PRIVILEGED.items():
        is_needed = name == "members"
        users = (["INTENTS"] if getattr(added, name) else []) + declared.get(name, [])
        if name in granted and (is_needed or users):
            findings.append(Finding("ok", "intents", f"{intent.switch} is on"))
        elif is_needed:
            seen = f"{intent.switch} is off: members cannot be mirrored"
            findings.append(Finding("fail", "intents", seen, how_to_switch_on(name)))
        elif users:
            seen = f"{intent.switch} is off, and asked for by {', '.join(users)}: cogs that declare it are not loaded"
            findings.append(Finding("warn", "intents", seen, how_to_switch_on(name)))
    return findings


async def check_permissions(context: DoctorContext, *, timeout: float = REQUEST_SECONDS) -> Sequence[Finding]:
    """Check that each guild grants the permissions that the mirror uses. Overwrites of channels do not count."""
    base, headers = _endpoint(context)
    guilds: list[dict[str, Any]] = []
    application_id, is_whole = "APPLICATION_ID", False
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout), headers=headers) as session:
            async with session.get(f"{base}/applications/@me", allow_redirects=False) as response:
                if response.status != 200:
                    raise CheckSkipped("Discord does not accept the token")
                application_id = str((await response.json(content_type=None))["id"])
            for _ in range(GUILD_PAGES):
                after = guilds[-1]["id"] if guilds else "0"
                query = {"limit": str(GUILDS_PER_PAGE), "after": after}
                async with session.get(f"{base}/users/@me/guilds", params=query, allow_redirects=False) as response:
                    if response.status != 200:
                        raise CheckSkipped(f"{base}/users/@me/guilds answered with status {response.status}")
                    page = await response.json(content_type=None)
                guilds += page
                is_whole = len(page) < GUILDS_PER_PAGE
                if is_whole:
                    break
    except (*_REQUEST_ERRORS, KeyError, TypeError) as exc:
        raise CheckSkipped(f"{base} cannot be asked: {_reason(context, exc)}") from exc
    return _describe_guilds(guilds, application_id, is_whole=is_whole)


async def check_admin_guild(context: DoctorContext, *, timeout: float = REQUEST_SECONDS) -> Sequence[Finding]:
    """Check that the bot is in the guild where the operators' commands are registered."""
    context.require("ADMIN_GUILD_ID")
    guild_id = context.settings.admin_guild_id
    if guild_id is None:
        seen = "ADMIN_GUILD_ID is not set: operators' commands are in direct messages with the bot"
        return [Finding("ok", "admin guild", seen)]
    base, headers = _endpoint(context)
    query = {"limit": "1", "after": str(guild_id - 1)}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout), headers=headers) as session,
            session.get(f"{base}/users/@me/guilds", params=query, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise CheckSkipped(f"{base}/users/@me/guilds answered with status {response.status}")
            page = await response.json(content_type=None)
        guild = next((guild for guild in page if int(guild["id"]) == guild_id), None)
    except (*_REQUEST_ERRORS, KeyError, TypeError) as exc:
        raise CheckSkipped(f"{base} cannot be asked: {_reason(context, exc)}") from exc
    if guild is not None:
        return [Finding("ok", "admin guild", f"the bot is in {str(guild.get('name', '?'))[:40]!r} ({guild_id})")]
    application = context.settings.application_id or "APPLICATION_ID"
    return [
        Finding(
            "fail",
            "admin guild",
            f"the bot is not in the guild {guild_id} (ADMIN_GUILD_ID): operators' commands cannot be registered there",
            f"invite it with {invite_url(str(application))}, or correct ADMIN_GUILD_ID",
        )
    ]


def _describe_guilds(guilds: Sequence[dict[str, Any]], application_id: str, *, is_whole: bool) -> list[Finding]:
    checked = format_count(len(guilds), "guild") if is_whole else f"the first {format_count(len(guilds), 'guild')}"
    lacking: list[tuple[str, list[UsedPermission]]] = []
    for guild in guilds:
        missing = find_missing(discord.Permissions(int(guild["permissions"]))) if guild.get("permissions") else []
        if missing:
            lacking.append((f"{str(guild.get('name', '?'))[:40]!r} ({guild['id']})", missing))
    if not lacking:
        return [Finding("ok", "permissions", f"nothing is missing in {checked}")]
    advice = f"to grant it, open {invite_url(application_id)} and choose the guild"
    findings = [
        Finding("warn", "permissions", f"{name} lacks {used.name}: {used.missed} are not mirrored", advice)
        for name, missing in lacking[:SHOWN_GUILDS]
        for used in missing
    ]
    if len(lacking) > SHOWN_GUILDS:
        seen = f"{len(lacking) - SHOWN_GUILDS:,} more of {checked} lack permissions"
        findings.append(Finding("warn", "permissions", seen, "/mirror status and this command show the first"))
    return findings


def _endpoint(context: DoctorContext) -> tuple[str, dict[str, str]]:
    """Return the address and the headers of requests to Discord. Raises `CheckSkipped` without a token."""
    context.require("DISCORD_TOKEN", "DISCORD_API_BASE")
    token = context.settings.discord_token
    if token is None:
        raise CheckSkipped("DISCORD_TOKEN is not set")
    headers = {"Authorization": f"Bot {token.get_secret_value()}", "User-Agent": "DiscordBot (guildbook doctor)"}
    return context.settings.discord_api_base, headers


def _reason(context: DoctorContext, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return context.redact(f"{type(error).__name__}: {error}")[:200]


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

"""Registers the slash commands with Discord, only when they have changed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import TYPE_CHECKING, Any

import discord
import orjson

from utils.bot.registrations import command_scopes, guild_object
from utils.exceptions import DatabaseError

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: The id of the global scope in `ops.command_trees`.
GLOBAL_SCOPE = 0
#: Seconds for one registration. When its rate limit is reached, Discord can ask to wait for hours.
REGISTER_TIMEOUT = 30.0

_SAVE_DIGEST = """
INSERT INTO ops.command_trees AS tree (application_id, guild_id, digest) VALUES ($1, $2, $3)
ON CONFLICT (application_id, guild_id) DO UPDATE SET digest = excluded.digest, synced_at = now()
"""


async def sync_commands(bot: Guildbook) -> list[int]:
    """Register each scope whose commands differ from those registered last, and return their guild ids (0: global).

    A scope that lost all its commands is emptied. Whatever fails is logged and retried at the next start: the mirror
    works without commands. Never raises an `Exception`.
    """
    application_id = bot.application_id
    assert application_id is not None, "known after the login"
    try:
        rows = await bot.db.fetch(
            "SELECT guild_id, digest FROM ops.command_trees WHERE application_id = $1", application_id
        )
    except DatabaseError as exc:
        _log.warning("slash commands not registered: cannot read what was registered last: %s", exc)
        return []
    digests: dict[int, str] = {row["guild_id"]: row["digest"] for row in rows}
    current = {guild_id or GLOBAL_SCOPE for guild_id in command_scopes(bot)}
    changed: list[int] = []
    for guild_id in sorted(current | set(digests)):
        try:
            digest = await command_digest(bot, guild_id)
            if digests.get(guild_id) != digest and await _register(bot, guild_id):
                changed.append(guild_id)
                await bot.db.execute(_SAVE_DIGEST, application_id, guild_id, digest)
        except DatabaseError as exc:
            _log.warning("could not record the registered slash commands: the next start registers them again: %s", exc)
        except Exception:  # a translator or a command may raise anything
            _log.exception("slash commands not registered %s", _scope(guild_id))
    return changed


async def command_digest(bot: Guildbook, guild_id: int) -> str:
    """Return the SHA-256 of the payload that registers one scope's commands."""
    translator = bot.tree.translator
    payloads: list[dict[str, Any]] = [
        await command.get_translated_payload(bot.tree, translator) if translator else command.to_dict(bot.tree)
        for command in bot.tree.get_commands(guild=guild_object(guild_id or None))
    ]
    payloads.sort(key=lambda payload: (payload["type"], payload["name"]))
    return hashlib.sha256(orjson.dumps(payloads, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def _register(bot: Guildbook, guild_id: int) -> bool:
    scope = _scope(guild_id)
    try:
        async with asyncio.timeout(REGISTER_TIMEOUT):
            registered = await bot.tree.sync(guild=guild_object(guild_id or None))
    except discord.Forbidden:
        _log.warning(
            "slash commands not registered %s: the bot is not in the guild, or was invited without the scope"
            " applications.commands; invite it again, or correct ADMIN_GUILD_ID",
            scope,
        )
        return False
    except TimeoutError:
        _log.warning("slash commands not registered %s: no response within %g s", scope, REGISTER_TIMEOUT)
        return False
    except (discord.DiscordException, OSError) as exc:
        _log.warning("slash commands not registered %s: %s", scope, exc)
        return False
    _log.info("slash commands registered %s", scope, extra={"commands": [command.name for command in registered]})
    return True


def _scope(guild_id: int) -> str:
    return f"in guild {guild_id}" if guild_id else "globally"

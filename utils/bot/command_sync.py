"""Registers the slash commands with Discord when they changed, and only then."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import TYPE_CHECKING, Any

import discord
import orjson

from utils.exceptions import DatabaseError

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: Stands for the global commands in `ops.command_trees`.
EVERYWHERE = 0
#: Seconds for one registration; Discord's limit on them can ask to wait for hours.
REGISTER_SECONDS = 30.0

_REMEMBER = """
INSERT INTO ops.command_trees AS tree (application_id, guild_id, digest) VALUES ($1, $2, $3)
ON CONFLICT (application_id, guild_id) DO UPDATE SET digest = excluded.digest, synced_at = now()
"""


async def register_commands(bot: Guildbook) -> list[int]:
    """Register each scope whose commands differ from what was registered last; return those (0: global).

    A scope that has lost all its commands is emptied. What Discord refuses is logged and tried again at the next
    start: commands are no condition for the mirror.
    """
    application_id = bot.application_id
    assert application_id is not None, "after the login only"
    try:
        known = await bot.db.fetch(
            "SELECT guild_id, digest FROM ops.command_trees WHERE application_id = $1", application_id
        )
    except DatabaseError as exc:
        _log.warning("slash commands are not compared with the registered ones: %s", exc)
        return []
    digests: dict[int, str] = {row["guild_id"]: row["digest"] for row in known}
    changed: list[int] = []
    for guild_id in sorted({EVERYWHERE, *bot.tree._guild_commands, *digests}):
        digest = await digest_of(bot, guild_id)
        if digests.get(guild_id) != digest and await _register(bot, guild_id):
            changed.append(guild_id)
            await bot.db.execute(_REMEMBER, application_id, guild_id, digest)
    return changed


async def digest_of(bot: Guildbook, guild_id: int) -> str:
    """Return the SHA-256 of what Discord would be sent for one scope."""
    translator = bot.tree.translator
    payloads: list[dict[str, Any]] = [
        await command.get_translated_payload(bot.tree, translator) if translator else command.to_dict(bot.tree)
        for command in bot.tree.get_commands(guild=_scope(guild_id))
    ]
    payloads.sort(key=lambda payload: (payload["type"], payload["name"]))
    return hashlib.sha256(orjson.dumps(payloads, option=orjson.OPT_SORT_KEYS)).hexdigest()


async def _register(bot: Guildbook, guild_id: int) -> bool:
    where = f"in guild {guild_id}" if guild_id else "globally"
    try:
        async with asyncio.timeout(REGISTER_SECONDS):
            registered = await bot.tree.sync(guild=_scope(guild_id))
    except discord.Forbidden:
        _log.warning(
            "slash commands cannot be registered %s: the bot is not there, or was invited without the scope"
            " applications.commands; invite it again, or correct ADMIN_GUILD_ID",
            where,
        )
        return False
    except TimeoutError:
        _log.warning("slash commands not registered %s: no answer within %g s", where, REGISTER_SECONDS)
        return False
    except (discord.DiscordException, OSError) as exc:
        _log.warning("slash commands not registered %s: %s", where, exc)
        return False
    _log.info("slash commands registered %s", where, extra={"commands": [command.name for command in registered]})
    return True


def _scope(guild_id: int) -> discord.Object | None:
    return discord.Object(guild_id) if guild_id else None

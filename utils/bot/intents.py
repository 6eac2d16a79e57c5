"""`GatewayIntents`: the intents of the gateway session, combined from the mirror, INTENTS and the loaded cogs.

discord.py takes intents only in the client's constructor, before any cog is loaded. They are sent with IDENTIFY, so the
private attribute set here takes effect up to then (docs/explanation/architecture.md, "Private hooks").
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import discord
from discord.ext import commands

from utils.exceptions import CogError
from utils.mirror.discord.intents import (
    PRIVILEGED,
    granted_intents,
    how_to_switch_on,
    intent_names,
    mirror_intents,
    parse_intents,
    without,
)

if TYPE_CHECKING:
    from utils.bot.client import Guildbook

_log = logging.getLogger(__name__)

#: The attribute of a cog that declares its intents.
ATTRIBUTE = "intents"


class GatewayIntents:
    """Decides which intents the bot identifies with, and which cogs cannot have theirs.

    `refused` are privileged intents for which Discord closed an earlier connection.
    """

    def __init__(self, bot: Guildbook, *, refused: frozenset[str] = frozenset()) -> None:
        self._bot = bot
        self._refused = refused
        #: Those of the mirror and, from `grant` on, what Discord grants of INTENTS.
        self._base: discord.Intents = mirror_intents(bot.settings.member_cache)
        #: Privileged intents that Discord grants; None if its flags do not tell.
        self._granted: frozenset[str] | None = None
        #: What the bot identified with; None before.
        self._identified: discord.Intents | None = None

    def grant(self, flags: int) -> None:
        """Apply what the application's flags say before the bot connects, and leave out of INTENTS what is refused.

        Flags without the members intent are not believed: the mirror cannot run without it, so either the gateway
        refuses the connection anyway, or the server does not maintain its flags.
        """
        granted = granted_intents(flags)
        self._granted = granted if "members" in granted else None
        added = parse_intents(self._bot.settings.intents)
        refused = [name for name in PRIVILEGED if getattr(added, name) and not self._is_granted(name)]
        for name in refused:
            _log.error("INTENTS: left out %s, which Discord does not grant: %s", name, how_to_switch_on(name))
        self._base |= without(added, refused)
        self._apply(self._base)

    def optional(self) -> frozenset[str]:
        """Return the privileged intents of this session that the mirror can do without."""
        return frozenset(name for name in PRIVILEGED if name != "members" and getattr(self._bot.intents, name))

    def admit(self, cog: commands.Cog) -> None:
        """Add a cog's intents to those of the coming session.

        Raises `CogError` if it needs a privileged intent that Discord does not grant.
        """
        wanted = declared_intents(cog)
        for name in PRIVILEGED:
            if getattr(wanted, name) and not self._is_granted(name):
                raise CogError(
                    f"{cog.qualified_name} needs the intent {name}, which Discord does not grant to this application:"
                    f" {how_to_switch_on(name)}"
                )
        if self._identified is None:
            self._apply(self._bot.intents | wanted)

    def settle(self) -> None:
        """Fix the intents to those of the loaded cogs. Call it when they are loaded, before the gateway connects."""
        intents = self._base
        for cog in self._bot.cogs.values():
            intents = intents | declared_intents(cog)
        self._apply(intents)
        self._identified = intents
        _log.info("gateway intents: %s", ", ".join(intent_names(intents)))

    def lacking(self, cog: commands.Cog) -> list[str]:
        """Return which intents of a cog the running session lacks; nothing before it begins."""
        if self._identified is None:
            return []
        wanted = declared_intents(cog)
        return [name for name in intent_names(wanted) if not getattr(self._identified, name)]

    def _is_granted(self, name: str) -> bool:
        return name not in self._refused and (self._granted is None or name in self._granted)

    def _apply(self, intents: discord.Intents) -> None:
        self._bot._connection._intents = intents


def declared_intents(cog: commands.Cog) -> discord.Intents:
    """Return the intents that a cog declares. Anything else under that name is the author's own and ignored."""
    declared = getattr(cog, ATTRIBUTE, None)
    return declared if isinstance(declared, discord.Intents) else discord.Intents.none()

"""Gateway intents: those of the mirror, those that an operator adds, and which privileged ones Discord grants."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import discord

from utils.settings import DEVELOPER_PORTAL


class PrivilegedIntent(NamedTuple):
    """An intent that must be switched on in the developer portal (Discord API reference, "Privileged Intents")."""

    #: The switch's name in the portal.
    switch: str
    #: The application's flags that tell it is on: after Discord's review, and before ("Application Flags").
    flags: int


PRIVILEGED: dict[str, PrivilegedIntent] = {
    "presences": PrivilegedIntent("Presence Intent", 1 << 12 | 1 << 13),
    "members": PrivilegedIntent("Server Members Intent", 1 << 14 | 1 << 15),
    "message_content": PrivilegedIntent("Message Content Intent", 1 << 18 | 1 << 19),
}


def mirror_intents(member_cache: Literal["none", "voice", "all"] = "none") -> discord.Intents:
    """Return the intents that the mirror and, for a value of MEMBER_CACHE, discord.py's cache need."""
    return discord.Intents(
        guilds=True, members=True, moderation=True, guild_messages=True, voice_states=member_cache != "none"
    )


def parse_intents(names: Iterable[str]) -> discord.Intents:
    """Return the intents of a setting: discord.py's names, `default` or `all`. Names must be valid."""
    combined = discord.Intents.none()
    for name in names:
        match name:
            case "all":
                combined |= discord.Intents.all()
            case "default":
                combined |= discord.Intents.default()
            case _:
                combined |= discord.Intents(**{name: True})
    return combined


def intent_names(intents: discord.Intents) -> list[str]:
    """Return discord.py's names of the intents, each once."""
    return [name for name, is_set in intents if is_set]


def without(intents: discord.Intents, names: Iterable[str]) -> discord.Intents:
    """Return a copy of the intents without some of them."""
    left = discord.Intents.none() | intents
    for name in names:
        setattr(left, name, False)
    return left


def granted_intents(flags: int) -> frozenset[str]:
    """Return the privileged intents that an application's flags grant."""
    return frozenset(name for name, intent in PRIVILEGED.items() if flags & intent.flags)


def how_to_switch_on(name: str) -> str:
    """Return where to switch on a privileged intent, as the second half of a sentence."""
    return (
        f"switch on {PRIVILEGED[name].switch!r} at {DEVELOPER_PORTAL} > your application > Bot > Privileged Gateway"
        " Intents (bots that reach 10,000 users or more need Discord's review for it), then start again"
    )

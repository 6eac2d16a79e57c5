"""The permissions that the mirror uses, what it misses without each, and which requests they allow."""

from __future__ import annotations

from typing import NamedTuple

import discord

#: Asks for the bot's user, its slash commands, and `invite_permissions`.
_INVITE_URL = "https://discord.com/oauth2/authorize?client_id={id}&scope=bot+applications.commands&permissions={value}"


class UsedPermission(NamedTuple):
    """A permission, by Discord's name and by discord.py's name of its flag.

    Discord's documentation: "Permissions" for channels and history, "List Private Archived Threads" for threads, and
    "Guild Ban Add" for bans.
    """

    name: str
    flag: str
    #: What is mirrored with it.
    brings: str
    #: What is not mirrored without it.
    missed: str
    #: The permission that does as well, by both names.
    alternative: tuple[str, str] | None = None


USED: tuple[UsedPermission, ...] = (
    UsedPermission(
        "View Channels",
        "view_channel",
        "settings of channels, their threads, and the count of messages in them",
        "names and settings of channels, their threads and messages",
    ),
    UsedPermission(
        "Read Message History",
        "read_message_history",
        "archived public threads",
        "archived threads, public and private",
    ),
    UsedPermission(
        "Manage Threads",
        "manage_threads",
        "private threads that the bot was not added to, also archived ones",
        "private threads, except active ones that the bot was added to",
    ),
    UsedPermission(
        "View Audit Log",
        "view_audit_log",
        "bans and unbans (`member_events`); Discord sends them with *Ban Members* as well",
        "bans and unbans",
        ("Ban Members", "ban_members"),
    ),
)


def invite_permissions() -> discord.Permissions:
    """Return the permissions that the invitation asks for."""
    return discord.Permissions(**{used.flag: True for used in USED})


def invite_url(application_id: int | str) -> str:
    """Return the address that invites the bot, or grants the permissions where it already is."""
    return _INVITE_URL.format(id=application_id, value=invite_permissions().value)


def find_missing(granted: discord.Permissions) -> list[UsedPermission]:
    """Return what a guild that grants these permissions to the bot does not grant."""
    if granted.administrator:
        return []
    return [used for used in USED if not (_has(granted, used.flag) or _has_alternative(granted, used))]


def missing_in(guild: discord.Guild) -> list[UsedPermission]:
    """Return what a guild does not grant to the bot; nothing while the bot's own member is unknown."""
    return [] if _own_member(guild) is None else find_missing(guild.me.guild_permissions)


def may_list_archived(guild: discord.Guild | None, channel_id: int, *, private: bool) -> bool:
    """Return whether Discord lists a channel's archived threads to the bot; True if the channel is unknown."""
    granted = _granted_in(guild, channel_id)
    return granted is None or (granted.read_message_history and (granted.manage_threads or not private))


def may_view_private(guild: discord.Guild | None, channel_id: int) -> bool:
    """Return whether the bot sees every private thread of a channel; True if the channel is unknown."""
    granted = _granted_in(guild, channel_id)
    return granted is None or granted.manage_threads


def _granted_in(guild: discord.Guild | None, channel_id: int) -> discord.Permissions | None:
    """Return the bot's permissions in a channel, overwrites included; None if discord.py lacks what they depend on."""
    channel = None if guild is None else guild.get_channel(channel_id)
    member = None if guild is None else _own_member(guild)
    return None if channel is None or member is None else channel.permissions_for(member)


def _own_member(guild: discord.Guild) -> discord.Member | None:
    return guild.me  # discord.py's type leaves out that an unavailable guild has none


def _has(granted: discord.Permissions, flag: str) -> bool:
    return bool(getattr(granted, flag))


def _has_alternative(granted: discord.Permissions, used: UsedPermission) -> bool:
    return used.alternative is not None and _has(granted, used.alternative[1])

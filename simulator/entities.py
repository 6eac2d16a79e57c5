"""The entities of a world: plain data, with ids as int and times in microseconds since 1970."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any

Json = dict[str, Any]

OBFUSCATED_FLAG = 1 << 17
HIDDEN_NAME = "___hidden___"


class Permission(IntFlag):
    """The permissions that decide what a bot is sent, may request and may do."""

    KICK_MEMBERS = 1 << 1
    BAN_MEMBERS = 1 << 2
    ADMINISTRATOR = 1 << 3
    VIEW_AUDIT_LOG = 1 << 7
    VIEW_CHANNEL = 1 << 10
    READ_MESSAGE_HISTORY = 1 << 16
    MANAGE_NICKNAMES = 1 << 27
    MANAGE_ROLES = 1 << 28
    MANAGE_THREADS = 1 << 34
    MODERATE_MEMBERS = 1 << 40


ALL_PERMISSIONS = (1 << 53) - 1


class ChannelType(IntEnum):
    """The channel types of API v10 that guilds have."""

    TEXT = 0
    VOICE = 2
    CATEGORY = 4
    NEWS = 5
    NEWS_THREAD = 10
    PUBLIC_THREAD = 11
    PRIVATE_THREAD = 12
    STAGE = 13
    FORUM = 15


VOICE_TYPES = frozenset({ChannelType.VOICE, ChannelType.STAGE})
THREADED_TYPES = frozenset({ChannelType.TEXT, ChannelType.NEWS, ChannelType.FORUM})


@dataclass(slots=True, eq=False)
class User:
    """A user; `guild_ids` are the guilds of the world that it is a member of."""

    id: int
    username: str
    discriminator: str
    global_name: str | None
    avatar: str | None
    bot: bool
    system: bool
    public_flags: int
    guild_ids: list[int]
    rendered: str | None = None


@dataclass(slots=True, eq=False)
class Member:
    """A user in a guild; `rendered` caches its JSON until it changes."""

    user: User
    guild_id: int
    nick: str | None
    avatar: str | None
    roles: tuple[int, ...]
    joined_at: int | None
    premium_since: int | None
    timed_out_until: int | None
    pending: bool
    flags: int
    rendered: bytes | None = None


@dataclass(slots=True, eq=False)
class Role:
    """A role; @everyone has its guild's id."""

    id: int
    name: str
    color: int = 0
    hoist: bool = False
    icon: str | None = None
    unicode_emoji: str | None = None
    position: int = 1
    permissions: int = 0
    managed: bool = False
    mentionable: bool = False
    tags: Json | None = None
    flags: int = 0


@dataclass(slots=True, eq=False)
class Channel:
    """A guild channel; `hidden` means that the bot cannot view it."""

    id: int
    guild_id: int
    type: int
    name: str
    position: int = 0
    parent_id: int | None = None
    topic: str | None = None
    nsfw: bool = False
    slowmode: int = 0
    permission_overwrites: list[Json] = field(default_factory=list)
    bitrate: int | None = None
    user_limit: int | None = None
    rtc_region: str | None = None
    default_auto_archive_duration: int | None = None
    flags: int = 0
    available_tags: list[Json] = field(default_factory=list)
    last_message_id: int | None = None
    hidden: bool = False


@dataclass(slots=True, eq=False)
class Thread:
    """A thread or forum post."""

    id: int
    guild_id: int
    parent_id: int
    type: int
    name: str
    owner_id: int
    archive_timestamp: int
    create_timestamp: int
    archived: bool = False
    locked: bool = False
    invitable: bool | None = None
    auto_archive_duration: int = 1440
    slowmode: int = 0
    flags: int = 0
    applied_tags: list[int] = field(default_factory=list)
    joined: bool = False
    last_message_id: int | None = None
    message_count: int = 0


@dataclass(slots=True, eq=False)
class Guild:
    """A guild with its contents; `present`: the bot is in it, `available`: it is not in an outage.

    Whether the bot can view a channel is that channel's `hidden` alone, whatever roles and overwrites say.
    """

    id: int
    name: str
    owner_id: int
    joined_at: int
    icon: str | None = None
    splash: str | None = None
    discovery_splash: str | None = None
    banner: str | None = None
    description: str | None = None
    preferred_locale: str = "en-US"
    afk_channel_id: int | None = None
    afk_timeout: int = 300
    verification_level: int = 1
    default_message_notifications: int = 0
    explicit_content_filter: int = 0
    mfa_level: int = 0
    nsfw_level: int = 0
    application_id: int | None = None
    system_channel_id: int | None = None
    system_channel_flags: int = 0
    rules_channel_id: int | None = None
    public_updates_channel_id: int | None = None
    max_members: int = 25_000_000
    premium_tier: int = 0
    premium_subscription_count: int = 0
    vanity_url_code: str | None = None
    features: list[str] = field(default_factory=list)
    # Set when the guild is created or becomes available again, because only GUILD_CREATE contains it.
    large: bool = False
    bot_id: int = 0
    available: bool = True
    present: bool = True
    roles: dict[int, Role] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    threads: dict[int, Thread] = field(default_factory=dict)
    members: dict[int, Member] = field(default_factory=dict)
    bans: set[int] = field(default_factory=set)
    voice: dict[int, int] = field(default_factory=dict)
    # Replaced, never modified in place: a member request in progress keeps the list it started with.
    _ordered: list[int] | None = None

    def ordered_member_ids(self) -> list[int]:
        """Return the members' ids in ascending order, the order of Discord's listings."""
        if self._ordered is None:
            self._ordered = sorted(self.members)
        return self._ordered

    def add_member(self, member: Member) -> None:
        """Add a member."""
        self.members[member.user.id] = member
        self._ordered = None

    def pop_member(self, user_id: int) -> Member:
        """Remove and return a member."""
        self._ordered = None
        return self.members.pop(user_id)

    def granted(self, channel_id: int | None = None) -> int:
        """Return the bot's permissions: see `permissions_of`."""
        return self.permissions_of(self.bot_id, channel_id)

    def permissions_of(self, user_id: int, channel_id: int | None = None) -> int:
        """Return a member's permissions in the guild or, with overwrites, in a channel or a thread's parent.

        https://docs.discord.com/developers/topics/permissions#permission-overwrites
        """
        member = self.members.get(user_id)
        if member is None:
            return 0
        roles = [self.id, *member.roles]
        allowed = 0
        for role_id in roles:
            allowed |= self.roles[role_id].permissions if role_id in self.roles else 0
        if allowed & Permission.ADMINISTRATOR or self.owner_id == user_id:
            return ALL_PERMISSIONS
        thread = self.threads.get(channel_id or 0)
        channel = self.channels.get(thread.parent_id if thread else channel_id or 0)
        overwrites = channel.permission_overwrites if channel else []
        for ids in ({self.id}, set(member.roles), {user_id}):
            applied = [entry for entry in overwrites if int(entry["id"]) in ids]
            for entry in applied:
                allowed &= ~int(entry["deny"])
            for entry in applied:
                allowed |= int(entry["allow"])
        return allowed

    def sees(self, channel_id: int) -> bool:
        """Return whether the bot can view a channel, or a thread: its parent, and a private one's content."""
        thread = self.threads.get(channel_id)
        channel = self.channels.get(thread.parent_id if thread else channel_id)
        if channel is None or channel.hidden:
            return False
        is_private = thread is not None and thread.type == ChannelType.PRIVATE_THREAD and not thread.joined
        return not is_private or bool(self.granted(channel_id) & Permission.MANAGE_THREADS)

    def may_list_archived(self, channel_id: int, *, private: bool) -> bool:
        """Return whether the bot may list the archived threads of a channel."""
        needed = (
            Permission.VIEW_CHANNEL | Permission.READ_MESSAGE_HISTORY | (Permission.MANAGE_THREADS if private else 0)
        )
        return self.granted(channel_id) & needed == needed


# The fields that `World.update_guild` can set.
GUILD_SETTINGS = frozenset(
    [
        "name",
        "owner_id",
        "icon",
        "splash",
        "discovery_splash",
        "banner",
        "description",
        "preferred_locale",
        "afk_channel_id",
        "afk_timeout",
        "verification_level",
        "default_message_notifications",
        "explicit_content_filter",
        "mfa_level",
        "nsfw_level",
        "application_id",
        "system_channel_id",
        "system_channel_flags",
        "rules_channel_id",
        "public_updates_channel_id",
        "max_members",
        "premium_tier",
        "premium_subscription_count",
        "vanity_url_code",
        "features",
    ]
)

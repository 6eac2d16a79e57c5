"""The test oracle: the rows that a correct mirror of the world contains now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

from .entities import Channel, ChannelType, Guild, Member, Role, Thread, User
from .ids import to_datetime

if TYPE_CHECKING:
    from .state import WorldState

Row = dict[str, object]
TABLES = ("guilds", "users", "members", "roles", "channels", "threads")
_T = TypeVar("_T")


def storable(value: _T) -> _T:
    """Replace what Postgres cannot store, NUL and lone surrogates, with U+FFFD, at any depth."""
    if isinstance(value, str):
        if value.isascii() and "\0" not in value:
            return value
        return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in value)  # type: ignore[return-value]
    if isinstance(value, list):
        return [storable(item) for item in value]  # type: ignore[return-value]
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}  # type: ignore[return-value]
    return value


def expected_rows(world: WorldState, table: str, guild_id: int | None) -> Iterator[Row]:
    """Yield the rows of one table, of one guild or of every guild the bot is in."""
    guilds = [g for g in world.guilds.values() if g.present and guild_id in (None, g.id)]
    if table == "users":
        yield from map(_user, _users(world, guilds, with_bot=guild_id is None))
        return
    for guild in guilds:
        if table == "guilds":
            yield _guild(guild)
        elif table == "members":
            yield from map(_member, guild.members.values())
        elif table == "roles":
            yield from (_role(guild.id, role) for role in guild.roles.values())
        elif table == "channels":
            yield from map(_channel, guild.channels.values())
        elif table == "threads":
            yield from (_thread(thread) for thread in guild.threads.values() if is_shown(guild, thread))
        else:
            raise ValueError(f"unknown table {table!r}: choose from {', '.join(TABLES)}")


def is_shown(guild: Guild, thread: Thread) -> bool:
    """Return whether Discord shows a thread to the bot: in GUILD_CREATE, or in a listing of archived threads."""
    private = thread.type == ChannelType.PRIVATE_THREAD
    return guild.sees(thread.id) and (not thread.archived or guild.may_list_archived(thread.parent_id, private=private))


def _users(world: WorldState, guilds: Iterable[Guild], *, with_bot: bool) -> Iterable[User]:
    found: dict[int, User] = {world.bot.id: world.bot} if with_bot else {}
    for guild in guilds:
        for member in guild.members.values():
            found[member.user.id] = member.user
    return found.values()


def _user(user: User) -> Row:
    return {
        "id": user.id,
        "username": storable(user.username),
        "discriminator": user.discriminator,
        "global_name": storable(user.global_name),
        "avatar": user.avatar,
        "bot": user.bot,
        "system": user.system,
        "public_flags": user.public_flags,
    }


def _member(member: Member) -> Row:
    return {
        "guild_id": member.guild_id,
        "user_id": member.user.id,
        "nick": storable(member.nick),
        "avatar": member.avatar,
        "roles": sorted(member.roles),
        "joined_at": None if member.joined_at is None else to_datetime(member.joined_at),
        "premium_since": None if member.premium_since is None else to_datetime(member.premium_since),
        "timed_out_until": None if member.timed_out_until is None else to_datetime(member.timed_out_until),
        "pending": member.pending,
        "flags": member.flags,
    }


_ROLE_FIELDS = ["id", "color", "hoist", "icon", "position", "permissions", "managed", "mentionable", "flags"]


def _role(guild_id: int, role: Role) -> Row:
    row: Row = {"guild_id": guild_id, **{name: getattr(role, name) for name in _ROLE_FIELDS}}
    return row | {
        "name": storable(role.name),
        "unicode_emoji": storable(role.unicode_emoji),
        "tags": None if role.tags is None else json.loads(json.dumps(role.tags)),
    }


_CHANNEL_FIELDS = [
    "guild_id",
    "id",
    "type",
    "parent_id",
    "position",
    "nsfw",
    "slowmode",
    "bitrate",
    "user_limit",
    "rtc_region",
    "default_auto_archive_duration",
    "flags",
    "hidden",
]


def _channel(channel: Channel) -> Row:
    if channel.hidden:
        shown = {"guild_id": channel.guild_id, "id": channel.id, "type": channel.type, "position": channel.position}
        return {**shown, "hidden": True}
    row: Row = {name: getattr(channel, name) for name in _CHANNEL_FIELDS}
    return row | {
        "name": storable(channel.name),
        "topic": storable(channel.topic),
        "permission_overwrites": sorted((dict(o) for o in channel.permission_overwrites), key=lambda o: int(o["id"])),
    }


_THREAD_FIELDS = [
    "guild_id",
    "id",
    "type",
    "parent_id",
    "owner_id",
    "archived",
    "locked",
    "invitable",
    "auto_archive_duration",
    "slowmode",
    "flags",
]


def _thread(thread: Thread) -> Row:
    row: Row = {name: getattr(thread, name) for name in _THREAD_FIELDS}
    return row | {
        "name": storable(thread.name),
        "archived_at": to_datetime(thread.archive_timestamp) if thread.archived else None,
        "applied_tags": sorted(thread.applied_tags),
    }


_GUILD_TEXTS = ["name", "description", "preferred_locale", "vanity_url_code"]
_GUILD_FIELDS = [
    "id",
    "icon",
    "splash",
    "discovery_splash",
    "banner",
    "owner_id",
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
    "large",
    "max_members",
    "premium_tier",
    "premium_subscription_count",
]


def _guild(guild: Guild) -> Row:
    row: Row = {name: getattr(guild, name) for name in _GUILD_FIELDS}
    row |= {name: storable(getattr(guild, name)) for name in _GUILD_TEXTS}
    joined_at = to_datetime(guild.joined_at)
    return row | {"joined_at": joined_at, "unavailable": not guild.available, "features": sorted(guild.features)}

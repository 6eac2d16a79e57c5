"""Renders entities to the JSON that Discord sends, as dicts or, for members, as cached bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii as quoted

from .entities import (
    HIDDEN_NAME,
    OBFUSCATED_FLAG,
    VOICE_TYPES,
    Channel,
    ChannelType,
    Guild,
    Json,
    Member,
    Permission,
    Role,
    Thread,
    User,
)
from .ids import iso


def to_bytes(payload: object) -> bytes:
    """Encode a payload in ASCII, with NUL and lone surrogates as escapes, as Discord does."""
    return json.dumps(payload, separators=(",", ":")).encode("ascii")


def text_or_null(value: str | None) -> str:
    """Write a JSON string or null."""
    return "null" if value is None else quoted(value)


def user_json(user: User) -> str:
    """Render a user and cache the result; users on the gateway have no banner and accent colour."""
    rendered = user.rendered
    if rendered is None:
        extra = (',"bot":true' if user.bot else "") + (',"system":true' if user.system else "")
        rendered = user.rendered = (
            f'{{"id":"{user.id}","username":{quoted(user.username)},"discriminator":"{user.discriminator}",'
            f'"global_name":{text_or_null(user.global_name)},"avatar":{text_or_null(user.avatar)},'
            f'"avatar_decoration_data":null,"collectibles":null,"primary_guild":null,'
            f'"public_flags":{user.public_flags}{extra}}}'
        )
    return rendered


def _time(micros: int | None) -> str:
    return "null" if micros is None else f'"{iso(micros)}"'


def member_json(member: Member) -> bytes:
    """Render a guild member and cache the result until the member changes."""
    rendered = member.rendered
    if rendered is None:
        roles = '["' + '","'.join(map(str, member.roles)) + '"]' if member.roles else "[]"
        rendered = member.rendered = (
            f'{{"user":{user_json(member.user)},"nick":{text_or_null(member.nick)},'
            f'"avatar":{text_or_null(member.avatar)},"banner":null,"roles":{roles},'
            f'"joined_at":{_time(member.joined_at)},"premium_since":{_time(member.premium_since)},"deaf":false,'
            f'"mute":false,"pending":{"true" if member.pending else "false"},"flags":{member.flags},'
            f'"communication_disabled_until":{_time(member.timed_out_until)}}}'
        ).encode("ascii")
    return rendered


def members_json(members: Iterable[Member]) -> bytes:
    """Render members as the inside of a JSON array."""
    return b",".join([member.rendered or member_json(member) for member in members])


def user_payload(user: User) -> Json:
    """Render a user as a dict."""
    payload: Json = json.loads(user_json(user))
    return payload


def own_user_payload(user: User) -> Json:
    """Render the bot's own account, with flags and settings that other users do not have."""
    own = {"flags": user.public_flags, "mfa_enabled": True, "verified": True, "email": None, "locale": "en-US"}
    return {**user_payload(user), "bio": "", "premium_type": 0, "banner": None, "accent_color": None, **own}


def member_payload(member: Member) -> Json:
    """Render a guild member as a dict."""
    payload: Json = json.loads(member_json(member))
    return payload


def role_payload(role: Role) -> Json:
    """Render a role; a role without tags has no `tags` key at all."""
    payload: Json = {
        "id": str(role.id),
        "name": role.name,
        "description": None,
        "color": role.color,
        "colors": {"primary_color": role.color, "secondary_color": None, "tertiary_color": None},
        "hoist": role.hoist,
        "icon": role.icon,
        "unicode_emoji": role.unicode_emoji,
        "position": role.position,
        "permissions": str(role.permissions),
        "managed": role.managed,
        "mentionable": role.mentionable,
        "flags": role.flags,
    }
    if role.tags is not None:
        payload["tags"] = role.tags
    return payload


def channel_payload(channel: Channel) -> Json:
    """Render a guild channel; one that is hidden from the bot is obfuscated."""
    if channel.hidden:
        return _obfuscated(channel)
    payload: Json = {
        "id": str(channel.id),
        "guild_id": str(channel.guild_id),
        "type": channel.type,
        "name": channel.name,
        "position": channel.position,
        "parent_id": None if channel.parent_id is None else str(channel.parent_id),
        "permission_overwrites": channel.permission_overwrites,
        "nsfw": channel.nsfw,
        "rate_limit_per_user": channel.slowmode,
        "flags": channel.flags,
    }
    if channel.type == ChannelType.CATEGORY:
        return payload
    payload["last_message_id"] = None if channel.last_message_id is None else str(channel.last_message_id)
    if channel.type in VOICE_TYPES:
        voice = {"bitrate": channel.bitrate, "user_limit": channel.user_limit, "rtc_region": channel.rtc_region}
        return {**payload, **voice}
    payload["topic"] = channel.topic
    if channel.default_auto_archive_duration is not None:
        payload["default_auto_archive_duration"] = channel.default_auto_archive_duration
    if channel.type == ChannelType.FORUM:
        forum = {"available_tags": channel.available_tags, "default_reaction_emoji": None, "default_sort_order": None}
        payload |= {**forum, "default_forum_layout": 0, "template": ""}
    return payload


def _obfuscated(channel: Channel) -> Json:
    # https://docs.discord.com/developers/resources/channel#channel-object-obfuscated-channels
    deny = {"id": str(channel.guild_id), "type": 0, "allow": "0", "deny": str(int(Permission.VIEW_CHANNEL))}
    payload: Json = {
        "id": str(channel.id),
        "guild_id": str(channel.guild_id),
        "type": channel.type,
        "name": HIDDEN_NAME,
        "position": channel.position,
        "parent_id": None,
        "permission_overwrites": [deny],
        "nsfw": False,
        "rate_limit_per_user": 0,
        "flags": OBFUSCATED_FLAG,
        "topic": None,
        "last_message_id": None,
    }
    if channel.type in VOICE_TYPES:
        payload |= {"bitrate": 64_000, "user_limit": 0, "rtc_region": None}
    if channel.type == ChannelType.FORUM:
        payload |= {"available_tags": [], "default_reaction_emoji": None, "default_sort_order": None}
    return payload


def thread_payload(thread: Thread, bot_id: int) -> Json:
    """Render a thread, with the bot's membership if it has joined."""
    metadata: Json = {
        "archived": thread.archived,
        "archive_timestamp": iso(thread.archive_timestamp),
        "auto_archive_duration": thread.auto_archive_duration,
        "locked": thread.locked,
        "create_timestamp": iso(thread.create_timestamp),
    }
    if thread.invitable is not None:
        metadata["invitable"] = thread.invitable
    payload: Json = {
        "id": str(thread.id),
        "guild_id": str(thread.guild_id),
        "parent_id": str(thread.parent_id),
        "owner_id": str(thread.owner_id),
        "type": thread.type,
        "name": thread.name,
        "last_message_id": None if thread.last_message_id is None else str(thread.last_message_id),
        "message_count": thread.message_count,
        "total_message_sent": thread.message_count,
        "member_count": 1 + thread.joined,
        "rate_limit_per_user": thread.slowmode,
        "flags": thread.flags,
        "thread_metadata": metadata,
    }
    if thread.applied_tags:
        payload["applied_tags"] = [str(tag) for tag in thread.applied_tags]
    if thread.joined:
        payload["member"] = thread_member_payload(thread, bot_id)
    return payload


def thread_member_payload(thread: Thread, bot_id: int) -> Json:
    """Render the bot's membership of a thread."""
    joined = {"id": str(thread.id), "user_id": str(bot_id), "join_timestamp": iso(thread.create_timestamp)}
    return {**joined, "flags": 1}


_ID_FIELDS = [
    "owner_id",
    "afk_channel_id",
    "application_id",
    "system_channel_id",
    "rules_channel_id",
    "public_updates_channel_id",
]
_PLAIN_FIELDS = [
    "name",
    "icon",
    "splash",
    "discovery_splash",
    "banner",
    "description",
    "preferred_locale",
    "afk_timeout",
    "verification_level",
    "default_message_notifications",
    "explicit_content_filter",
    "mfa_level",
    "nsfw_level",
    "system_channel_flags",
    "max_members",
    "premium_tier",
    "premium_subscription_count",
    "vanity_url_code",
    "features",
]


def guild_payload(guild: Guild) -> Json:
    """Render a guild for GUILD_UPDATE and REST: settings and roles, without channels and members."""
    payload: Json = {"id": str(guild.id)}
    payload |= {name: getattr(guild, name) for name in _PLAIN_FIELDS}
    for name in _ID_FIELDS:
        value = getattr(guild, name)
        payload[name] = None if value is None else str(value)
    payload |= {"region": "deprecated", "max_presences": None, "max_video_channel_users": 25, "widget_enabled": False}
    payload |= {"widget_channel_id": None, "safety_alerts_channel_id": None, "premium_progress_bar_enabled": False}
    payload |= {"roles": [role_payload(role) for role in guild.roles.values()], "emojis": [], "stickers": []}
    return payload


def guild_create_payload(guild: Guild, bot_id: int, *, newly_joined: bool = False, all_members: bool = False) -> Json:
    """Render GUILD_CREATE, with only the bot and members in voice channels unless `all_members`.

    A newly joined guild has no `unavailable` key; for others it is false.
    """
    shown = guild.members.keys() if all_members else {bot_id, *guild.voice} & guild.members.keys()
    voice: Json = {"self_mute": False, "self_deaf": False, "mute": False, "deaf": False, "self_video": False}
    voice |= {"suppress": False, "request_to_speak_timestamp": None}
    payload = guild_payload(guild) | {
        "joined_at": iso(guild.joined_at),
        "large": guild.large,
        "member_count": len(guild.members),
        "members": [member_payload(guild.members[user_id]) for user_id in sorted(shown)],
        "channels": [_without_guild(channel_payload(channel)) for channel in guild.channels.values()],
        "threads": [
            thread_payload(thread, bot_id)
            for thread in guild.threads.values()
            if not thread.archived and guild.sees(thread.id)
        ],
        "voice_states": [
            {"user_id": str(user), "channel_id": str(channel), "session_id": f"{user:x}", **voice}
            for user, channel in guild.voice.items()
            if user in shown
        ],
        "presences": [],
        "stage_instances": [],
        "guild_scheduled_events": [],
        "soundboard_sounds": [],
    }
    if not newly_joined:
        payload["unavailable"] = False
    return payload


def _without_guild(payload: Json) -> Json:
    del payload["guild_id"]
    return payload

"""Converts a discord.py client's cache to the oracle's rows, for comparison."""

from __future__ import annotations

from typing import Any

import discord

Row = dict[str, Any]


def overwrites_of(channel: discord.abc.GuildChannel) -> list[tuple[int, int, int, int]]:
    """List a cached channel's overwrites as (id, type, allow, deny), by id."""
    return sorted((o.id, o.type, o.allow, o.deny) for o in channel._overwrites)


def member_rows(guild: discord.Guild) -> dict[int, Row]:
    """Read the cached members."""
    return {
        member.id: {
            "guild_id": guild.id,
            "user_id": member.id,
            "nick": member.nick,
            "avatar": member._avatar,
            "roles": sorted(role.id for role in member.roles if role.id != guild.id),
            "joined_at": member.joined_at,
            "premium_since": member.premium_since,
            "timed_out_until": member.timed_out_until,
            "pending": member.pending,
            "flags": member.flags.value,
        }
        for member in guild.members
    }


def user_rows(guild: discord.Guild) -> dict[int, Row]:
    """Read the cached users of a guild."""
    return {
        member.id: {
            "id": member.id,
            "username": member.name,
            "discriminator": member.discriminator,
            "global_name": member.global_name,
            "avatar": member._user._avatar,
            "bot": member.bot,
            "system": member.system,
            "public_flags": member.public_flags.value,
        }
        for member in guild.members
    }


def role_rows(guild: discord.Guild) -> dict[int, Row]:
    """Read the cached roles."""
    return {
        role.id: {
            "guild_id": guild.id,
            "id": role.id,
            "name": role.name,
            "color": role.color.value,
            "hoist": role.hoist,
            "icon": role._icon,
            "unicode_emoji": role.unicode_emoji,
            "position": role.position,
            "permissions": role.permissions.value,
            "managed": role.managed,
            "mentionable": role.mentionable,
            "flags": role.flags.value,
            "tags": tags_of(role),
        }
        for role in guild.roles
    }


def tags_of(role: discord.Role) -> Row | None:
    """Read a cached role's tags as Discord sends them."""
    if role.tags is None:
        return None
    tags: Row = {}
    if role.tags.bot_id is not None:
        tags["bot_id"] = str(role.tags.bot_id)
    if role.tags.is_premium_subscriber():
        tags["premium_subscriber"] = None
    return tags


def differences(guild: discord.Guild, expected: dict[str, dict[int, Row]]) -> list[str]:
    """Compare a guild's cache with the oracle's rows by table; returns what differs, in words."""
    found = []
    for table, cached in (("members", member_rows), ("users", user_rows), ("roles", role_rows)):
        rows, wanted = cached(guild), expected[table]
        found += [f"{table} {key} is missing" for key in wanted.keys() - rows.keys()]
        found += [f"{table} {key} is gone" for key in rows.keys() - wanted.keys()]
        found += [f"{table}: {rows[k]} is not {wanted[k]}" for k in wanted.keys() & rows.keys() if rows[k] != wanted[k]]
    return found + _channel_differences(guild, expected["channels"]) + _thread_differences(guild, expected["threads"])


def _channel_differences(guild: discord.Guild, wanted: dict[int, Row]) -> list[str]:
    found = [f"channel {channel.id} is gone" for channel in guild.channels if channel.id not in wanted]
    for key, row in wanted.items():
        channel = guild.get_channel(key)
        if channel is None:
            found.append(f"channel {key} is missing")
            continue
        cached: Row = {"type": channel.type.value, "position": channel.position}
        expected: Row = {"type": row["type"], "position": row["position"]}
        if row["hidden"]:
            expected["name"] = "___hidden___"
            cached["name"] = channel.name
        else:
            expected |= {"name": row["name"], "parent_id": row["parent_id"], "nsfw": row["nsfw"]}
            cached |= {"name": channel.name, "parent_id": channel.category_id, "nsfw": getattr(channel, "nsfw", None)}
            overwrites = row["permission_overwrites"]
            expected["overwrites"] = sorted(
                (int(o["id"]), o["type"], int(o["allow"]), int(o["deny"])) for o in overwrites
            )
            cached["overwrites"] = overwrites_of(channel)
            for ours, theirs in (("topic", "topic"), ("slowmode", "slowmode_delay"), ("bitrate", "bitrate")):
                if hasattr(channel, theirs):
                    expected[ours], cached[ours] = row[ours], getattr(channel, theirs)
        if cached != expected:
            found.append(f"channel {key}: {cached} is not {expected}")
    return found


def _thread_differences(guild: discord.Guild, wanted: dict[int, Row]) -> list[str]:
    found = []
    for key, row in wanted.items():
        if row["archived"]:
            continue
        thread = guild.get_thread(key)
        if thread is None:
            found.append(f"thread {key} is missing")
            continue
        cached: Row = {"name": thread.name, "parent_id": thread.parent_id, "owner_id": thread.owner_id}
        cached |= {"type": thread.type.value, "locked": thread.locked, "slowmode": thread.slowmode_delay}
        cached |= {"auto_archive_duration": thread.auto_archive_duration, "flags": thread.flags.value}
        cached |= {"archived": thread.archived, "applied_tags": sorted(thread._applied_tags)}
        if cached != {name: row[name] for name in cached}:
            found.append(f"thread {key}: {cached} is not {row}")
    return found

"""Malformed payloads that a gateway should never send."""

from __future__ import annotations

from typing import Any

from .entities import Guild

TOO_LARGE = str((1 << 63) + 7)


def malformed_events(guild: Guild) -> dict[str, bytes | dict[str, Any]]:
    """Build one malformed event of each kind about a guild. Nothing in the world changes."""
    gid = str(guild.id)
    user: dict[str, Any] = {"id": "77", "username": "broken", "discriminator": "0", "global_name": None, "avatar": None}
    member: dict[str, Any] = {
        "guild_id": gid,
        "roles": [],
        "joined_at": None,
        "flags": 0,
        "pending": False,
        "user": user,
    }
    role: dict[str, Any] = {"name": "broken", "color": 0, "position": 1, "permissions": "0", "flags": 0}
    anonymous = {key: value for key, value in user.items() if key != "id"}
    return {
        "invalid_json": b'{"t":"GUILD_MEMBER_UPDATE","s":null,"op":0,"d":{"guild_id":',
        "not_an_object": b'["neither","an","object"]',
        "null_data": {"t": "GUILD_MEMBER_UPDATE", "d": None},
        "missing_id": {"t": "GUILD_MEMBER_UPDATE", "d": member | {"user": anonymous}},
        "missing_guild_id": {"t": "GUILD_MEMBER_ADD", "d": {k: v for k, v in member.items() if k != "guild_id"}},
        "missing_role_id": {"t": "GUILD_ROLE_CREATE", "d": {"guild_id": gid, "role": role}},
        "missing_channel_id": {"t": "CHANNEL_CREATE", "d": {"guild_id": gid, "type": 0, "name": "broken"}},
        "wrong_type": {"t": "GUILD_MEMBER_UPDATE", "d": member | {"user": 5, "roles": "none"}},
        "wrong_time": {"t": "GUILD_MEMBER_ADD", "d": member | {"joined_at": "the day before yesterday"}},
        "huge_id": {"t": "GUILD_MEMBER_ADD", "d": member | {"user": user | {"id": TOO_LARGE}}},
        "huge_role_id": {"t": "GUILD_ROLE_CREATE", "d": {"guild_id": gid, "role": role | {"id": TOO_LARGE}}},
        "text_id": {"t": "GUILD_MEMBER_REMOVE", "d": {"guild_id": gid, "user": user | {"id": "not a number"}}},
        "unknown_event": {"t": "GUILD_SOMETHING_NEW", "d": {"guild_id": gid, "novelty": [1, {"deep": None}]}},
    }

"""Members and users built from rows: what discord.py computes from them, and that no cache gets to know them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import discord
import pytest

from utils.mirror.discord.people import build_member, build_user

GUILD, USER = 1 << 40, 7 << 40
NOW = datetime(2026, 5, 1, tzinfo=UTC)
MEMBER: dict[str, Any] = {
    "guild_id": GUILD, "user_id": USER, "nick": "Countess", "avatar": "b" * 32, "roles": [GUILD + 1, GUILD + 9],
    "joined_at": NOW, "premium_since": NOW, "timed_out_until": NOW, "pending": True, "flags": 1,
}  # fmt: skip
PERSON: dict[str, Any] = {
    "id": USER, "username": "ada", "discriminator": "0", "global_name": "Ada", "avatar": "a" * 32, "bot": True,
    "system": False, "public_flags": 64, "banner": None, "accent_color": 255,
}  # fmt: skip


@pytest.fixture
async def guild() -> discord.Guild:
    client = discord.Client(intents=discord.Intents(guilds=True))
    roles = [
        {"id": str(GUILD + number), "name": f"role {number}", "permissions": str(permissions), "position": number,
         "color": 0, "hoist": False, "managed": False, "mentionable": False, "flags": 0}
        for number, permissions in ((0, 1 << 10), (1, 1 << 13))
    ]  # fmt: skip
    payload: Any = {"id": str(GUILD), "name": "g", "roles": roles, "owner_id": "5"}
    return client._connection._add_guild_from_data(payload)


async def test_a_member_of_a_row_is_like_one_that_discord_sent(guild: discord.Guild) -> None:
    member = build_member(guild, MEMBER, PERSON)
    assert isinstance(member, discord.Member)
    assert [role.name for role in member.roles] == ["role 0", "role 1"]  # the deleted role is unknown
    assert member.guild_permissions.manage_messages
    assert not member.guild_permissions.administrator
    assert (member.display_name, member.global_name, member.name) == ("Countess", "Ada", "ada")
    assert "b" * 32 in member.display_avatar.url
    assert member.joined_at == member.premium_since == member.timed_out_until == NOW
    assert (member.pending, member.flags.did_rejoin, member.bot) == (True, True, True)
    assert (member.public_flags.hypesquad_bravery, member.mention) == (True, f"<@{USER}>")
    assert (member.guild, member.top_role.name, member.color) == (guild, "role 1", discord.Colour.default())
    assert member.is_timed_out() == (discord.utils.utcnow() < NOW)


async def test_an_incomplete_row_makes_a_member_too(guild: discord.Guild) -> None:
    member = build_member(guild, {"guild_id": GUILD, "user_id": USER}, None)
    assert (member.id, member.name, member.nick, member.joined_at) == (USER, str(USER), None, None)
    assert member.roles == [guild.default_role]


async def test_built_members_and_users_enter_no_cache_and_take_nothing_from_one(guild: discord.Guild) -> None:
    old: Any = {"id": USER, "username": "old", "discriminator": "0", "avatar": None}
    cached = guild._state.store_user(old)
    member = build_member(guild, MEMBER, PERSON)
    assert (member.name, cached.name, guild.get_member(USER)) == ("ada", "old", None)
    del cached
    other = build_user(guild._state, PERSON | {"id": 5})
    assert build_member(guild, MEMBER | {"user_id": 5}, other)._user is other
    assert guild._state.get_user(5) is None

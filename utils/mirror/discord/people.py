"""Builds `discord.Member` and `discord.User` from rows, outside discord.py's caches.

Written against discord.py 2.7.1; docs/explanation/architecture.md lists the private names used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import discord

if TYPE_CHECKING:
    from discord.state import ConnectionState

#: Values of a table's row by column.
Values = Mapping[str, Any]


def build_user(state: ConnectionState[Any], row: Values) -> discord.User:
    """Return the user of a row of `users`, with which the row's columns and discord.py's attributes agree."""
    return discord.User(state=state, data=_user_payload(row))


def build_member(guild: discord.Guild, row: Values, user: Values | discord.User | None) -> discord.Member:
    """Return the member of a row of `members`.

    `user` is the row of the member's user, or a `discord.User`; None if the database has no such row: the member is
    then named by their id. Neither object enters a cache, and later changes do not reach them.
    """
    state = guild._state
    if not isinstance(user, discord.User):
        user = build_user(state, user or {"id": row["user_id"]})
    data: Any = {
        "user": {"id": user.id, "username": user.name, "discriminator": user.discriminator, "avatar": None},
        "roles": row.get("roles") or (),
        "nick": row.get("nick"),
        "avatar": row.get("avatar"),
        "pending": row.get("pending") or False,
        "flags": row.get("flags") or 0,
    }
    member = discord.Member(data=data, guild=guild, state=state)
    # The constructor takes the user from the cache of users, which may be older than the row, or puts it there.
    member._user = user
    # The constructor would parse texts.
    member.joined_at = row.get("joined_at")
    member.premium_since = row.get("premium_since")
    member.timed_out_until = row.get("timed_out_until")
    return member


def _user_payload(row: Values) -> Any:
    return {
        "id": row["id"],
        "username": row.get("username") or str(row["id"]),
        "discriminator": row.get("discriminator") or "0",
        "global_name": row.get("global_name"),
        "avatar": row.get("avatar"),
        "banner": row.get("banner"),
        "accent_color": row.get("accent_color"),
        "bot": row.get("bot") or False,
        "system": row.get("system") or False,
        "public_flags": row.get("public_flags") or 0,
    }

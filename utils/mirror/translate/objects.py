"""Discord's raw payloads turned into rows: the one place that knows both. Nothing here does any I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import orjson

from utils.exceptions import ValidationError
from utils.mirror.records.rows import Row

Payload = dict[str, Any]

#: What is raised when a payload has not the shape that Discord's API reference gives it.
MISSHAPEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, ValidationError)

#: A channel that the bot may not view arrives with this flag (Discord change log, 2026-08-12).
HIDDEN_CHANNEL = 1 << 17

#: Columns of a listing's rows, in the order in which `utils.mirror.translate.pages` builds them.
LISTED_USER = ("username", "discriminator", "global_name", "avatar", "bot", "system", "public_flags")
LISTED_MEMBER = (
    "nick",
    "avatar",
    "roles",
    "joined_at",
    "premium_since",
    "timed_out_until",
    "pending",
    "flags",
    "left_at",
)


def id_of(member: Any) -> int | None:
    """Return a member's user id; None when it cannot be read."""
    try:
        return int(member["user"]["id"])
    except MISSHAPEN:
        return None


def same(value: Any) -> Any:
    """Return the value as it came."""
    return value


def snowflake(value: Any) -> int | None:
    """Return an id as a number; ids come as strings."""
    return None if value is None else int(value)


def moment(value: Any) -> datetime | None:
    """Return a timestamp; Discord writes ISO 8601 with an offset."""
    return None if value is None else datetime.fromisoformat(value)


def truth(value: Any) -> bool:
    """Return a flag that Discord leaves out when it is false."""
    return bool(value)


def snowflakes(value: Any) -> list[int]:
    """Return a sorted list of ids; Discord sends them in any order."""
    return sorted(map(int, value or ()))


def words(value: Any) -> list[str]:
    """Return a sorted list of words; Discord sends them in any order."""
    return sorted(value or ())


def tags(value: Any) -> str | None:
    """Return a role's tags as JSON text."""
    return None if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def overwrites(value: Any) -> str | None:
    """Return permission overwrites as JSON text, sorted by id: Discord sends them in any order."""
    if value is None:
        return None
    return orjson.dumps(sorted(value, key=lambda item: int(item["id"])), option=orjson.OPT_SORT_KEYS).decode()


Reading = tuple[str, str, Callable[[Any], Any]]


def _plain(*names: str) -> tuple[Reading, ...]:
    return tuple((name, name, same) for name in names)


#: (field in the payload, column, how it is read). A field that is absent says nothing, null says None.
_USER: tuple[Reading, ...] = (
    *_plain("username", "discriminator", "global_name", "avatar", "public_flags"),
    ("bot", "bot", truth),
    ("system", "system", truth),
)
#: Only GET /users sends the first two; the rest Discord shows of the bot's own account alone.
_OWN_USER: tuple[Reading, ...] = (
    *_USER,
    *_plain("banner", "accent_color", "flags", "locale", "mfa_enabled", "verified", "premium_type"),
)
_MEMBER: tuple[Reading, ...] = (
    *_plain("nick", "avatar", "pending", "flags"),
    ("roles", "roles", snowflakes),
    ("joined_at", "joined_at", moment),
    ("premium_since", "premium_since", moment),
    ("communication_disabled_until", "timed_out_until", moment),
)
_NEW_MEMBER: dict[str, Any] = {column: None for _, column, _ in _MEMBER} | {"roles": []}
_GUILD: tuple[Reading, ...] = (
    *_plain(
        "name", "icon", "splash", "discovery_splash", "banner", "description", "preferred_locale", "afk_timeout",
        "verification_level", "default_message_notifications", "explicit_content_filter", "mfa_level", "nsfw_level",
        "system_channel_flags", "large", "member_count", "max_members", "premium_tier",
        "premium_subscription_count", "vanity_url_code",
    ),
    *(
        (name, name, snowflake)
        for name in (
            "owner_id", "afk_channel_id", "application_id", "system_channel_id", "rules_channel_id",
            "public_updates_channel_id",
        )
    ),
    ("joined_at", "joined_at", moment),
    ("features", "features", words),
)  # fmt: skip
_ROLE: tuple[Reading, ...] = (
    *_plain("name", "color", "hoist", "icon", "unicode_emoji", "position", "managed", "mentionable", "flags"),
    ("permissions", "permissions", snowflake),
    ("tags", "tags", tags),
)
_CHANNEL: tuple[Reading, ...] = (
    *_plain(
        "name", "type", "position", "topic", "nsfw", "bitrate", "user_limit", "rtc_region",
        "default_auto_archive_duration", "flags",
    ),
    ("parent_id", "parent_id", snowflake),
    ("rate_limit_per_user", "slowmode", same),
    ("permission_overwrites", "permission_overwrites", overwrites),
)  # fmt: skip
_THREAD: tuple[Reading, ...] = (
    *_plain("name", "type", "flags"),
    ("parent_id", "parent_id", snowflake),
    ("owner_id", "owner_id", snowflake),
    ("rate_limit_per_user", "slowmode", same),
    ("applied_tags", "applied_tags", snowflakes),
)
_THREAD_STATE = _plain("archived", "locked", "invitable", "auto_archive_duration")


def _read(payload: Payload, readings: Iterable[Reading]) -> dict[str, Any]:
    return {column: read(payload[name]) for name, column, read in readings if name in payload}


def user(payload: Payload, *, own: bool = False) -> Row:
    """Return the row of a user; `own` for the bot's account, of which Discord shows more."""
    values = _read(payload, _OWN_USER if own else _USER)
    if "username" in payload:  # a full user: flags that are false were left out
        values.setdefault("bot", False)
        values.setdefault("system", False)
    return Row("users", (int(payload["id"]),), values, appears="username" in payload)


def member(guild_id: int, payload: Payload, *, joins: bool = False) -> list[Row]:
    """Return the rows of a member and their user.

    What is absent from a join is None; absent from an update it means unchanged, and such an update makes no new row.
    """
    values = _read(payload, _MEMBER)
    if joins:
        values = _NEW_MEMBER | values
    values["left_at"] = None
    whole = len(values) > len(_MEMBER)
    return [user(payload["user"]), Row("members", (guild_id, int(payload["user"]["id"])), values, appears=whole)]


def member_left(guild_id: int, payload: Payload, at: datetime) -> list[Row]:
    """Return the rows of a leave: the membership ends, the user goes on."""
    key = (guild_id, int(payload["user"]["id"]))
    return [user(payload["user"]), Row("members", key, {"left_at": at}, appears=False)]


def guild(payload: Payload, *, whole: bool = True) -> Row:
    """Return the row of a guild that is there; GUILD_UPDATE is not the whole of it and makes no new row."""
    values = _read(payload, _GUILD)
    values |= {"unavailable": bool(payload.get("unavailable")), "left_at": None}
    return Row("guilds", (int(payload["id"]),), values, appears=whole)


def role(guild_id: int, payload: Payload) -> Row:
    """Return the row of a role; tags are absent when there are none."""
    values = {"tags": None} | _read(payload, _ROLE)
    values["deleted_at"] = None
    return Row("roles", (guild_id, int(payload["id"])), values)


def channel(guild_id: int, payload: Payload) -> Row:
    """Return the row of a channel; of a hidden one only that it is there, so that stored fields stay."""
    key = (guild_id, int(payload["id"]))
    if payload.get("flags", 0) & HIDDEN_CHANNEL:
        values = {name: payload[name] for name in ("type", "position") if name in payload}
        return Row("channels", key, values | {"hidden": True, "deleted_at": None})
    return Row("channels", key, _read(payload, _CHANNEL) | {"hidden": False, "deleted_at": None})


def thread(guild_id: int, payload: Payload) -> Row:
    """Return the row of a thread, active or archived."""
    values: dict[str, Any] = {"applied_tags": []} | _read(payload, _THREAD)
    state = payload.get("thread_metadata")
    if state is not None:
        values |= _read(state, _THREAD_STATE)
        values["archived_at"] = moment(state["archive_timestamp"]) if state.get("archived") else None
    return Row("threads", (guild_id, int(payload["id"])), values | {"deleted_at": None})


def removed(table: str, key: tuple[int, ...], column: str, at: datetime) -> Row:
    """Return the row of what was deleted."""
    return Row(table, key, {column: at}, appears=False)

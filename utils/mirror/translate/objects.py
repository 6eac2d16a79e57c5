"""Translates the objects in Discord's payloads (users, members, guilds, roles, channels, threads) into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import orjson

from utils.exceptions import ValidationError
from utils.mirror.records.rows import Row

Payload = dict[str, Any]

#: Exceptions that parsing a payload raises if it differs from Discord's API reference.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, ValidationError)

#: Flag of a channel that the bot may not view (Discord change log, 2026-08-12).
HIDDEN_CHANNEL = 1 << 17

#: Columns of a listing's records, in the order in which `utils.mirror.translate.pages` builds them.
LISTED_USER_COLUMNS = ("username", "discriminator", "global_name", "avatar", "bot", "system", "public_flags")
LISTED_MEMBER_COLUMNS = (
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


def user_id_of(member: Any) -> int | None:
    """Return a member's user id; None if it cannot be read."""
    try:
        return int(member["user"]["id"])
    except MALFORMED:
        return None


# --- converters: from a field's value to the column's


def as_is(value: Any) -> Any:
    """Return the value unchanged."""
    return value


def to_snowflake(value: Any) -> int | None:
    """Convert an id, which Discord sends as a string."""
    return None if value is None else int(value)


def to_timestamp(value: Any) -> datetime | None:
    """Convert a timestamp, which Discord sends as ISO 8601 with an offset."""
    return None if value is None else datetime.fromisoformat(value)


def to_bool(value: Any) -> bool:
    """Convert a flag that Discord may leave out or null when it is false."""
    return bool(value)


def to_snowflakes(value: Any) -> list[int]:
    """Convert a list of ids and sort it: Discord's order varies."""
    return sorted(map(int, value or ()))


def to_strings(value: Any) -> list[str]:
    """Sort a list of strings: Discord's order varies."""
    return sorted(value or ())


def to_tags(value: Any) -> str | None:
    """Convert a role's tags to JSON text."""
    return None if value is None else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def to_overwrites(value: Any) -> str | None:
    """Convert permission overwrites to JSON text, sorted by id: Discord's order varies."""
    if value is None:
        return None
    return orjson.dumps(sorted(value, key=lambda item: int(item["id"])), option=orjson.OPT_SORT_KEYS).decode()


# --- fields of each object

#: (field of the payload, column, converter). An absent field is left out of the row; null becomes None.
Field = tuple[str, str, Callable[[Any], Any]]


def _same_name(*names: str) -> tuple[Field, ...]:
    return tuple((name, name, as_is) for name in names)


_USER: tuple[Field, ...] = (
    *_same_name("username", "discriminator", "global_name", "avatar", "public_flags"),
    ("bot", "bot", to_bool),
    ("system", "system", to_bool),
)
#: banner and accent_color are sent by GET /users only; Discord shows the others for the bot's own account only.
_OWN_USER: tuple[Field, ...] = (
    *_USER,
    *_same_name("banner", "accent_color", "flags", "locale", "mfa_enabled", "verified", "premium_type"),
)
_MEMBER: tuple[Field, ...] = (
    *_same_name("nick", "avatar", "pending", "flags"),
    ("roles", "roles", to_snowflakes),
    ("joined_at", "joined_at", to_timestamp),
    ("premium_since", "premium_since", to_timestamp),
    ("communication_disabled_until", "timed_out_until", to_timestamp),
)
_NEW_MEMBER: dict[str, Any] = {column: None for _, column, _ in _MEMBER} | {"roles": []}
_GUILD: tuple[Field, ...] = (
    *_same_name(
        "name", "icon", "splash", "discovery_splash", "banner", "description", "preferred_locale", "afk_timeout",
        "verification_level", "default_message_notifications", "explicit_content_filter", "mfa_level", "nsfw_level",
        "system_channel_flags", "large", "member_count", "max_members", "premium_tier",
        "premium_subscription_count", "vanity_url_code",
    ),
    *(
        (name, name, to_snowflake)
        for name in (
            "owner_id", "afk_channel_id", "application_id", "system_channel_id", "rules_channel_id",
            "public_updates_channel_id",
        )
    ),
    ("joined_at", "joined_at", to_timestamp),
    ("features", "features", to_strings),
)  # fmt: skip
_ROLE: tuple[Field, ...] = (
    *_same_name("name", "color", "hoist", "icon", "unicode_emoji", "position", "managed", "mentionable", "flags"),
    ("permissions", "permissions", to_snowflake),
    ("tags", "tags", to_tags),
)
_CHANNEL: tuple[Field, ...] = (
    *_same_name(
        "name", "type", "position", "topic", "nsfw", "bitrate", "user_limit", "rtc_region",
        "default_auto_archive_duration", "flags",
    ),
    ("parent_id", "parent_id", to_snowflake),
    ("rate_limit_per_user", "slowmode", as_is),
    ("permission_overwrites", "permission_overwrites", to_overwrites),
)  # fmt: skip
_THREAD: tuple[Field, ...] = (
    *_same_name("name", "type", "flags"),
    ("parent_id", "parent_id", to_snowflake),
    ("owner_id", "owner_id", to_snowflake),
    ("rate_limit_per_user", "slowmode", as_is),
    ("applied_tags", "applied_tags", to_snowflakes),
)
_THREAD_METADATA = _same_name("archived", "locked", "invitable", "auto_archive_duration")


def _read(payload: Payload, fields: Iterable[Field]) -> dict[str, Any]:
    return {column: convert(payload[name]) for name, column, convert in fields if name in payload}


# --- rows


def user(payload: Payload, *, own: bool = False) -> Row:
    """Return the row of a user; `own` for the bot's account, for which Discord sends more fields."""
    values = _read(payload, _OWN_USER if own else _USER)
    if "username" in payload:  # a full user: Discord leaves out flags that are false
        values.setdefault("bot", False)
        values.setdefault("system", False)
    return Row("users", (int(payload["id"]),), values, may_insert="username" in payload)


def member(guild_id: int, payload: Payload, *, is_join: bool = False) -> list[Row]:
    """Return the rows of a member and their user.

    A field absent from a join is None; a field absent from an update is unchanged, and such an update inserts no row.
    """
    values = _read(payload, _MEMBER)
    if is_join:
        values = _NEW_MEMBER | values
    is_complete = all(column in values for _, column, _ in _MEMBER)
    values["left_at"] = None
    return [user(payload["user"]), Row("members", (guild_id, int(payload["user"]["id"])), values, is_complete)]


def member_left(guild_id: int, payload: Payload, at: datetime) -> list[Row]:
    """Return the rows of a leave: the member is tombstoned, the user is not."""
    key = (guild_id, int(payload["user"]["id"]))
    return [user(payload["user"]), tombstone("members", key, "left_at", at)]


def guild(payload: Payload, *, is_complete: bool = True) -> Row:
    """Return the row of a guild that the bot is in; GUILD_UPDATE is not complete and inserts no row."""
    values = _read(payload, _GUILD)
    values |= {"unavailable": bool(payload.get("unavailable")), "left_at": None}
    return Row("guilds", (int(payload["id"]),), values, may_insert=is_complete)


def role(guild_id: int, payload: Payload) -> Row:
    """Return the row of a role; Discord leaves out tags if there are none."""
    values = {"tags": None} | _read(payload, _ROLE)
    values["deleted_at"] = None
    return Row("roles", (guild_id, int(payload["id"])), values)


def channel(guild_id: int, payload: Payload) -> Row:
    """Return the row of a channel; for a hidden one only what Discord shows truthfully, so that other columns stay."""
    key = (guild_id, int(payload["id"]))
    if payload.get("flags", 0) & HIDDEN_CHANNEL:
        values = {name: payload[name] for name in ("type", "position") if name in payload}
        return Row("channels", key, values | {"hidden": True, "deleted_at": None})
    return Row("channels", key, _read(payload, _CHANNEL) | {"hidden": False, "deleted_at": None})


def thread(guild_id: int, payload: Payload) -> Row:
    """Return the row of a thread, active or archived."""
    values: dict[str, Any] = {"applied_tags": []} | _read(payload, _THREAD)
    metadata = payload.get("thread_metadata")
    if metadata is not None:
        values |= _read(metadata, _THREAD_METADATA)
        values["archived_at"] = to_timestamp(metadata["archive_timestamp"]) if metadata.get("archived") else None
    return Row("threads", (guild_id, int(payload["id"])), values | {"deleted_at": None})


def tombstone(table: str, key: tuple[int, ...], column: str, at: datetime) -> Row:
    """Return the row that marks something as removed."""
    return Row(table, key, {column: at}, may_insert=False)

"""Parsers for dispatches, by name: rows to write, memberships to record, messages to count."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from utils.exceptions import ValidationError
from utils.mirror.records.events import Membership, Message
from utils.mirror.records.rows import Row
from utils.mirror.translate import objects
from utils.mirror.translate.objects import Payload, to_timestamp

#: The largest id that a bigint can hold.
_MAX_ID = 2**63 - 1
#: Types of messages that somebody wrote: default, reply, the two command types, and thread starters (Discord API
#: reference, "Message Types"). All others are system messages.
WRITTEN_TYPES = frozenset({0, 19, 20, 21, 23})
#: Builds a named tuple at half the cost of calling its class, which matters because it runs for every message.
_new = tuple.__new__


def parse_message(payload: Payload, stamp: int) -> Message | None:
    """Return the message to count; None for a direct message, a webhook's, and a system message."""
    guild_id = payload.get("guild_id")
    if guild_id is None or "webhook_id" in payload or payload.get("type", 0) not in WRITTEN_TYPES:
        return None
    guild, author, id = int(guild_id), int(payload["author"]["id"]), int(payload["id"])
    if not (0 < guild <= _MAX_ID and 0 < author <= _MAX_ID and 0 < id <= _MAX_ID):
        raise ValidationError(f"message {payload['id']!r:.40}: its ids must be between 1 and 2^63 - 1")
    return _new(Message, (stamp, guild, author, id))


def _user_update(payload: Payload, at: datetime) -> list[Row]:
    return [objects.user(payload, own=True)]


def _guild_update(payload: Payload, at: datetime) -> list[Row]:
    return [objects.guild(payload, is_complete=False)]


def _guild_delete(payload: Payload, at: datetime) -> list[Row]:
    key = (int(payload["id"]),)
    if payload.get("unavailable"):  # an outage of Discord's: the bot is still in the guild
        return [Row("guilds", key, {"unavailable": True}, may_insert=False)]
    return [Row("guilds", key, {"left_at": at, "unavailable": False}, may_insert=False)]


def _member_add(payload: Payload, at: datetime) -> list[Row]:
    return objects.member(int(payload["guild_id"]), payload, is_join=True)


def _member_update(payload: Payload, at: datetime) -> list[Row]:
    return objects.member(int(payload["guild_id"]), payload)


def _member_remove(payload: Payload, at: datetime) -> list[Row]:
    return objects.member_left(int(payload["guild_id"]), payload, at)


def _created(parse: Callable[[Payload, datetime], list[Row]]) -> Callable[[Payload, datetime], list[Row]]:
    """Return a parser of dispatches that say that an object was created."""
    return lambda payload, at: [row._replace(is_created=True) for row in parse(payload, at)]


def _role(payload: Payload, at: datetime) -> list[Row]:
    return [objects.role(int(payload["guild_id"]), payload["role"])]


def _role_delete(payload: Payload, at: datetime) -> list[Row]:
    return [objects.tombstone("roles", (int(payload["guild_id"]), int(payload["role_id"])), "deleted_at", at)]


def _channel(payload: Payload, at: datetime) -> list[Row]:
    return [objects.channel(int(payload["guild_id"]), payload)] if payload.get("guild_id") else []


def _channel_delete(payload: Payload, at: datetime) -> list[Row]:
    if not payload.get("guild_id"):
        return []
    return [objects.tombstone("channels", (int(payload["guild_id"]), int(payload["id"])), "deleted_at", at)]


def _thread(payload: Payload, at: datetime) -> list[Row]:
    return [objects.thread(int(payload["guild_id"]), payload)]


def _thread_create(payload: Payload, at: datetime) -> list[Row]:
    # Discord also sends it to somebody who is added to a private thread.
    return [row._replace(is_created=payload.get("newly_created") is True) for row in _thread(payload, at)]


def _thread_delete(payload: Payload, at: datetime) -> list[Row]:
    return [objects.tombstone("threads", (int(payload["guild_id"]), int(payload["id"])), "deleted_at", at)]


def _thread_list(payload: Payload, at: datetime) -> list[Row]:
    guild_id = int(payload["guild_id"])
    return [objects.thread(guild_id, thread) for thread in payload["threads"]]


#: Dispatches that change rows. READY, GUILD_CREATE and the answers to the mirror's own requests are parsed elsewhere.
ROW_PARSERS: dict[str, Callable[[Payload, datetime], list[Row]]] = {
    "USER_UPDATE": _user_update,
    "GUILD_UPDATE": _guild_update,
    "GUILD_DELETE": _guild_delete,
    "GUILD_MEMBER_ADD": _member_add,
    "GUILD_MEMBER_UPDATE": _member_update,
    "GUILD_MEMBER_REMOVE": _member_remove,
    "GUILD_ROLE_CREATE": _created(_role),
    "GUILD_ROLE_UPDATE": _role,
    "GUILD_ROLE_DELETE": _role_delete,
    "CHANNEL_CREATE": _created(_channel),
    "CHANNEL_UPDATE": _channel,
    "CHANNEL_DELETE": _channel_delete,
    "THREAD_CREATE": _thread_create,
    "THREAD_UPDATE": _thread,
    "THREAD_DELETE": _thread_delete,
    "THREAD_LIST_SYNC": _thread_list,
}


def _membership_parser(kind: str) -> Callable[[Payload, int, datetime], Membership]:
    def parse(payload: Payload, stamp: int, now: datetime) -> Membership:
        joined_at = to_timestamp(payload.get("joined_at")) if kind == "join" else None
        guild_id, user_id = _valid_id(payload["guild_id"]), _valid_id(payload["user"]["id"])
        return Membership(stamp, guild_id, user_id, kind, joined_at or now, now)

    return parse


def _valid_id(value: Any) -> int:
    number = int(value)
    if not 0 < number <= _MAX_ID:
        raise ValidationError(f"{value!r:.40} is not a valid id: it must be between 1 and 2^63 - 1")
    return number


#: Dispatches that are recorded as events in `member_events`.
MEMBERSHIP_PARSERS: dict[str, Callable[[Payload, int, datetime], Membership]] = {
    "GUILD_MEMBER_ADD": _membership_parser("join"),
    "GUILD_MEMBER_REMOVE": _membership_parser("leave"),
    "GUILD_BAN_ADD": _membership_parser("ban"),
    "GUILD_BAN_REMOVE": _membership_parser("unban"),
}

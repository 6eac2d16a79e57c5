"""Live gateway events turned into rows, by the event's name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from utils.mirror.records.rows import Row
from utils.mirror.translate import objects
from utils.mirror.translate.objects import Payload


def _user_update(payload: Payload, at: datetime) -> list[Row]:
    return [objects.user(payload, own=True)]


def _guild_update(payload: Payload, at: datetime) -> list[Row]:
    return [objects.guild(payload, whole=False)]


def _guild_delete(payload: Payload, at: datetime) -> list[Row]:
    key = (int(payload["id"]),)
    if payload.get("unavailable"):  # an outage of Discord's: nobody left
        return [Row("guilds", key, {"unavailable": True}, appears=False)]
    return [Row("guilds", key, {"left_at": at, "unavailable": False}, appears=False)]


def _member_add(payload: Payload, at: datetime) -> list[Row]:
    return objects.member(int(payload["guild_id"]), payload, joins=True)


def _member_update(payload: Payload, at: datetime) -> list[Row]:
    return objects.member(int(payload["guild_id"]), payload)


def _member_remove(payload: Payload, at: datetime) -> list[Row]:
    return objects.member_left(int(payload["guild_id"]), payload, at)


def _role(payload: Payload, at: datetime) -> list[Row]:
    return [objects.role(int(payload["guild_id"]), payload["role"])]


def _role_delete(payload: Payload, at: datetime) -> list[Row]:
    return [objects.removed("roles", (int(payload["guild_id"]), int(payload["role_id"])), "deleted_at", at)]


def _channel(payload: Payload, at: datetime) -> list[Row]:
    return [objects.channel(int(payload["guild_id"]), payload)] if payload.get("guild_id") else []


def _channel_delete(payload: Payload, at: datetime) -> list[Row]:
    if not payload.get("guild_id"):
        return []
    return [objects.removed("channels", (int(payload["guild_id"]), int(payload["id"])), "deleted_at", at)]


def _thread(payload: Payload, at: datetime) -> list[Row]:
    return [objects.thread(int(payload["guild_id"]), payload)]


def _thread_delete(payload: Payload, at: datetime) -> list[Row]:
    return [objects.removed("threads", (int(payload["guild_id"]), int(payload["id"])), "deleted_at", at)]


def _thread_list(payload: Payload, at: datetime) -> list[Row]:
    guild_id = int(payload["guild_id"])
    return [objects.thread(guild_id, thread) for thread in payload["threads"]]


#: What the mirror takes from the gateway, beside READY, GUILD_CREATE and the answers to its own requests.
EVENTS: dict[str, Callable[[Payload, datetime], list[Row]]] = {
    "USER_UPDATE": _user_update,
    "GUILD_UPDATE": _guild_update,
    "GUILD_DELETE": _guild_delete,
    "GUILD_MEMBER_ADD": _member_add,
    "GUILD_MEMBER_UPDATE": _member_update,
    "GUILD_MEMBER_REMOVE": _member_remove,
    "GUILD_ROLE_CREATE": _role,
    "GUILD_ROLE_UPDATE": _role,
    "GUILD_ROLE_DELETE": _role_delete,
    "CHANNEL_CREATE": _channel,
    "CHANNEL_UPDATE": _channel,
    "CHANNEL_DELETE": _channel_delete,
    "THREAD_CREATE": _thread,
    "THREAD_UPDATE": _thread,
    "THREAD_DELETE": _thread_delete,
    "THREAD_LIST_SYNC": _thread_list,
}

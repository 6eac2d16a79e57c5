"""Joins, leaves, bans and messages to be counted, translated from gateway payloads."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from utils.exceptions import ValidationError
from utils.mirror.records.events import Membership, Message
from utils.mirror.translate.objects import Payload, moment

#: Half the cost of calling the class, which matters because it runs for every message.
_make = tuple.__new__
#: The largest id that a bigint can hold.
_LARGEST = 2**63 - 1


def _id(value: Any) -> int:
    number = int(value)
    if not 0 < number <= _LARGEST:
        raise ValidationError(f"{value!r} is no id of Discord's")
    return number


def message(payload: Payload, stamp: int) -> Message | None:
    """Return the message to be counted; None for direct messages and webhooks, whose authors are no members."""
    guild_id = payload.get("guild_id")
    if guild_id is None or "webhook_id" in payload:
        return None
    guild, author, id = int(guild_id), int(payload["author"]["id"]), int(payload["id"])
    if not (0 < guild <= _LARGEST and 0 < author <= _LARGEST and 0 < id <= _LARGEST):
        raise ValidationError(f"message {payload['id']!r:.40}: an id of Discord's is positive and below 2^63")
    return _make(Message, (stamp, guild, author, id))


def _membership(kind: str) -> Callable[[Payload, int, datetime], Membership]:
    def read(payload: Payload, stamp: int, now: datetime) -> Membership:
        joined = moment(payload.get("joined_at")) if kind == "join" else None
        return Membership(stamp, _id(payload["guild_id"]), _id(payload["user"]["id"]), kind, joined or now, now)

    return read


#: Gateway events that say who came and went.
MEMBERSHIPS: dict[str, Callable[[Payload, int, datetime], Membership]] = {
    "GUILD_MEMBER_ADD": _membership("join"),
    "GUILD_MEMBER_REMOVE": _membership("leave"),
    "GUILD_BAN_ADD": _membership("ban"),
    "GUILD_BAN_REMOVE": _membership("unban"),
}

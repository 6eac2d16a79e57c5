"""Parses pages of member listings: the hot path for 100,000 members, so it builds records without `Row` objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from utils.exceptions import ValidationError
from utils.mirror.records.validation import all_valid, filter_valid
from utils.mirror.translate.objects import (
    LISTED_MEMBER_COLUMNS,
    LISTED_USER_COLUMNS,
    MALFORMED,
    Payload,
    user_id_of,
)

Record = tuple[Any, ...]


@dataclass(slots=True)
class Page:
    """One page of a listing, as records ready to be written; `unreadable` members are in neither list."""

    users: list[Record] = field(default_factory=list)
    members: list[Record] = field(default_factory=list)
    #: Members in the payload, unreadable ones included.
    seen: int = 0
    #: User ids of malformed members; None stands for a member whose id is malformed too.
    unreadable: list[int | None] = field(default_factory=list)


def read_page(
    guild_id: int, payloads: list[Payload], stamp: int, on_malformed: Callable[[ValidationError], None]
) -> Page:
    """Translate one page into records; `on_malformed` is called for each member that cannot be read."""
    page = Page(seen=len(payloads))
    try:
        page.users, page.members = _records(guild_id, payloads, stamp)
    except MALFORMED:
        _read_one_by_one(page, guild_id, payloads, stamp, on_malformed)
    is_valid = all_valid("users", LISTED_USER_COLUMNS, page.users)
    if not is_valid or not all_valid("members", LISTED_MEMBER_COLUMNS, page.members):
        _drop_invalid(page, on_malformed)
    return page


def _records(guild_id: int, payloads: list[Payload], stamp: int) -> tuple[list[Record], list[Record]]:
    users: list[Record] = []
    members: list[Record] = []
    parse = datetime.fromisoformat
    for payload in payloads:
        user = payload["user"]
        user_id = int(user["id"])
        of_user, of_member = user.get, payload.get
        users.append(
            (
                user_id,
                user["username"],
                of_user("discriminator"),
                of_user("global_name"),
                of_user("avatar"),
                of_user("bot", False),
                of_user("system", False),
                of_user("public_flags"),
                stamp,
            )
        )
        roles = payload["roles"]
        joined_at = payload["joined_at"]
        premium_since = of_member("premium_since")
        timed_out_until = of_member("communication_disabled_until")
        members.append(
            (
                guild_id,
                user_id,
                of_member("nick"),
                of_member("avatar"),
                sorted(map(int, roles)) if roles else [],
                parse(joined_at) if joined_at is not None else None,
                parse(premium_since) if premium_since is not None else None,
                parse(timed_out_until) if timed_out_until is not None else None,
                of_member("pending"),
                of_member("flags"),
                None,
                stamp,
            )
        )
    return users, members


def _read_one_by_one(
    page: Page, guild_id: int, payloads: list[Payload], stamp: int, on_malformed: Callable[[ValidationError], None]
) -> None:
    page.users, page.members = [], []
    for payload in payloads:
        try:
            users, members = _records(guild_id, [payload], stamp)
        except MALFORMED as error:
            page.unreadable.append(user_id_of(payload))
            on_malformed(ValidationError(f"malformed member in a listing: {type(error).__name__}: {error}"))
        else:
            page.users += users
            page.members += members


def _drop_invalid(page: Page, on_malformed: Callable[[ValidationError], None]) -> None:
    """Remove every member whose own or whose user's record cannot be stored."""
    invalid: set[int] = set()

    def collect(id_position: int) -> Callable[[Record, ValidationError], None]:
        def on_invalid(record: Record, error: ValidationError) -> None:
            invalid.add(record[id_position])
            on_malformed(error)

        return on_invalid

    filter_valid("users", LISTED_USER_COLUMNS, page.users, collect(0))
    filter_valid("members", LISTED_MEMBER_COLUMNS, page.members, collect(1))
    page.users = [record for record in page.users if record[0] not in invalid]
    page.members = [record for record in page.members if record[1] not in invalid]
    page.unreadable += sorted(invalid)

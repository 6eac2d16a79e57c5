"""Pages of member listings turned into records: the path that 100,000 members take, kept free of anything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from utils.exceptions import ValidationError
from utils.mirror.records.validation import fits, sifted
from utils.mirror.translate.objects import LISTED_MEMBER, LISTED_USER, MISSHAPEN, Payload, id_of

Record = tuple[Any, ...]


@dataclass(slots=True)
class Page:
    """One page of a listing, as records ready to be written; `unreadable` members are in neither list."""

    users: list[Record] = field(default_factory=list)
    members: list[Record] = field(default_factory=list)
    seen: int = 0
    #: Ids of members whose payload could not be understood; None among them: not even the id could be read.
    unreadable: list[int | None] = field(default_factory=list)


def read_page(guild_id: int, payloads: list[Payload], stamp: int, refuse: Callable[[ValidationError], None]) -> Page:
    """Turn one page into records; `refuse` is told of every member that cannot be read."""
    page = Page(seen=len(payloads))
    try:
        page.users, page.members = _records(guild_id, payloads, stamp)
    except MISSHAPEN:
        _read_one_by_one(page, guild_id, payloads, stamp, refuse)
    if not (fits("users", LISTED_USER, page.users) and fits("members", LISTED_MEMBER, page.members)):
        _sift(page, refuse)
    return page


def _records(guild_id: int, payloads: list[Payload], stamp: int) -> tuple[list[Record], list[Record]]:
    users: list[Record] = []
    members: list[Record] = []
    parse = datetime.fromisoformat
    for payload in payloads:
        user = payload["user"]
        user_id = int(user["id"])
        get, ask = user.get, payload.get
        users.append(
            (
                user_id,
                user["username"],
                get("discriminator"),
                get("global_name"),
                get("avatar"),
                get("bot", False),
                get("system", False),
                get("public_flags"),
                stamp,
            )
        )
        roles = payload["roles"]
        joined = payload["joined_at"]
        boosting = ask("premium_since")
        silenced = ask("communication_disabled_until")
        members.append(
            (
                guild_id,
                user_id,
                ask("nick"),
                ask("avatar"),
                sorted(map(int, roles)) if roles else [],
                parse(joined) if joined is not None else None,
                parse(boosting) if boosting is not None else None,
                parse(silenced) if silenced is not None else None,
                ask("pending"),
                ask("flags"),
                None,
                stamp,
            )
        )
    return users, members


def _read_one_by_one(
    page: Page, guild_id: int, payloads: list[Payload], stamp: int, refuse: Callable[[ValidationError], None]
) -> None:
    page.users, page.members = [], []
    for payload in payloads:
        try:
            users, members = _records(guild_id, [payload], stamp)
        except MISSHAPEN as error:
            page.unreadable.append(id_of(payload))
            refuse(ValidationError(f"a member of a listing cannot be read: {type(error).__name__}: {error}"))
        else:
            page.users += users
            page.members += members


def _sift(page: Page, refuse: Callable[[ValidationError], None]) -> None:
    bad: set[int] = set()

    def refused(position: int) -> Callable[[Record, ValidationError], None]:
        def tell(record: Record, error: ValidationError) -> None:
            bad.add(record[position])
            refuse(error)

        return tell

    sifted("users", LISTED_USER, page.users, refused(0))
    sifted("members", LISTED_MEMBER, page.members, refused(1))
    page.users = [record for record in page.users if record[0] not in bad]
    page.members = [record for record in page.members if record[1] not in bad]
    page.unreadable += sorted(bad)

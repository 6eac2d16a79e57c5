"""Which changes say that they were inferred: those that a listing or a snapshot proved, no live event told of."""

from __future__ import annotations

import pytest

from tests.mirror.tables import (
    GUILD,
    Received,
    applied,
    fence_of,
    member_record,
    page,
    said,
    user_record,
    when,
    write,
    write_groups,
    writer_of,
)
from utils.database import Pool
from utils.mirror.reconcile.staging import StagedListing
from utils.mirror.records.rows import Absence, Group, Mode
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.write.apply import Batch, apply

ANN, ROLE, CHANNEL, THREAD = 11, 21, 31, 41


async def told(database: Pool, table: str = "changes") -> list[tuple[str, str, bool]]:
    records = await database.fetch(f"SELECT table_name, action, inferred FROM {table} ORDER BY id")  # noqa: S608
    return [tuple(record) for record in records]


@pytest.fixture
async def furnished(database: Pool) -> Pool:
    """A guild with a person, who has a role, and a channel with a thread."""
    await write(
        database,
        said("guilds", (GUILD,), 1, name="guild"),
        said("users", (ANN,), 1, username="ann"),
        said("members", (GUILD, ANN), 1, roles=[ROLE], joined_at=when(0), left_at=None),
        said("roles", (GUILD, ROLE), 1, name="role"),
        said("channels", (GUILD, CHANNEL), 1, name="channel"),
        said("threads", (GUILD, THREAD), 1, name="thread", parent_id=CHANNEL),
    )
    assert await told(database) == []
    return database


async def test_what_a_live_event_told_was_not(furnished: Pool) -> None:
    await write(
        furnished,
        said("users", (ANN,), 2, username="anne"),
        said("members", (GUILD, ANN), 2, nick="A"),
        said("guilds", (GUILD,), 2, name="better"),
    )
    assert await told(furnished) == [("guilds", "update", False), ("members", "update", False)]
    assert await told(furnished, "user_changes") == [("users", "update", False)]


async def test_what_a_small_listing_showed_was(furnished: Pool) -> None:
    await write_groups(
        furnished,
        Group("users", LISTED_USER_COLUMNS, Mode.MERGE, [user_record(ANN, 2, username="anne")]),
        Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, [member_record(ANN, 2, nick="A")]),
    )
    assert await told(furnished) == [("members", "update", True)]
    assert await told(furnished, "user_changes") == [("users", "update", True)]


async def test_one_batch_tells_them_apart(furnished: Pool) -> None:
    listed = Group("roles", ("name",), Mode.MERGE, [(GUILD, ROLE, "renamed", 2)])
    entries = dict([said("channels", (GUILD, CHANNEL), 3, name="renamed")])
    await applied(furnished, Batch(entries=entries, groups=[listed]))
    assert set(await told(furnished)) == {("channels", "update", False), ("roles", "update", True)}


async def test_what_a_listing_did_not_show_was_with_all_that_went_along(furnished: Pool) -> None:
    await write_groups(furnished, absences=[Absence("roles", GUILD, 2, []), Absence("channels", GUILD, 2, [])])
    assert set(await told(furnished)) == {
        ("roles", "remove", True),
        ("members", "update", True),
        ("channels", "remove", True),
        ("threads", "remove", True),
    }


async def test_what_went_along_with_what_was_deleted_live_was_not(furnished: Pool) -> None:
    await write(
        furnished,
        said("roles", (GUILD, ROLE), 2, may_insert=False, deleted_at=when(9)),
        said("channels", (GUILD, CHANNEL), 2, may_insert=False, deleted_at=when(9)),
    )
    assert set(await told(furnished)) == {
        ("roles", "remove", False),
        ("members", "update", False),
        ("channels", "remove", False),
        ("threads", "remove", False),
    }


async def test_a_guild_that_ready_did_not_name_was(furnished: Pool) -> None:
    fence = await fence_of(furnished)
    await apply(furnished, Batch(ready=[(0, 1, set(), 5)]), fence)
    assert await told(furnished) == [("guilds", "remove", True)]


@pytest.mark.parametrize("others", [0, 30])
async def test_what_a_large_listing_showed_and_did_not_show_was(furnished: Pool, others: int) -> None:
    gone = 12
    await write(furnished, said("members", (GUILD, gone), 1, roles=[], joined_at=when(0), left_at=None))
    writer = await writer_of(furnished)
    members = [member_record(ANN, 9, nick="A"), *(member_record(100 + number, 9) for number in range(others))]
    listing = Received(furnished, [page(members)], 9, touched=writer.touched, source="rest")
    await StagedListing(writer, listing, page_timeout=1.0).write([])
    assert set(await told(furnished)) == {("members", "update", True), ("members", "remove", True)}
    assert await told(furnished, "user_changes") == [("users", "update", True)]

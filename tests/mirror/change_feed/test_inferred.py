"""The column `inferred`: true for changes that a listing or a snapshot proved, false for dispatches."""

from __future__ import annotations

import pytest

from tests.mirror.tables import (
    GUILD,
    Received,
    applied,
    entry_of,
    fence_of,
    member_record,
    page,
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
from utils.mirror.write.batch import Batch, write_batch

ANN, ROLE, CHANNEL, THREAD = 11, 21, 31, 41


async def changes_of(database: Pool, table: str = "changes") -> list[tuple[str, str, bool]]:
    records = await database.fetch(f"SELECT table_name, action, inferred FROM {table} ORDER BY id")  # noqa: S608
    return [tuple(record) for record in records]


@pytest.fixture
async def guild(database: Pool) -> Pool:
    """A guild with a member who has a role, and a channel with a thread."""
    await write(
        database,
        entry_of("guilds", (GUILD,), 1, name="guild"),
        entry_of("users", (ANN,), 1, username="ann"),
        entry_of("members", (GUILD, ANN), 1, roles=[ROLE], joined_at=when(0), left_at=None),
        entry_of("roles", (GUILD, ROLE), 1, name="role"),
        entry_of("channels", (GUILD, CHANNEL), 1, name="channel"),
        entry_of("threads", (GUILD, THREAD), 1, name="thread", parent_id=CHANNEL),
    )
    assert await changes_of(database) == []
    return database


async def test_live_rows_are_not_inferred(guild: Pool) -> None:
    await write(
        guild,
        entry_of("users", (ANN,), 2, username="anne"),
        entry_of("members", (GUILD, ANN), 2, nick="A"),
        entry_of("guilds", (GUILD,), 2, name="better"),
    )
    assert await changes_of(guild) == [("guilds", "update", False), ("members", "update", False)]
    assert await changes_of(guild, "user_changes") == [("users", "update", False)]


async def test_small_listings_are_inferred(guild: Pool) -> None:
    await write_groups(
        guild,
        Group("users", LISTED_USER_COLUMNS, Mode.MERGE, [user_record(ANN, 2, username="anne")]),
        Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, [member_record(ANN, 2, nick="A")]),
    )
    assert await changes_of(guild) == [("members", "update", True)]
    assert await changes_of(guild, "user_changes") == [("users", "update", True)]


async def test_one_batch_can_hold_both(guild: Pool) -> None:
    listed = Group("roles", ("name",), Mode.MERGE, [(GUILD, ROLE, "renamed", 2)])
    entries = dict([entry_of("channels", (GUILD, CHANNEL), 3, name="renamed")])
    await applied(guild, Batch(entries=entries, groups=[listed]))
    assert set(await changes_of(guild)) == {("channels", "update", False), ("roles", "update", True)}


async def test_absences_and_their_cascades_are_inferred(guild: Pool) -> None:
    await write_groups(guild, absences=[Absence("roles", GUILD, 2, []), Absence("channels", GUILD, 2, [])])
    assert set(await changes_of(guild)) == {
        ("roles", "remove", True),
        ("members", "update", True),
        ("channels", "remove", True),
        ("threads", "remove", True),
    }


async def test_cascades_of_live_deletions_are_not_inferred(guild: Pool) -> None:
    await write(
        guild,
        entry_of("roles", (GUILD, ROLE), 2, may_insert=False, deleted_at=when(9)),
        entry_of("channels", (GUILD, CHANNEL), 2, may_insert=False, deleted_at=when(9)),
    )
    assert set(await changes_of(guild)) == {
        ("roles", "remove", False),
        ("members", "update", False),
        ("channels", "remove", False),
        ("threads", "remove", False),
    }


async def test_guilds_missing_from_ready_are_inferred(guild: Pool) -> None:
    fence = await fence_of(guild)
    await write_batch(guild, Batch(ready=[(0, 1, set(), 5)]), fence)
    assert await changes_of(guild) == [("guilds", "remove", True)]


@pytest.mark.parametrize("others", [0, 30])
async def test_large_listings_are_inferred(guild: Pool, others: int) -> None:
    gone = 12
    await write(guild, entry_of("members", (GUILD, gone), 1, roles=[], joined_at=when(0), left_at=None))
    writer = await writer_of(guild)
    members = [member_record(ANN, 9, nick="A"), *(member_record(100 + number, 9) for number in range(others))]
    listing = Received(guild, [page(members)], 9, overlay=writer.overlay, source="rest")
    await StagedListing(writer, listing, page_timeout=1.0).write([])
    assert set(await changes_of(guild)) == {("members", "update", True), ("members", "remove", True)}
    assert await changes_of(guild, "user_changes") == [("users", "update", True)]

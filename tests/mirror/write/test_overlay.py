"""The live overlay: dispatches beat an older observation, column by column."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mirror.tables import GUILD, OTHER_GUILD, entry_of, member_record, rows, when, write, writer_of
from utils.database import Pool
from utils.exceptions import SyncError
from utils.mirror.records.rows import Group, Mode, Observation, Row
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS
from utils.mirror.write.overlay import LiveOverlay


def member(user_id: int, *, guild_id: int = GUILD, may_insert: bool = True, **values: Any) -> Row:
    return Row("members", (guild_id, user_id), values, may_insert)


def test_remembers_nothing_without_an_open_observation() -> None:
    overlay = LiveOverlay()
    overlay.add(member(1, nick="a"), 5)
    overlay.open("a")
    assert overlay.touched_since("members", GUILD, 0) == set()


def test_remembers_until_the_last_observation_is_closed() -> None:
    overlay = LiveOverlay()
    overlay.open("a")
    overlay.add(member(1, nick="a"), 5)
    overlay.open("b")
    overlay.close("a")
    assert overlay.touched_since("members", GUILD, 4) == {1}
    overlay.close("a")
    assert overlay.touched_since("members", GUILD, 4) == {1}
    overlay.close("b")
    overlay.open("c")
    assert overlay.touched_since("members", GUILD, 4) == set()


def test_touched_since_is_by_stamp_guild_and_table() -> None:
    overlay = LiveOverlay()
    overlay.open("a")
    for row, stamp in (
        (member(1), 5),
        (member(2), 6),
        (member(3, guild_id=OTHER_GUILD), 7),
        (Row("users", (4,), {}), 8),
        (Row("roles", (GUILD, 5), {}), 9),
        (member(1), 10),
    ):
        overlay.add(row, stamp)
    assert overlay.touched_since("members", GUILD, 5) == {1, 2}
    assert overlay.touched_since("members", GUILD, 6) == {1}
    assert overlay.touched_since("members", OTHER_GUILD, 0) == {3}
    assert overlay.touched_since("users", 0, 0) == {4}
    assert overlay.touched_since("roles", GUILD, 0) == {5}
    assert overlay.touched_since("threads", GUILD, 0) == set()


def test_tracking_block_that_raises_is_closed() -> None:
    overlay = LiveOverlay()

    def ask() -> None:
        with overlay.tracking():
            overlay.add(member(1), 5)
            raise SyncError("no answer")

    with pytest.raises(SyncError):
        ask()
    overlay.open("a")
    assert overlay.touched_since("members", GUILD, 0) == set()


def test_remembers_people_only_for_listings_of_people() -> None:
    overlay = LiveOverlay()
    overlay.open("a thread's page", people=False)
    overlay.add(member(1), 5)
    overlay.add(Row("roles", (GUILD, 5), {}), 6)
    overlay.open("a listing")
    overlay.add(member(2), 7)
    overlay.close("a listing")
    assert overlay.touched_since("members", GUILD, 0) == set()
    assert overlay.touched_since("roles", GUILD, 0) == {5}


def test_refuses_observations_older_than_what_was_forgotten() -> None:
    overlay = LiveOverlay(max_people=2)
    overlay.open("listing")
    for user_id in (1, 2, 3):
        overlay.add(member(user_id), 10 + user_id)
    with pytest.raises(SyncError, match="requested again"):
        overlay.touched_since("members", GUILD, 10)
    assert not overlay.covers(12)
    overlay.add(member(4), 14)
    assert overlay.touched_since("members", GUILD, 13) == {4}
    assert overlay.touched_since("roles", GUILD, 10) == set()


def test_partial_rows_and_removals_are_reapplied() -> None:
    overlay = LiveOverlay()
    overlay.open("a")
    overlay.add(member(1, may_insert=False, nick="old"), 5)
    overlay.add(member(2, nick="joined"), 6)
    overlay.add(member(3, may_insert=False, left_at=when(1)), 7)
    overlay.add(Row("roles", (GUILD, 4), {"name": "r", "deleted_at": None}), 8)
    overlay.add(Row("roles", (GUILD, 4), {"deleted_at": when(2)}, may_insert=False), 9)
    overlay.add(member(9, guild_id=OTHER_GUILD, may_insert=False, nick="x"), 10)
    again = {slot: entry.values for slot, entry in overlay.entries_to_reapply(GUILD, 5)}
    assert again.keys() == {("members", (GUILD, 3)), ("roles", (GUILD, 4))}
    assert again["members", (GUILD, 3)] == {"left_at": when(1)}
    assert again["roles", (GUILD, 4)]["deleted_at"] == when(2)


@given(touches=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["nick", "flags", "left_at"])), max_size=8))
def test_split_keeps_every_column_that_no_dispatch_named(
    touches: list[tuple[int, str]],
) -> None:
    overlay = LiveOverlay()
    overlay.open("listing")
    for stamp, (user_id, column) in enumerate(touches, start=15):
        overlay.add(Row("members", (GUILD, user_id), {column: None}), stamp)
    records = [member_record(user_id, 20, nick="n", flags=3) for user_id in range(1, 5)]
    groups = overlay.split_stale(Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, records), GUILD, 20)
    ahead: dict[int, set[str]] = {}
    for stamp, (user_id, column) in enumerate(touches, start=15):
        if stamp > 20:
            ahead.setdefault(user_id, set()).add(column)
    made = [record[1] for group in groups if group.mode is not Mode.UPDATE for record in group.records]
    assert sorted(made) == [1, 2, 3, 4]
    whole = {record[1] for group in groups if group.mode is Mode.MERGE for record in group.records}
    assert whole == {1, 2, 3, 4} - ahead.keys()
    for group in groups:
        if group.mode is Mode.UPDATE:
            for record in group.records:
                assert set(group.columns) == set(LISTED_MEMBER_COLUMNS) - ahead[record[1]]
                assert record[2:-1] == tuple(
                    value
                    for name, value in zip(LISTED_MEMBER_COLUMNS, records[record[1] - 1][2:-1], strict=True)
                    if name in group.columns
                )


async def test_dispatch_without_a_change_beats_an_older_observation(database: Pool) -> None:
    writer = await writer_of(database)
    await write(database, entry_of("roles", (GUILD, 1), 1, name="new"), entry_of("roles", (GUILD, 2), 1, name="new"))
    writer.start()
    stale = [(GUILD, id, "old", 10) for id in (1, 2)]
    done = writer.submit(Observation(GUILD, 10, [Group("roles", ("name",), Mode.MERGE, stale)]))
    writer.put(Row("roles", (GUILD, 1), {"name": "new"}), 11)
    await done
    await writer.stop(5)
    assert {key[1]: value["name"] for key, value in (await rows(database, "roles")).items()} == {1: "new", 2: "old"}


async def test_deleted_row_stays_deleted_after_an_older_observation(database: Pool) -> None:
    writer = await writer_of(database)
    writer.start()
    done = writer.submit(Observation(GUILD, 10, [Group("roles", ("name",), Mode.MERGE, [(GUILD, 1, "r", 10)])]))
    writer.put(Row("roles", (GUILD, 1), {"deleted_at": when(1)}, may_insert=False), 11)
    await done
    await writer.stop(5)
    assert (await rows(database, "roles"))[GUILD, 1]["deleted_at"] == when(1)


async def test_flush_leaves_observations_to_the_writer(database: Pool) -> None:
    writer = await writer_of(database)
    done = writer.submit(Observation(GUILD, 10, [Group("roles", ("name",), Mode.MERGE, [(GUILD, 1, "r", 10)])]))
    await writer.flush()
    assert not done.done()
    writer.start()
    await done
    await writer.stop(5)
    assert (GUILD, 1) in await rows(database, "roles")

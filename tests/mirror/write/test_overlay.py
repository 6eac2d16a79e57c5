"""What live events say while an older observation is on its way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mirror.tables import GUILD, OTHER_GUILD, member_record, rows, said, when, write, writer_of
from utils.database import Pool
from utils.exceptions import SyncError
from utils.mirror.records.rows import Group, Mode, Observation, Row
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS
from utils.mirror.write.overlay import LiveOverlay


def member(user_id: int, *, guild_id: int = GUILD, may_insert: bool = True, **values: Any) -> Row:
    return Row("members", (guild_id, user_id), values, may_insert)


def test_nothing_is_remembered_while_no_observation_is_open() -> None:
    touched = LiveOverlay()
    touched.add(member(1, nick="a"), 5)
    touched.open("a")
    assert touched.touched_since("members", GUILD, 0) == set()


def test_everything_is_remembered_until_the_last_observation_is_closed() -> None:
    touched = LiveOverlay()
    touched.open("a")
    touched.add(member(1, nick="a"), 5)
    touched.open("b")
    touched.close("a")
    assert touched.touched_since("members", GUILD, 4) == {1}
    touched.close("a")
    assert touched.touched_since("members", GUILD, 4) == {1}
    touched.close("b")
    touched.open("c")
    assert touched.touched_since("members", GUILD, 4) == set()


def test_only_what_came_after_the_stamp_counts_in_its_own_guild_and_table() -> None:
    touched = LiveOverlay()
    touched.open("a")
    for row, stamp in (
        (member(1), 5),
        (member(2), 6),
        (member(3, guild_id=OTHER_GUILD), 7),
        (Row("users", (4,), {}), 8),
        (Row("roles", (GUILD, 5), {}), 9),
        (member(1), 10),
    ):
        touched.add(row, stamp)
    assert touched.touched_since("members", GUILD, 5) == {1, 2}
    assert touched.touched_since("members", GUILD, 6) == {1}
    assert touched.touched_since("members", OTHER_GUILD, 0) == {3}
    assert touched.touched_since("users", 0, 0) == {4}
    assert touched.touched_since("roles", GUILD, 0) == {5}
    assert touched.touched_since("threads", GUILD, 0) == set()


def test_a_block_that_raises_forgets_what_it_watched() -> None:
    touched = LiveOverlay()

    def ask() -> None:
        with touched.tracking():
            touched.add(member(1), 5)
            raise SyncError("the answer never came")

    with pytest.raises(SyncError):
        ask()
    touched.open("a")
    assert touched.touched_since("members", GUILD, 0) == set()


def test_people_are_remembered_for_listings_of_people_alone() -> None:
    touched = LiveOverlay()
    touched.open("a thread's page", people=False)
    touched.add(member(1), 5)
    touched.add(Row("roles", (GUILD, 5), {}), 6)
    touched.open("a listing")
    touched.add(member(2), 7)
    touched.close("a listing")
    assert touched.touched_since("members", GUILD, 0) == set()
    assert touched.touched_since("roles", GUILD, 0) == {5}


def test_a_listing_that_waited_for_more_than_memory_holds_is_refused_and_a_later_one_is_not() -> None:
    touched = LiveOverlay(max_people=2)
    touched.open("listing")
    for user_id in (1, 2, 3):
        touched.add(member(user_id), 10 + user_id)
    with pytest.raises(SyncError, match="requested again"):
        touched.touched_since("members", GUILD, 10)
    assert not touched.covers(12)
    touched.add(member(4), 14)
    assert touched.touched_since("members", GUILD, 13) == {4}
    assert touched.touched_since("roles", GUILD, 10) == set()


def test_what_could_not_make_a_row_and_what_went_is_said_again() -> None:
    touched = LiveOverlay()
    touched.open("a")
    touched.add(member(1, may_insert=False, nick="old"), 5)
    touched.add(member(2, nick="joined"), 6)
    touched.add(member(3, may_insert=False, left_at=when(1)), 7)
    touched.add(Row("roles", (GUILD, 4), {"name": "r", "deleted_at": None}), 8)
    touched.add(Row("roles", (GUILD, 4), {"deleted_at": when(2)}, may_insert=False), 9)
    touched.add(member(9, guild_id=OTHER_GUILD, may_insert=False, nick="x"), 10)
    again = {slot: entry.values for slot, entry in touched.replay_partial(GUILD, 5)}
    assert again.keys() == {("members", (GUILD, 3)), ("roles", (GUILD, 4))}
    assert again["members", (GUILD, 3)] == {"left_at": when(1)}
    assert again["roles", (GUILD, 4)]["deleted_at"] == when(2)


@given(touches=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["nick", "flags", "left_at"])), max_size=8))
def test_a_listing_keeps_every_member_and_every_column_that_nobody_spoke_of_since(
    touches: list[tuple[int, str]],
) -> None:
    touched = LiveOverlay()
    touched.open("listing")
    for stamp, (user_id, column) in enumerate(touches, start=15):
        touched.add(Row("members", (GUILD, user_id), {column: None}), stamp)
    records = [member_record(user_id, 20, nick="n", flags=3) for user_id in range(1, 5)]
    groups = touched.split_stale(Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, records), GUILD, 20)
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


async def test_an_event_that_changed_nothing_still_beats_an_older_observation(database: Pool) -> None:
    writer = await writer_of(database)
    await write(database, said("roles", (GUILD, 1), 1, name="new"), said("roles", (GUILD, 2), 1, name="new"))
    writer.start()
    stale = [(GUILD, id, "old", 10) for id in (1, 2)]
    done = writer.submit(Observation(GUILD, 10, [Group("roles", ("name",), Mode.MERGE, stale)]))
    writer.put(Row("roles", (GUILD, 1), {"name": "new"}), 11)
    await done
    await writer.stop(5)
    assert {key[1]: value["name"] for key, value in (await rows(database, "roles")).items()} == {1: "new", 2: "old"}


async def test_what_is_deleted_before_an_older_observation_shows_it_stays_deleted(database: Pool) -> None:
    writer = await writer_of(database)
    writer.start()
    done = writer.submit(Observation(GUILD, 10, [Group("roles", ("name",), Mode.MERGE, [(GUILD, 1, "r", 10)])]))
    writer.put(Row("roles", (GUILD, 1), {"deleted_at": when(1)}, may_insert=False), 11)
    await done
    await writer.stop(5)
    assert (await rows(database, "roles"))[GUILD, 1]["deleted_at"] == when(1)


async def test_flushing_the_buffer_leaves_observations_to_the_writer(database: Pool) -> None:
    writer = await writer_of(database)
    done = writer.submit(Observation(GUILD, 10, [Group("roles", ("name",), Mode.MERGE, [(GUILD, 1, "r", 10)])]))
    await writer.flush()
    assert not done.done()
    writer.start()
    await done
    await writer.stop(5)
    assert (GUILD, 1) in await rows(database, "roles")

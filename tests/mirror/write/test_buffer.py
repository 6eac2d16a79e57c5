"""The write-behind buffer: one entry for each row, and nothing is lost between `take` and `give_back`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.mirror.tables import GUILD, OTHER_GUILD
from utils.mirror.records.rows import Entry, Mode, Row, group_entries
from utils.mirror.write.buffer import Buffer, Entries


def member(user_id: int, *, guild_id: int = GUILD, may_insert: bool = True, **values: Any) -> Row:
    return Row("members", (guild_id, user_id), values, may_insert)


def buffer(rows: int = 500, seconds: float = 60.0) -> Buffer:
    return Buffer(flush_rows=rows, flush_seconds=seconds)


async def test_later_row_wins_by_column() -> None:
    waiting = buffer()
    waiting.put(member(1, nick="a", roles=[1]), 10)
    waiting.put(member(1, may_insert=False, nick="b"), 11)
    assert waiting.take() == {("members", (GUILD, 1)): Entry({"nick": "b", "roles": [1]}, True, 11)}
    assert len(waiting) == 0


async def test_given_back_entries_are_older_than_new_ones() -> None:
    waiting = buffer()
    waiting.put(member(1, nick="a", roles=[1]), 10)
    waiting.put(member(2, nick="x"), 11)
    taken = waiting.take()
    waiting.put(member(1, nick="b"), 12)
    waiting.give_back(taken)
    assert waiting.take() == {
        ("members", (GUILD, 1)): Entry({"nick": "b", "roles": [1]}, True, 12),
        ("members", (GUILD, 2)): Entry({"nick": "x"}, True, 11),
    }


async def test_take_leaves_the_members_of_a_held_guild() -> None:
    waiting = buffer()
    for row in (member(1), member(1, guild_id=OTHER_GUILD), Row("roles", (GUILD, 1), {}), Row("guilds", (GUILD,), {})):
        waiting.put(row, 1)
    waiting.hold(GUILD)
    waiting.put(member(2), 2)
    taken = waiting.take()
    assert set(taken) == {("members", (OTHER_GUILD, 1)), ("roles", (GUILD, 1)), ("guilds", (GUILD,))}
    assert len(waiting) == 2
    assert waiting.age > 0
    waiting.release(GUILD)
    assert set(waiting.take()) == {("members", (GUILD, 1)), ("members", (GUILD, 2))}


async def test_drops_the_oldest_members_with_their_users() -> None:
    waiting = buffer()
    waiting.put(Row("roles", (GUILD, 1), {}), 1)
    for user_id in (1, 2, 3):
        waiting.put(Row("users", (user_id,), {}), 2)
        waiting.put(member(user_id), 2)
    waiting.put(member(1), 3)  # still the oldest
    waiting.put(member(9, guild_id=OTHER_GUILD), 4)
    assert waiting.drop_oldest_members(2) == (4, {GUILD})
    assert set(waiting.take()) == {
        ("roles", (GUILD, 1)), ("users", (3,)), ("members", (GUILD, 3)), ("members", (OTHER_GUILD, 9)),
    }  # fmt: skip
    assert waiting.drop_oldest_members(2) == (0, set())


async def test_age_is_that_of_the_oldest_entry() -> None:
    waiting = buffer()
    assert waiting.age == 0.0
    waiting.put(member(1), 1)
    assert waiting._oldest_at is not None
    taken = waiting.take()
    assert waiting._oldest_at is None
    waiting.give_back(taken)
    assert waiting._oldest_at is not None
    waiting.hold(GUILD)
    waiting.take()
    assert waiting._oldest_at is not None


async def test_flush_is_due_by_size_by_age_and_on_request() -> None:
    waiting = buffer(rows=2)
    due = asyncio.create_task(waiting.wait_until_due())
    waiting.put(member(1), 1)
    waiting.put(member(1), 2)
    await asyncio.sleep(0)
    assert not due.done(), "two events about one row count as one"
    waiting.put(member(2), 3)
    await asyncio.wait_for(due, 5)
    due = asyncio.create_task(waiting.wait_until_due())
    await asyncio.sleep(0)
    assert not due.done(), "a flush is due once"
    waiting.request_flush()
    await asyncio.wait_for(due, 5)
    await asyncio.wait_for(buffer(seconds=0.01).wait_until_due(), 5)


async def test_groups_rows_by_columns_in_key_order() -> None:
    entries: Entries = {
        ("members", (GUILD, 3)): Entry({"nick": "c"}, True, 3),
        ("members", (GUILD, 1)): Entry({"nick": "a"}, True, 1),
        ("members", (GUILD, 2)): Entry({"nick": "b"}, False, 2),
        ("users", (9,)): Entry({"username": "u"}, True, 4),
    }
    groups = list(group_entries(entries.items()))
    assert [(group.table, group.columns, group.mode, group.records) for group in groups] == [
        ("members", ("nick",), Mode.MERGE, [(GUILD, 1, "a", 1), (GUILD, 3, "c", 3)]),
        ("members", ("nick",), Mode.UPDATE, [(GUILD, 2, "b", 2)]),
        ("users", ("username",), Mode.MERGE, [(9, "u", 4)]),
    ]


EVENTS = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.dictionaries(st.sampled_from(["nick", "flags"]), st.integers(0, 9), min_size=1),
        st.sampled_from(["nothing", "write", "fail", "fail later", "hold", "release"]),
    ),
    max_size=25,
)


@pytest.mark.slow
@examples(100)
@given(events=EVENTS)
async def test_newest_value_of_each_column_is_written_last(
    events: list[tuple[int, dict[str, int], str]],
) -> None:
    waiting, table, expected = buffer(), dict[int, dict[str, Any]](), dict[int, dict[str, Any]]()
    failing: Entries | None = None

    def write(entries: Entries) -> None:
        for (_, key), entry in entries.items():
            table.setdefault(key[1], {}).update(entry.values)

    for stamp, (user_id, values, then) in enumerate(events, start=1):
        waiting.put(Row("members", (GUILD, user_id), dict(values)), stamp)
        expected.setdefault(user_id, {}).update(values)
        if failing is not None:
            waiting.give_back(failing)
            failing = None
        elif then == "write":
            write(waiting.take())
        elif then == "fail":
            waiting.give_back(waiting.take())
        elif then == "fail later":
            failing = waiting.take()
        elif then == "hold":
            waiting.hold(GUILD)
            write(waiting.take())
        elif then == "release":
            waiting.release(GUILD)
    waiting.release(GUILD)
    waiting.give_back(failing or {})
    write(waiting.take())
    assert table == expected

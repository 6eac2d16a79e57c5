"""One batch: what the merge writes, what it leaves alone, and the history it records."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mirror.tables import (
    GUILD,
    OTHER_GUILD,
    applied,
    complete_run,
    entry_of,
    history,
    row,
    rows,
    versions,
    when,
    write,
)
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable
from utils.mirror.records.rows import Group, Mode
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS
from utils.mirror.write import batch as batch_module
from utils.mirror.write.batch import Batch

ODD = [
    "",
    " ",
    "NULL",
    "null",
    "{}",
    "{a,b}",
    'a "quoted" word',
    "a, comma",
    "back\\slash",
    '\\"',
    "'; DROP TABLE users; --",
    "$1",
    "new\nline\tand\rmore",
    "Ünïcödé 漢字 🦀 \u200f",
    "\ufffd",
]


def member(user_id: int, stamp: int, *, guild_id: int = GUILD, may_insert: bool = True, **values: Any) -> Any:
    return entry_of("members", (guild_id, user_id), stamp, may_insert=may_insert, **values)


async def test_inserts_new_rows_without_history(database: Pool) -> None:
    written = await write(
        database,
        member(1, 10, nick="Ann", roles=[5, 6], left_at=None),
        entry_of("roles", (GUILD, 5), 11, name="admin", permissions=8),
        entry_of("users", (1,), 12, username="ann"),
    )
    assert written.inserted == {"members": 1, "roles": 1, "users": 1}
    assert not written.updated.total()
    assert await history(database) == [] == await history(database, "user_changes")
    found = await row(database, "members", (GUILD, 1))
    assert (found["nick"], found["roles"], found["left_at"], found["stamp"]) == ("Ann", [5, 6], None, 10)


async def test_updates_given_columns_and_records_the_changed_ones(database: Pool) -> None:
    await write(database, member(1, 10, nick="Ann", roles=[5], flags=0, pending=True, left_at=None))
    written = await write(database, member(1, 20, nick="Anna", roles=[5], pending=False))
    assert written.updated == {"members": 1}
    found = await row(database, "members", (GUILD, 1))
    assert (found["nick"], found["roles"], found["flags"], found["stamp"]) == ("Anna", [5], 0, 20)
    assert await history(database) == [
        ("members", (GUILD, 1), "update", 1, {"nick": "Ann", "pending": True}, {"nick": "Anna", "pending": False})
    ]


async def test_records_users_in_user_changes(database: Pool) -> None:
    await write(database, entry_of("users", (7,), 1, username="a", avatar=None))
    await write(database, entry_of("users", (7,), 2, username="b", avatar=None))
    assert await history(database) == []
    assert await history(database, "user_changes") == [
        ("users", (7,), "update", 7, {"username": "a"}, {"username": "b"})
    ]


async def test_records_channels_without_a_user(database: Pool) -> None:
    await write(database, entry_of("channels", (GUILD, 3), 1, name="a", permission_overwrites='[{"id": "1"}]'))
    await write(database, entry_of("channels", (GUILD, 3), 2, name="a", permission_overwrites='[{"id": "2"}]'))
    before, after = {"permission_overwrites": [{"id": "1"}]}, {"permission_overwrites": [{"id": "2"}]}
    assert await history(database) == [("channels", (GUILD, 3), "update", None, before, after)]


async def test_distinguishes_removal_return_and_update(database: Pool) -> None:
    await write(database, member(1, 10, nick="Ann", left_at=None))
    await write(database, member(1, 20, left_at=when(5), may_insert=False))
    assert (await row(database, "members", (GUILD, 1)))["left_at"] == when(5)
    await write(database, member(1, 30, nick="Anna", left_at=None))
    assert (await row(database, "members", (GUILD, 1)))["left_at"] is None
    actions = [(action, sorted(before), sorted(after)) for _, _, action, _, before, after in await history(database)]
    assert actions == [("remove", ["left_at"], ["left_at"]), ("return", ["left_at", "nick"], ["left_at", "nick"])]


async def test_repeated_removal_keeps_the_first_time(database: Pool) -> None:
    await write(database, member(1, 10, left_at=None), entry_of("roles", (GUILD, 2), 10, name="r", deleted_at=None))
    await write(database, member(1, 20, left_at=when(5)), entry_of("roles", (GUILD, 2), 20, deleted_at=when(5)))
    before = await versions(database, "members"), await versions(database, "roles")
    await write(database, member(1, 30, left_at=when(9)), entry_of("roles", (GUILD, 2), 30, deleted_at=when(9)))
    assert (await versions(database, "members"), await versions(database, "roles")) == before
    assert (await row(database, "members", (GUILD, 1)))["left_at"] == when(5)


async def test_quiet_columns_leave_no_history(database: Pool) -> None:
    await write(database, entry_of("guilds", (GUILD,), 1, name="g", member_count=1, large=False, unavailable=False))
    await write(database, entry_of("guilds", (GUILD,), 2, member_count=2, large=True, unavailable=True))
    found = await row(database, "guilds", (GUILD,))
    assert (found["member_count"], found["large"], found["unavailable"], found["stamp"]) == (2, True, True, 2)
    assert await history(database) == []


async def test_equal_values_write_nothing(database: Pool) -> None:
    overwrites = '[{"id": "1", "allow": "0"}]'
    everything = [
        member(1, 10, nick=None, roles=[1, 2], joined_at=when(1), left_at=None),
        entry_of("users", (1,), 10, username="ann", avatar=None, bot=False),
        entry_of("guilds", (GUILD,), 10, name="g", features=["A", "B"], joined_at=when(2), left_at=None),
        entry_of("channels", (GUILD, 2), 10, name="c", permission_overwrites=overwrites, hidden=False),
        entry_of("roles", (GUILD, 3), 10, name="r", tags=None, permissions=2**62),
        entry_of("threads", (GUILD, 4), 10, name="t", applied_tags=[9], archived_at=None),
    ]
    await write(database, *everything)
    tables = ("members", "users", "guilds", "channels", "roles", "threads")
    before = {table: await versions(database, table) for table in tables}
    later = [(slot, entry._replace(stamp=99)) for slot, entry in everything]
    written = await write(database, *later)
    assert written.total == 0
    assert {table: await versions(database, table) for table in tables} == before
    assert (await row(database, "members", (GUILD, 1)))["stamp"] == 10


async def test_older_stamp_never_overwrites_a_newer_one(database: Pool) -> None:
    await write(database, member(1, 20, nick="new", left_at=None))
    for late in (member(1, 19, nick="old", left_at=None), member(1, 5, left_at=when(1), may_insert=False)):
        written = await write(database, late)
        assert written.total == 0
    assert (await row(database, "members", (GUILD, 1)))["nick"] == "new"
    await write(database, member(1, 20, nick="same stamp", left_at=None))
    assert (await row(database, "members", (GUILD, 1)))["nick"] == "same stamp"


async def test_partial_rows_insert_nothing(database: Pool) -> None:
    written = await write(
        database,
        member(1, 10, left_at=when(1), may_insert=False),
        entry_of("guilds", (GUILD,), 10, unavailable=True, may_insert=False),
        entry_of("roles", (GUILD, 3), 10, deleted_at=when(1), may_insert=False),
    )
    assert written.total == 0
    assert [await rows(database, table) for table in ("members", "guilds", "roles")] == [{}, {}, {}]


async def test_insert_mode_updates_nothing(database: Pool) -> None:
    await write(database, member(1, 10, nick="live", left_at=None))
    records: list[tuple[Any, ...]] = [
        (GUILD, user_id, "listed", None, [], when(0), None, None, False, 0, None, 50) for user_id in (1, 2)
    ]
    written = await applied(database, Batch(groups=[Group("members", LISTED_MEMBER_COLUMNS, Mode.INSERT, records)]))
    assert (written.inserted["members"], written.updated["members"]) == (1, 0)
    assert (await row(database, "members", (GUILD, 1)))["nick"] == "live"
    assert (await row(database, "members", (GUILD, 2)))["nick"] == "listed"


async def test_drops_members_older_than_the_last_listing(database: Pool) -> None:
    await write(database, member(1, 10, nick="before", left_at=None))
    await applied(database, Batch(runs=[complete_run(100)]))
    written = await write(
        database,
        member(1, 99, nick="late"),
        member(2, 99, nick="late", left_at=None),
        member(3, 100, nick="listed", left_at=None),
        member(4, 99, guild_id=OTHER_GUILD, nick="another guild's", left_at=None),
        entry_of("users", (2,), 99, username="of no guild"),
        entry_of("roles", (GUILD, 5), 99, name="of no member listing"),
    )
    assert written.inserted == {"members": 2, "users": 1, "roles": 1}
    found = await rows(database, "members")
    assert {key: value["nick"] for key, value in found.items()} == {
        (GUILD, 1): "before",
        (GUILD, 3): "listed",
        (OTHER_GUILD, 4): "another guild's",
    }


async def test_failed_listing_drops_nothing(database: Pool) -> None:
    failed = complete_run(100)
    failed.error = "half of it never came"
    await applied(database, Batch(runs=[failed]))
    await write(database, member(1, 5, nick="early", left_at=None))
    assert (await row(database, "members", (GUILD, 1)))["nick"] == "early"
    assert tuple(await database.fetchrow("SELECT state, stamp FROM sync_runs") or ()) == ("failed", None)


@pytest.mark.parametrize("text", ODD)
async def test_stores_any_text(database: Pool, text: str) -> None:
    await write(
        database,
        entry_of("guilds", (GUILD,), 1, name=text, features=sorted([text, "A", f"{text},{text}"])),
        entry_of("roles", (GUILD, 2), 1, name=text, tags='{"bot_id": "1"}'),
        member(3, 1, nick=text, roles=[], left_at=None),
    )
    found = await row(database, "guilds", (GUILD,))
    assert (found["name"], found["features"]) == (text, sorted([text, "A", f"{text},{text}"]))
    assert (await row(database, "roles", (GUILD, 2)))["tags"] == {"bot_id": "1"}
    assert (await row(database, "members", (GUILD, 3)))["nick"] == text
    await write(database, entry_of("guilds", (GUILD,), 2, name=text + "!", features=[text]))
    assert (await row(database, "guilds", (GUILD,)))["features"] == [text]
    (_, _, _, _, before, after), *_ = await history(database)
    assert (before["name"], after["name"]) == (text, text + "!")


async def test_stores_empty_null_and_large_arrays_and_jsonb(database: Pool) -> None:
    many = list(range(2**62, 2**62 + 250))
    overwrites = [{"id": str(number), "type": 0, "allow": "1"} for number in range(100)]
    await write(
        database,
        member(1, 1, roles=many, left_at=None),
        member(2, 1, roles=[], left_at=None),
        entry_of("guilds", (GUILD,), 1, features=None),
        entry_of("guilds", (OTHER_GUILD,), 1, features=[]),
        entry_of("channels", (GUILD, 1), 1, permission_overwrites=overwrites),
        entry_of("channels", (GUILD, 2), 1, permission_overwrites=None),
        entry_of("channels", (GUILD, 3), 1, permission_overwrites=[]),
    )
    assert [value["roles"] for _, value in sorted((await rows(database, "members")).items())] == [many, []]
    assert [value["features"] for _, value in sorted((await rows(database, "guilds")).items())] == [None, []]
    found = await rows(database, "channels")
    assert [found[GUILD, id]["permission_overwrites"] for id in (1, 2, 3)] == [overwrites, None, []]


async def test_writes_batches_larger_than_one_statement(database: Pool) -> None:
    await write(database, *(member(number, 1, nick=str(number), left_at=None) for number in range(1, 2502)))
    assert await database.fetchval("SELECT count(*) FROM members WHERE nick = user_id::text") == 2501


async def test_keeps_guilds_with_equal_ids_apart(database: Pool) -> None:
    await write(database, member(1, 1, nick="a", left_at=None), member(1, 1, guild_id=OTHER_GUILD, nick="b"))
    await write(database, member(1, 2, left_at=when(1), may_insert=False))
    assert (await row(database, "members", (GUILD, 1)))["left_at"] == when(1)
    assert (await row(database, "members", (OTHER_GUILD, 1)))["left_at"] is None


async def test_failed_statement_rolls_back_the_batch(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    await write(database, member(1, 1, nick="a", left_at=None))
    run = complete_run(50)
    run.reason = None  # type: ignore[assignment]
    batch = Batch(entries=dict([member(1, 60, nick="b", left_at=None)]), runs=[run])
    with pytest.raises(Exception, match="null value"):
        await applied(database, batch)
    assert (await row(database, "members", (GUILD, 1)))["nick"] == "a"
    assert await history(database) == []


async def test_retried_batch_counts_its_rows_once(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    record, failing = batch_module.insert_sync_run, [DatabaseUnavailable("the server is shutting down")]

    async def interrupted(*arguments: Any) -> None:
        if failing:
            raise failing.pop()
        await record(*arguments)

    monkeypatch.setattr(batch_module, "insert_sync_run", interrupted)
    listed: list[tuple[Any, ...]] = [(GUILD, 1, None, None, [], when(0), None, None, False, 0, None, 50)]
    batch = Batch(groups=[Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, listed)], runs=[complete_run(50)])
    with pytest.raises(DatabaseUnavailable):
        await applied(database, batch)
    await applied(database, batch)
    assert await database.fetchval("SELECT rows_inserted FROM sync_runs") == 1

"""Removals that Discord sends no event for: absences, cascades of deletions, and guilds missing from READY."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mirror.tables import (
    GUILD,
    OTHER_GUILD,
    applied,
    entry_of,
    history,
    row,
    rows,
    versions,
    when,
    write,
    write_groups,
)
from utils.database import Pool
from utils.mirror.records.rows import Absence, Run
from utils.mirror.write.batch import Batch, apply_cascade

TABLES = [("members", "left_at"), ("roles", "deleted_at"), ("channels", "deleted_at"), ("threads", "deleted_at")]


def gone(found: dict[Any, dict[str, Any]], column: str) -> set[Any]:
    return {key for key, value in found.items() if value[column] is not None}


@pytest.mark.parametrize(("table", "tombstone"), TABLES)
async def test_complete_listing_tombstones_absent_rows_of_its_guild(database: Pool, table: str, tombstone: str) -> None:
    await write(
        database,
        *(entry_of(table, (guild, id), 10, flags=0) for guild in (GUILD, OTHER_GUILD) for id in (1, 2, 3)),
        entry_of(table, (GUILD, 4), 50, flags=0),
    )
    written = await write_groups(database, absences=[Absence(table, GUILD, 50, {1})])
    assert written.removed[table] == 2
    found = await rows(database, table)
    assert gone(found, tombstone) == {(GUILD, 2), (GUILD, 3)}
    assert {found[GUILD, id]["stamp"] for id in (2, 3)} == {50}
    notes = await history(database)
    assert sorted((name, key, action, user) for name, key, action, user, _, _ in notes) == [
        (table, (GUILD, id), "remove", id if table == "members" else None) for id in (2, 3)
    ]
    assert all(before == {tombstone: None} and set(after) == {tombstone} for *_, before, after in notes)


async def test_each_listing_applies_its_own_stamp(database: Pool) -> None:
    await write(database, *(entry_of("members", (guild, 1), 10, flags=0) for guild in (GUILD, OTHER_GUILD)))
    await write_groups(
        database, absences=[Absence("members", GUILD, 10, set()), Absence("members", OTHER_GUILD, 11, set())]
    )
    assert gone(await rows(database, "members"), "left_at") == {(OTHER_GUILD, 1)}


async def test_existing_tombstones_stay_unchanged(database: Pool) -> None:
    await write(database, entry_of("members", (GUILD, 1), 10, left_at=when(1)))
    before = await versions(database, "members")
    await write_groups(database, absences=[Absence("members", GUILD, 50, set())])
    assert await versions(database, "members") == before
    assert await history(database) == []


async def test_empty_listing_of_an_unknown_guild_changes_nothing(database: Pool) -> None:
    await write(database, entry_of("members", (OTHER_GUILD, 1), 10, flags=0))
    written = await write_groups(database, absences=[Absence("members", GUILD, 50, set())])
    assert written.total == 0


async def test_run_counts_members_that_left(database: Pool) -> None:
    await write(database, *(entry_of("members", (GUILD, id), 10, flags=0) for id in range(1, 6)))
    run = Run(GUILD, when(0), "rest", "request", 50)
    await applied(database, Batch(absences=[Absence("members", GUILD, 50, {1, 2})], runs=[run]))
    assert tuple(await database.fetchrow("SELECT state, stamp, rows_left FROM sync_runs") or ()) == ("complete", 50, 3)


async def test_deleted_role_is_removed_from_its_members(database: Pool) -> None:
    await write(
        database,
        entry_of("roles", (GUILD, 5), 1, name="r"),
        entry_of("members", (GUILD, 1), 1, roles=[5, 6, 7]),
        entry_of("members", (GUILD, 2), 1, roles=[6]),
        entry_of("members", (GUILD, 3), 1, roles=[5]),
        entry_of("members", (OTHER_GUILD, 1), 1, roles=[5]),
    )
    await write(database, entry_of("roles", (GUILD, 5), 2, deleted_at=when(1), may_insert=False))
    found = {key: value["roles"] for key, value in (await rows(database, "members")).items()}
    assert found == {(GUILD, 1): [6, 7], (GUILD, 2): [6], (GUILD, 3): [], (OTHER_GUILD, 1): [5]}
    notes = [note for note in await history(database) if note[0] == "members"]
    assert sorted(notes, key=lambda note: note[1]) == [
        ("members", (GUILD, 1), "update", 1, {"roles": [5, 6, 7]}, {"roles": [6, 7]}),
        ("members", (GUILD, 3), "update", 3, {"roles": [5]}, {"roles": []}),
    ]


async def test_deleted_roles_leave_one_change_for_each_member(database: Pool) -> None:
    await write(database, entry_of("members", (GUILD, 1), 9, roles=[5, 6, 7]))
    async with database.transaction() as connection:
        await apply_cascade(connection, database, "roles", [(GUILD, 5, 2), (GUILD, 7, 3)])
    assert (await row(database, "members", (GUILD, 1)))["roles"] == [6]
    assert (await row(database, "members", (GUILD, 1)))["stamp"] == 9
    assert len(await history(database)) == 1


async def test_absent_role_is_removed_from_its_members(database: Pool) -> None:
    await write(database, entry_of("roles", (GUILD, 5), 1, name="r"), entry_of("members", (GUILD, 1), 1, roles=[5, 6]))
    await write_groups(database, absences=[Absence("roles", GUILD, 50, {6})])
    assert (await row(database, "members", (GUILD, 1)))["roles"] == [6]


async def test_deleted_channel_tombstones_its_threads(database: Pool) -> None:
    await write(
        database,
        entry_of("channels", (GUILD, 5), 1, name="c"),
        entry_of("threads", (GUILD, 10), 1, parent_id=5),
        entry_of("threads", (GUILD, 11), 1, parent_id=6),
        entry_of("threads", (GUILD, 12), 1, parent_id=5, deleted_at=when(1)),
        entry_of("threads", (OTHER_GUILD, 10), 1, parent_id=5),
    )
    await write(database, entry_of("channels", (GUILD, 5), 2, deleted_at=when(2), may_insert=False))
    found = await rows(database, "threads")
    assert gone(found, "deleted_at") == {(GUILD, 10), (GUILD, 12)}
    assert found[GUILD, 12]["deleted_at"] == when(1)
    notes = [(key, action) for name, key, action, *_ in await history(database) if name == "threads"]
    assert notes == [((GUILD, 10), "remove")]


async def test_absent_channel_tombstones_its_threads(database: Pool) -> None:
    await write(
        database,
        entry_of("channels", (GUILD, 5), 1, name="c"),
        entry_of("threads", (GUILD, 10), 1, parent_id=5),
    )
    await write_groups(database, absences=[Absence("channels", GUILD, 50, set())])
    assert gone(await rows(database, "threads"), "deleted_at") == {(GUILD, 10)}


async def test_ready_marks_missing_guilds_of_its_shard_as_left(database: Pool) -> None:
    guilds = {shard: [(number << 22) for number in range(1, 12) if number % 2 == shard] for shard in (0, 1)}
    await write(database, *(entry_of("guilds", (id,), 10, name="g") for ids in guilds.values() for id in ids))
    kept, *left = guilds[1]
    late = left.pop()
    await write(database, entry_of("guilds", (late,), 60, name="came after READY"))
    await applied(database, Batch(ready=[(1, 2, {kept}, 50)]))
    found = await rows(database, "guilds")
    assert gone(found, "left_at") == {(id,) for id in left}
    assert all(not found[id,]["is_active"] for id in left)
    notes = await history(database)
    assert sorted(key for _, key, action, *_ in notes if action == "remove") == [(id,) for id in left]


async def test_rejoined_guild_is_active_again(database: Pool) -> None:
    await write(database, entry_of("guilds", (GUILD,), 10, name="g", left_at=None))
    await applied(database, Batch(ready=[((GUILD >> 22) % 1, 1, set(), 50)]))
    await write(database, entry_of("guilds", (GUILD,), 60, name="g", left_at=None))
    assert (await row(database, "guilds", (GUILD,)))["left_at"] is None
    assert [action for _, _, action, *_ in await history(database)] == ["remove", "return"]


async def test_leaving_a_guild_keeps_its_members(database: Pool) -> None:
    await write(database, entry_of("guilds", (GUILD,), 1, name="g"), entry_of("members", (GUILD, 1), 1, flags=0))
    await write(database, entry_of("guilds", (GUILD,), 2, left_at=when(1), may_insert=False))
    assert (await row(database, "members", (GUILD, 1)))["left_at"] is None

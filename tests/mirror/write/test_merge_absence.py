"""What is gone: by a complete listing, with a deleted role or channel, and with the guilds that READY leaves out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.mirror.tables import (
    GUILD,
    OTHER_GUILD,
    applied,
    history,
    row,
    rows,
    said,
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
async def test_a_complete_listing_buries_what_it_does_not_show_in_its_own_guild(
    database: Pool, table: str, tombstone: str
) -> None:
    await write(
        database,
        *(said(table, (guild, id), 10, flags=0) for guild in (GUILD, OTHER_GUILD) for id in (1, 2, 3)),
        said(table, (GUILD, 4), 50, flags=0),
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


async def test_listings_of_several_guilds_bury_by_their_own_stamps(database: Pool) -> None:
    await write(database, *(said("members", (guild, 1), 10, flags=0) for guild in (GUILD, OTHER_GUILD)))
    await write_groups(
        database, absences=[Absence("members", GUILD, 10, set()), Absence("members", OTHER_GUILD, 11, set())]
    )
    assert gone(await rows(database, "members"), "left_at") == {(OTHER_GUILD, 1)}


async def test_what_is_gone_already_is_not_buried_again(database: Pool) -> None:
    await write(database, said("members", (GUILD, 1), 10, left_at=when(1)))
    before = await versions(database, "members")
    await write_groups(database, absences=[Absence("members", GUILD, 50, set())])
    assert await versions(database, "members") == before
    assert await history(database) == []


async def test_an_empty_listing_of_an_unknown_guild_buries_nobody(database: Pool) -> None:
    await write(database, said("members", (OTHER_GUILD, 1), 10, flags=0))
    written = await write_groups(database, absences=[Absence("members", GUILD, 50, set())])
    assert written.total == 0


async def test_the_run_of_a_listing_counts_who_left(database: Pool) -> None:
    await write(database, *(said("members", (GUILD, id), 10, flags=0) for id in range(1, 6)))
    run = Run(GUILD, when(0), "rest", "request", 50)
    await applied(database, Batch(absences=[Absence("members", GUILD, 50, {1, 2})], runs=[run]))
    assert tuple(await database.fetchrow("SELECT state, stamp, rows_left FROM sync_runs") or ()) == ("complete", 50, 3)


async def test_a_deleted_role_leaves_the_members_of_its_guild_alone(database: Pool) -> None:
    await write(
        database,
        said("roles", (GUILD, 5), 1, name="r"),
        said("members", (GUILD, 1), 1, roles=[5, 6, 7]),
        said("members", (GUILD, 2), 1, roles=[6]),
        said("members", (GUILD, 3), 1, roles=[5]),
        said("members", (OTHER_GUILD, 1), 1, roles=[5]),
    )
    await write(database, said("roles", (GUILD, 5), 2, deleted_at=when(1), may_insert=False))
    found = {key: value["roles"] for key, value in (await rows(database, "members")).items()}
    assert found == {(GUILD, 1): [6, 7], (GUILD, 2): [6], (GUILD, 3): [], (OTHER_GUILD, 1): [5]}
    notes = [note for note in await history(database) if note[0] == "members"]
    assert sorted(notes, key=lambda note: note[1]) == [
        ("members", (GUILD, 1), "update", 1, {"roles": [5, 6, 7]}, {"roles": [6, 7]}),
        ("members", (GUILD, 3), "update", 3, {"roles": [5]}, {"roles": []}),
    ]


async def test_several_roles_deleted_at_once_leave_one_change_each_member(database: Pool) -> None:
    await write(database, said("members", (GUILD, 1), 9, roles=[5, 6, 7]))
    async with database.transaction() as connection:
        await apply_cascade(connection, database, "roles", [(GUILD, 5, 2), (GUILD, 7, 3)])
    assert (await row(database, "members", (GUILD, 1)))["roles"] == [6]
    assert (await row(database, "members", (GUILD, 1)))["stamp"] == 9
    assert len(await history(database)) == 1


async def test_a_role_that_a_listing_did_not_show_leaves_the_members_too(database: Pool) -> None:
    await write(database, said("roles", (GUILD, 5), 1, name="r"), said("members", (GUILD, 1), 1, roles=[5, 6]))
    await write_groups(database, absences=[Absence("roles", GUILD, 50, {6})])
    assert (await row(database, "members", (GUILD, 1)))["roles"] == [6]


async def test_a_deleted_channel_takes_its_own_threads_with_it(database: Pool) -> None:
    await write(
        database,
        said("channels", (GUILD, 5), 1, name="c"),
        said("threads", (GUILD, 10), 1, parent_id=5),
        said("threads", (GUILD, 11), 1, parent_id=6),
        said("threads", (GUILD, 12), 1, parent_id=5, deleted_at=when(1)),
        said("threads", (OTHER_GUILD, 10), 1, parent_id=5),
    )
    await write(database, said("channels", (GUILD, 5), 2, deleted_at=when(2), may_insert=False))
    found = await rows(database, "threads")
    assert gone(found, "deleted_at") == {(GUILD, 10), (GUILD, 12)}
    assert found[GUILD, 12]["deleted_at"] == when(1)
    notes = [(key, action) for name, key, action, *_ in await history(database) if name == "threads"]
    assert notes == [((GUILD, 10), "remove")]


async def test_a_channel_that_a_listing_did_not_show_takes_its_threads_too(database: Pool) -> None:
    await write(database, said("channels", (GUILD, 5), 1, name="c"), said("threads", (GUILD, 10), 1, parent_id=5))
    await write_groups(database, absences=[Absence("channels", GUILD, 50, set())])
    assert gone(await rows(database, "threads"), "deleted_at") == {(GUILD, 10)}


async def test_ready_buries_the_guilds_of_its_shard_that_it_does_not_name(database: Pool) -> None:
    guilds = {shard: [(number << 22) for number in range(1, 12) if number % 2 == shard] for shard in (0, 1)}
    await write(database, *(said("guilds", (id,), 10, name="g") for ids in guilds.values() for id in ids))
    kept, *left = guilds[1]
    late = left.pop()
    await write(database, said("guilds", (late,), 60, name="came after READY"))
    await applied(database, Batch(ready=[(1, 2, {kept}, 50)]))
    found = await rows(database, "guilds")
    assert gone(found, "left_at") == {(id,) for id in left}
    assert all(not found[id,]["is_active"] for id in left)
    notes = await history(database)
    assert sorted(key for _, key, action, *_ in notes if action == "remove") == [(id,) for id in left]


async def test_a_guild_that_was_left_and_is_joined_again_returns(database: Pool) -> None:
    await write(database, said("guilds", (GUILD,), 10, name="g", left_at=None))
    await applied(database, Batch(ready=[((GUILD >> 22) % 1, 1, set(), 50)]))
    await write(database, said("guilds", (GUILD,), 60, name="g", left_at=None))
    assert (await row(database, "guilds", (GUILD,)))["left_at"] is None
    assert [action for _, _, action, *_ in await history(database)] == ["remove", "return"]


async def test_members_of_a_guild_that_was_left_stay_as_they_were(database: Pool) -> None:
    await write(database, said("guilds", (GUILD,), 1, name="g"), said("members", (GUILD, 1), 1, flags=0))
    await write(database, said("guilds", (GUILD,), 2, left_at=when(1), may_insert=False))
    assert (await row(database, "members", (GUILD, 1)))["left_at"] is None

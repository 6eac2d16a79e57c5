"""Large listings through staging: what is written, what is protected, and what a failed one leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.mirror.tables import (
    GUILD,
    OTHER_GUILD,
    Received,
    applied,
    complete_run,
    empty,
    entry_of,
    history,
    member_record,
    page,
    row,
    rows,
    user_record,
    versions,
    when,
    write,
    writer_of,
)
from utils.database import Pool
from utils.exceptions import DatabaseError, SyncError
from utils.mirror.reconcile.staging import StagedListing
from utils.mirror.records.rows import Absence, Group, Mode, Row, Run
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS
from utils.mirror.translate.pages import Page
from utils.mirror.write.batch import Batch
from utils.mirror.write.writer import MirrorWriter

Members = dict[int, dict[str, Any]]


@pytest.fixture
async def writer(database: Pool) -> MirrorWriter:
    return await writer_of(database)


async def stage(
    writer: MirrorWriter, pages: list[Page], stamp: int, *, source: str = "gateway", breaks: SyncError | None = None
) -> Run:
    listing = Received(writer.pool, pages, stamp, overlay=writer.overlay, source=source, breaks=breaks)
    return await StagedListing(writer, listing, page_timeout=5.0).write([])


def counts(run: Run) -> tuple[int, int, int]:
    return run.rows_inserted, run.rows_updated, run.rows_left


def listed(ids: range, stamp: int, **values: Any) -> list[Page]:
    return [page([member_record(id, stamp, **values)]) for id in ids]


async def test_first_listing_inserts_members_without_history(database: Pool, writer: MirrorWriter) -> None:
    run = await stage(writer, listed(range(1, 60), 10, nick="n"), 10)
    assert counts(run) == (59, 0, 0)
    assert (run.pages, run.rows_seen) == (59, 59)
    assert len(await rows(database, "members")) == len(await rows(database, "users")) == 59
    assert await history(database) == []
    recorded = await database.fetchrow("SELECT state, source, stamp, pages, rows_seen, rows_inserted FROM sync_runs")
    assert tuple(recorded or ()) == ("complete", "gateway", 10, 59, 59, 59)


@pytest.mark.parametrize("source", ["gateway", "rest"])
async def test_equal_listing_writes_nothing(database: Pool, writer: MirrorWriter, source: str) -> None:
    await stage(writer, listed(range(1, 60), 10, nick="n", roles=[3]), 10, source=source)
    before = await versions(database, "members"), await versions(database, "users")
    run = await stage(writer, listed(range(1, 60), 20, nick="n", roles=[3]), 20, source=source)
    assert counts(run) == (0, 0, 0)
    assert (await versions(database, "members"), await versions(database, "users")) == before
    assert await history(database) == [] == await history(database, "user_changes")
    async with database.acquire() as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
        dead = "SELECT sum(n_tup_upd + n_tup_del) FROM pg_stat_user_tables WHERE relname IN ('members', 'users')"
        assert await connection.fetchval(dead) == 0


async def test_distinguishes_changes_leaves_joins_and_returns(database: Pool, writer: MirrorWriter) -> None:
    await stage(writer, listed(range(1, 41), 10, nick="n"), 10)
    await write(database, entry_of("members", (GUILD, 40), 15, left_at=when(1), may_insert=False))
    await write(database, entry_of("members", (OTHER_GUILD, 2), 1, nick="elsewhere"))
    after = [
        page([member_record(1, 20, nick="changed")], [user_record(1, 20, username="renamed")]),
        *listed(range(3, 42), 20, nick="n"),
    ]
    run = await stage(writer, after, 20)
    assert counts(run) == (1, 2, 1)
    found = await rows(database, "members")
    assert found[GUILD, 1]["nick"] == "changed"
    assert {key for key, value in found.items() if value["left_at"]} == {(GUILD, 2)}
    assert sorted((key[1], action) for _, key, action, *_ in await history(database)) == [
        (1, "update"), (2, "remove"), (40, "remove"), (40, "return"),
    ]  # fmt: skip
    assert await history(database, "user_changes") == [
        ("users", (1,), "update", 1, {"username": "user 1"}, {"username": "renamed"})
    ]


@pytest.mark.parametrize("known", [range(1, 3), range(1, 301)])
async def test_member_listed_twice_is_written_once(database: Pool, writer: MirrorWriter, known: range) -> None:
    await stage(writer, listed(known, 10), 10)
    twice = [*listed(range(1, 302), 20, nick="new"), *listed(range(299, 302), 20, nick="new")]
    await stage(writer, twice, 20)
    assert {value["nick"] for value in (await rows(database, "members")).values()} == {"new"}
    assert len(await rows(database, "members")) == 301
    assert len(await history(database)) == len(known)


async def test_first_listing_with_a_duplicate_succeeds_over_rest(database: Pool, writer: MirrorWriter) -> None:
    twice = [*listed(range(1, 9), 10), *listed(range(8, 9), 10)]
    with pytest.raises(ExceptionGroup) as caught:
        await stage(writer, twice, 10)
    assert caught.group_contains(DatabaseError)
    assert await rows(database, "members") == {}
    run = await stage(writer, twice, 20, source="rest")
    assert counts(run) == (8, 0, 0)


async def test_live_rows_beat_an_older_listing(database: Pool, writer: MirrorWriter) -> None:
    await stage(writer, listed(range(1, 41), 10, nick="n"), 10)
    writer.overlay.open("listing")
    writer.put(Row("members", (GUILD, 1), {"nick": "n"}), 25)  # no change, so the table has no trace of it
    writer.put(Row("members", (GUILD, 2), {"nick": "live"}), 26)
    writer.put(Row("users", (3,), {"username": "user 3"}), 27)
    writer.put(Row("members", (GUILD, 50), {"nick": "joined", "left_at": None}), 28)
    pages = [page([member_record(id, 20, nick="stale")], [user_record(id, 20, username="stale")]) for id in range(1, 5)]
    await stage(writer, [*pages, *listed(range(5, 41), 20, nick="n")], 20)
    found, users = await rows(database, "members"), await rows(database, "users")
    assert [found[GUILD, id]["nick"] for id in (1, 2, 3, 4, 50)] == ["n", "live", "stale", "stale", "joined"]
    assert [users[id,]["username"] for id in (3, 4)] == ["user 3", "stale"]
    assert found[GUILD, 50]["left_at"] is None


@pytest.mark.parametrize("known", [range(0), range(1, 41)])
async def test_failed_listing_leaves_members_unchanged(database: Pool, writer: MirrorWriter, known: range) -> None:
    await applied(
        database,
        Batch(groups=[Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, [member_record(i, 1) for i in known])]),
    )
    before = await versions(database, "members")
    with pytest.raises(ExceptionGroup) as caught:
        await stage(writer, listed(range(20, 80), 20, nick="new"), 20, breaks=SyncError("the socket dropped"))
    assert caught.group_contains(SyncError)
    assert await versions(database, "members") == before
    assert await history(database) == []
    assert await database.fetchval("SELECT count(*) FROM sync_runs") == 0
    writer.put(Row("members", (GUILD, 5), {"nick": "live", "left_at": None}), 30)
    await writer.flush()
    assert (await row(database, "members", (GUILD, 5)))["nick"] == "live", "the hold was not released"


@pytest.mark.parametrize("breaks", [None, SyncError("the socket dropped")])
async def test_leaves_no_staging_table_or_setting_behind(
    database: Pool, writer: MirrorWriter, breaks: SyncError | None
) -> None:
    await write(database, entry_of("members", (GUILD, 1), 1, nick="n"))
    try:
        await stage(writer, listed(range(1, 41), 20), 20, breaks=breaks)
    except ExceptionGroup:
        assert breaks is not None
    assert database.pool_stats()["active"] == 0
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relpersistence = 't'") == 0
    for _ in range(database.pool_stats()["size"]):
        async with database.acquire() as connection:
            assert await connection.fetchval("SELECT current_setting('enable_nestloop')") == "on"
            assert await connection.fetchval("SELECT current_setting('work_mem')") != "64MB"


async def test_member_without_a_readable_id_prevents_tombstones(database: Pool, writer: MirrorWriter) -> None:
    await stage(writer, listed(range(1, 41), 10), 10)
    unreadable = page([member_record(1, 20)])
    unreadable.unreadable.append(None)
    assert counts(await stage(writer, [unreadable], 20)) == (0, 0, 0)
    named = page([member_record(1, 30)])
    named.unreadable.append(2)
    assert counts(await stage(writer, [named], 30)) == (0, 0, 38)
    assert (await row(database, "members", (GUILD, 2)))["left_at"] is None


async def test_superseded_listing_writes_nothing(database: Pool, writer: MirrorWriter) -> None:
    await stage(writer, listed(range(1, 41), 10, nick="n"), 10)
    await applied(database, Batch(runs=[complete_run(100)]))
    before = await rows(database, "members")
    with pytest.raises(ExceptionGroup) as caught:
        await stage(writer, listed(range(2, 60), 50, nick="stale"), 50)
    assert caught.group_contains(SyncError)
    assert await rows(database, "members") == before


async def test_failed_listing_keeps_its_users(database: Pool, writer: MirrorWriter) -> None:
    """Users are merged in transactions of their own: a user row is valid even if the listing fails."""
    with pytest.raises(ExceptionGroup):
        await stage(writer, listed(range(1, 60), 10), 10, breaks=SyncError("the socket dropped"))
    assert await rows(database, "members") == {}
    run = await stage(writer, listed(range(1, 60), 20), 20)
    assert counts(run) == (59, 0, 0)
    assert await history(database, "user_changes") == []


MEMBER = st.fixed_dictionaries(
    {
        "nick": st.sampled_from([None, "a", "b"]),
        "roles": st.sampled_from([[], [1], [1, 2]]),
        "timed_out_until": st.sampled_from([None, when(1)]),
    }
)
MEMBERS = st.dictionaries(st.integers(1, 8), MEMBER, max_size=8)


async def state(database: Pool) -> tuple[Any, ...]:
    notes = [await history(database, table) for table in ("changes", "user_changes")]
    shown = [[(*note[:4], sorted(note[4]), sorted(note[5])) for note in found] for found in notes]
    found = await rows(database, "members")
    for value in found.values():  # the times of two listings differ
        value["left_at"] = value["left_at"] is not None
    runs = "SELECT state, rows_inserted, rows_updated, rows_left FROM sync_runs"
    return (
        found,
        await rows(database, "users"),
        sorted(map(repr, shown[0])),
        sorted(map(repr, shown[1])),
        ([tuple(run) for run in await database.fetch(runs)]),
    )


@examples(25)
@given(before=MEMBERS, gone=st.sets(st.integers(1, 8)), after=MEMBERS, newer=st.sets(st.integers(1, 8)))
async def test_staging_and_small_batch_leave_equal_tables(
    database: Pool, before: Members, gone: set[int], after: Members, newer: set[int]
) -> None:
    records = [member_record(id, 20, **values) for id, values in after.items()]
    users = [user_record(id, 20, username=str(values["nick"])) for id, values in after.items()]
    states = []
    for way in ("staged", "small"):
        await empty(database)
        for id, values in before.items():
            left = {"left_at": when(5) if id in gone else None}
            stamp = 30 if id in newer else 10
            await write(
                database,
                entry_of("members", (GUILD, id), stamp, **{"pending": False, "flags": 0, **values, **left}),
            )
        writer = await writer_of(database)
        if way == "staged":
            await stage(writer, [Page(users, records, len(records))], 20, source="rest")
        else:
            groups = [
                Group("users", LISTED_USER_COLUMNS, Mode.MERGE, list(users)),
                Group("members", LISTED_MEMBER_COLUMNS, Mode.MERGE, list(records)),
            ]
            run = Run(GUILD, when(0), "rest", "request", 20)
            await applied(
                database, Batch(groups=groups, absences=[Absence("members", GUILD, 20, set(after))], runs=[run])
            )
        states.append(await state(database))
    assert states[0] == states[1]

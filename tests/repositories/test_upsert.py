"""Bulk upserts."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from typing import Any

import pytest

from models import Channel, Guild, Member
from tests.repositories.conftest import NOW
from utils.database import Pool
from utils.exceptions import Conflict, DatabaseError, ValidationError
from utils.repositories import (
    ChannelRepository,
    GuildRepository,
    MemberRepository,
    MemberStatsRepository,
    RoleRepository,
    SessionFactory,
    UserRepository,
)


def member_rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(4)
    rows = [
        {
            "guild_id": 1, "user_id": id, "nick": f"nick {id}" if id % 3 else None, "avatar": None,
            "roles": sorted(rng.sample(range(100, 150), id % 4)), "joined_at": NOW, "premium_since": None,
            "timed_out_until": None, "pending": False, "flags": 0,
        }
        for id in range(1, count + 1)
    ]  # fmt: skip
    rng.shuffle(rows)
    return rows


async def test_upsert_writes_and_counts_only_changed_rows(sessions: SessionFactory, database: Pool) -> None:
    members = MemberRepository(sessions)
    rows = member_rows(250)
    assert await members.upsert_many(rows, chunk=100) == 250
    before = await database.fetch("SELECT *, xmin FROM members ORDER BY user_id")
    assert await members.upsert_many(rows) == 0
    assert await database.fetch("SELECT *, xmin FROM members ORDER BY user_id") == before
    assert await database.fetchval("SELECT count(*) FROM members WHERE xmax <> 0") == 0, "unchanged rows are locked"
    rows[7] = {**rows[7], "nick": "new", "roles": [1, 2, 3]}
    assert await members.upsert_many([*rows, {**rows[0], "user_id": 900}], chunk=100) == 2
    changed = await members.get((1, rows[7]["user_id"]))
    assert (changed.nick, changed.roles) == ("new", [1, 2, 3])
    assert changed.updated_at > before[0]["updated_at"]


async def test_upsert_keeps_columns_not_given(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=1, name="One", owner_id=5))
    assert await guilds.upsert_many([{"id": 1, "name": "Uno"}, {"id": 2, "name": "Due"}]) == 2
    one = await guilds.get(1)
    assert (one.name, one.owner_id) == ("Uno", 5)


async def test_upsert_uses_last_row_of_a_key(sessions: SessionFactory) -> None:
    users = UserRepository(sessions)
    assert await users.upsert_many([{"id": 1, "username": "a"}, {"username": "b", "id": 1}]) == 1
    assert (await users.get(1)).username == "b"


async def test_upsert_clears_tombstone_unless_column_is_given(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    await members.upsert_many([{"guild_id": 1, "user_id": 1}])
    await members.delete((1, 1))
    assert await members.upsert_many([{"guild_id": 1, "user_id": 1, "left_at": NOW}]) == 1
    assert (await members.get((1, 1), include_deleted=True)).left_at == NOW
    assert await members.upsert_many([{"guild_id": 1, "user_id": 1}]) == 1
    assert (await members.get((1, 1))).left_at is None
    assert await members.upsert_many([{"guild_id": 1, "user_id": 1}]) == 0


async def test_upsert_of_keys_only_inserts_missing_rows(sessions: SessionFactory) -> None:
    stats = MemberStatsRepository(sessions)
    await stats.add_xp(1, 1, 5)
    assert await stats.upsert_many({"guild_id": 1, "user_id": id} for id in (2, 1)) == 1
    assert (await stats.get((1, 1))).xp == 5


async def test_upsert_round_trips_arrays_and_json(sessions: SessionFactory, database: Pool) -> None:
    odd = ["", "NULL", 'a "b" \\ {c},d', "ä\n\t'", "null"]
    guilds, channels = GuildRepository(sessions), ChannelRepository(sessions)
    await guilds.upsert_many([{"id": 1, "features": odd}, {"id": 2, "features": []}, {"id": 3, "features": None}])
    assert [(await guilds.get(id)).features for id in (1, 2, 3)] == [odd, [], None]
    overwrites = [{"id": str(1 << 60), "type": 0, "allow": 'x"\\'}, {"nested": [[1, 2], [3]]}]
    await channels.upsert_many(
        {"guild_id": 1, "id": id, "permission_overwrites": value, "hidden": False, "name": "ü"}
        for id, value in enumerate((overwrites, [], None), 1)
    )
    got = [row.permission_overwrites async for row in channels.stream(Channel.guild_id == 1)]
    assert got == [overwrites, [], None]
    assert await database.fetchval("SELECT count(*) FROM channels WHERE permission_overwrites IS NULL") == 1


async def test_upsert_is_atomic(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    rows: list[dict[str, Any]] = [{"guild_id": 1, "user_id": id, "roles": []} for id in range(1, 30)]
    rows[-1]["roles"] = None
    with pytest.raises(Conflict):
        await members.upsert_many(rows, chunk=5)
    assert await members.count() == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 1, "nmae": "x"}], "guilds has no writable columns nmae"),
        ([{"id": 1, "is_active": True}], "no writable columns is_active"),
        ([{"name": "x"}], "have no id"),
        ([{"id": 1, "name": "x"}, {"id": 2}], "row 1 of guilds and row 0 differ in the columns name"),
        ([{"id": 1}, {"id": "2"}], "cannot be compared"),
        ([{"id": 1, "features": 5}], "guilds.features has a value that cannot be stored: 'int' object is not iterable"),
    ],
)
async def test_upsert_rejects_invalid_rows(sessions: SessionFactory, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        await GuildRepository(sessions).upsert_many(rows)


async def test_upsert_rejects_values_that_are_not_json(sessions: SessionFactory) -> None:
    with pytest.raises(ValidationError, match=r"roles\.tags has a value that cannot be stored"):
        await RoleRepository(sessions).upsert_many([{"guild_id": 1, "id": 1, "tags": {"of": object()}}])


async def test_upsert_of_no_rows_opens_no_session() -> None:
    def open_session() -> Any:
        raise AssertionError

    assert await GuildRepository(open_session).upsert_many([]) == 0


async def test_upsert_of_nul_character_raises_database_error(sessions: SessionFactory) -> None:
    with pytest.raises(DatabaseError):
        await GuildRepository(sessions).upsert_many([{"id": 1, "name": "nul\x00"}])


async def test_concurrent_upserts_do_not_deadlock(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    rows = member_rows(300)

    async def write(seed: int) -> None:
        own_rows = [{**row, "flags": seed} for row in rows]
        random.Random(seed).shuffle(own_rows)
        await members.upsert_many(own_rows, chunk=40)

    await asyncio.gather(*(write(seed) for seed in range(4)))
    assert len({row.flags for row in (await members.list(Member.guild_id == 1, limit=1000)).items}) == 1


async def test_large_upsert_does_not_block_the_loop(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    rows = member_rows(10_000)
    longest = 0.0

    async def measure_turns() -> None:
        nonlocal longest
        while True:
            started = time.thread_time()
            await asyncio.sleep(0)
            longest = max(longest, time.thread_time() - started)

    gc.collect()
    gc.freeze()  # as the bot does at its start: what other tests have left would be collected in one turn
    try:
        task = asyncio.create_task(measure_turns())
        await asyncio.sleep(0)
        began = time.thread_time()
        assert await members.upsert_many(rows) == 10_000
        total = time.thread_time() - began
        task.cancel()
    finally:
        gc.unfreeze()
    assert longest < total / 3, "one turn of the loop did most of the work"

"""Many rows at once."""

from __future__ import annotations

import asyncio
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
    Sessions,
    UserRepository,
)


def rows_of(count: int) -> list[dict[str, Any]]:
    chance = random.Random(4)
    rows = [
        {
            "guild_id": 1, "user_id": id, "nick": f"nick {id}" if id % 3 else None, "avatar": None,
            "roles": sorted(chance.sample(range(100, 150), id % 4)), "joined_at": NOW, "premium_since": None,
            "timed_out_until": None, "pending": False, "flags": 0,
        }
        for id in range(1, count + 1)
    ]  # fmt: skip
    chance.shuffle(rows)
    return rows


async def test_rows_are_written_once_and_counted_only_when_they_differ(sessions: Sessions, database: Pool) -> None:
    members = MemberRepository(sessions)
    rows = rows_of(250)
    assert await members.upsert_many(rows, chunk=100) == 250
    before = await database.fetch("SELECT *, xmin FROM members ORDER BY user_id")
    assert await members.upsert_many(rows) == 0
    assert await database.fetch("SELECT *, xmin FROM members ORDER BY user_id") == before
    assert await database.fetchval("SELECT count(*) FROM members WHERE xmax <> 0") == 0, "rows as they were get no lock"
    rows[7] = {**rows[7], "nick": "new", "roles": [1, 2, 3]}
    assert await members.upsert_many([*rows, {**rows[0], "user_id": 900}], chunk=100) == 2
    changed = await members.get((1, rows[7]["user_id"]))
    assert (changed.nick, changed.roles) == ("new", [1, 2, 3])
    assert changed.updated_at > before[0]["updated_at"]


async def test_columns_left_out_keep_what_they_have(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=1, name="One", owner_id=5))
    assert await guilds.upsert_many([{"id": 1, "name": "Uno"}, {"id": 2, "name": "Due"}]) == 2
    one = await guilds.get(1)
    assert (one.name, one.owner_id) == ("Uno", 5)


async def test_of_two_rows_with_one_key_the_later_counts(sessions: Sessions) -> None:
    users = UserRepository(sessions)
    assert await users.upsert_many([{"id": 1, "username": "a"}, {"username": "b", "id": 1}]) == 1
    assert (await users.get(1)).username == "b"


async def test_a_row_that_had_gone_is_there_again_unless_the_rows_say_otherwise(sessions: Sessions) -> None:
    members = MemberRepository(sessions)
    await members.upsert_many([{"guild_id": 1, "user_id": 1}])
    await members.delete((1, 1))
    assert await members.upsert_many([{"guild_id": 1, "user_id": 1, "left_at": NOW}]) == 1
    assert (await members.get((1, 1), include_gone=True)).left_at == NOW
    assert await members.upsert_many([{"guild_id": 1, "user_id": 1}]) == 1
    assert (await members.get((1, 1))).left_at is None
    assert await members.upsert_many([{"guild_id": 1, "user_id": 1}]) == 0


async def test_keys_alone_add_what_is_missing(sessions: Sessions) -> None:
    stats = MemberStatsRepository(sessions)
    await stats.add_xp(1, 1, 5)
    assert await stats.upsert_many({"guild_id": 1, "user_id": id} for id in (2, 1)) == 1
    assert (await stats.get((1, 1))).xp == 5


async def test_arrays_and_json_arrive_as_they_were_given(sessions: Sessions, database: Pool) -> None:
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


async def test_all_rows_or_none(sessions: Sessions) -> None:
    members = MemberRepository(sessions)
    rows: list[dict[str, Any]] = [{"guild_id": 1, "user_id": id, "roles": []} for id in range(1, 30)]
    rows[-1]["roles"] = None
    with pytest.raises(Conflict):
        await members.upsert_many(rows, chunk=5)
    assert await members.count() == 0


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"id": 1, "nmae": "x"}], "nmae cannot be written in guilds"),
        ([{"id": 1, "is_active": True}], "is_active cannot be written"),
        ([{"name": "x"}], "lack id"),
        ([{"id": 1, "name": "x"}, {"id": 2}], "row 1 of guilds differs from row 0 in the columns name"),
        ([{"id": 1}, {"id": "2"}], "whole numbers"),
        ([{"id": 1, "features": 5}], "guilds.features cannot be written: 'int' object is not iterable"),
    ],
)
async def test_rows_that_do_not_fit_are_refused_with_what_is_wrong(
    sessions: Sessions, rows: list[dict[str, Any]], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        await GuildRepository(sessions).upsert_many(rows)


async def test_what_is_no_json_is_refused(sessions: Sessions) -> None:
    with pytest.raises(ValidationError, match=r"roles\.tags cannot be written"):
        await RoleRepository(sessions).upsert_many([{"guild_id": 1, "id": 1, "tags": {"of": object()}}])


async def test_no_rows_need_no_database() -> None:
    def none() -> Any:
        raise AssertionError

    assert await GuildRepository(none).upsert_many([]) == 0


async def test_text_that_postgres_cannot_hold_is_our_own_error(sessions: Sessions) -> None:
    with pytest.raises(DatabaseError):
        await GuildRepository(sessions).upsert_many([{"id": 1, "name": "nul\x00"}])


async def test_writers_of_the_same_rows_in_any_order_do_not_block_each_other_for_good(sessions: Sessions) -> None:
    members = MemberRepository(sessions)
    rows = rows_of(300)

    async def write(seed: int) -> None:
        mine = [{**row, "flags": seed} for row in rows]
        random.Random(seed).shuffle(mine)
        await members.upsert_many(mine, chunk=40)

    await asyncio.gather(*(write(seed) for seed in range(4)))
    assert len({row.flags for row in (await members.list(Member.guild_id == 1, limit=1000)).items}) == 1


async def test_a_long_upsert_lets_the_loop_go_on(sessions: Sessions) -> None:
    members = MemberRepository(sessions)
    rows = rows_of(10_000)
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        while True:
            started = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - started)

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0)
    assert await members.upsert_many(rows) == 10_000
    beating.cancel()
    assert longest < 0.5

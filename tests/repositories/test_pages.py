"""Pages by key: every row exactly once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from models import Member
from utils.database import Pool
from utils.repositories import GuildRepository, MemberRepository, Sessions

KEYS = st.sets(st.tuples(st.integers(1, 4), st.integers(1, 2**63 - 1) | st.integers(1, 40)), max_size=60)


@settings(max_examples=40)
@given(keys=KEYS, limit=st.integers(1, 70), gone=st.integers(2, 5))
async def test_every_row_comes_exactly_once_whatever_the_limit(
    sessions: Sessions, database: Pool, keys: set[tuple[int, int]], limit: int, gone: int
) -> None:
    await database.execute("TRUNCATE members")
    members = MemberRepository(sessions)
    await members.upsert_many({"guild_id": guild, "user_id": user} for guild, user in keys)
    for number, key in enumerate(sorted(keys)):
        if number % gone == 0:
            await members.delete(key)
    there = [key for number, key in enumerate(sorted(keys)) if number % gone]

    seen: list[tuple[int, int]] = []
    after: tuple[int, int] | None = None
    while True:
        page = await members.list(after=after, limit=limit)
        assert len(page.items) <= limit
        seen += [(row.guild_id, row.user_id) for row in page.items]
        after = page.next
        if after is None:
            break
        assert len(page.items) == limit
        assert after == seen[-1]
    assert seen == there

    pages = [page async for page in members.pages(limit=limit, include_gone=True)]
    assert [(row.guild_id, row.user_id) for page in pages for row in page.items] == sorted(keys)
    assert all(page.items for page in pages)
    ones = [row.user_id async for row in members.stream(Member.guild_id == 2)]
    assert ones == [user for guild, user in there if guild == 2]
    within = [page async for page in members.pages(Member.guild_id == 2, limit=limit)]
    assert [row.user_id for page in within for row in page.items] == ones
    beyond = await members.list(Member.guild_id == 2, after=(1, 1), limit=70)
    assert [row.user_id for row in beyond.items] == ones
    assert await members.count(Member.guild_id == 2) == len(ones)


async def test_rows_that_come_and_go_meanwhile_shift_no_page(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    await guilds.upsert_many({"id": id} for id in range(10, 100, 10))
    first = await guilds.list(limit=4)
    assert [row.id for row in first.items] == [10, 20, 30, 40]
    await guilds.upsert_many([{"id": 15}, {"id": 55}])
    await guilds.delete(20)
    await guilds.delete(50)
    second = await guilds.list(limit=4, after=first.next)
    assert [row.id for row in second.items] == [55, 60, 70, 80]


async def test_a_late_page_of_a_guild_reads_no_more_than_an_early_one(sessions: Sessions, database: Pool) -> None:
    await database.execute("INSERT INTO members (guild_id, user_id) SELECT 1, id FROM generate_series(1, 20000) AS id")
    await database.execute("VACUUM ANALYZE members")
    repository = MemberRepository(sessions)
    where = Member.guild_id == 1
    query = select(Member).where(where, repository._beyond((1, 19_000), (where,)))
    async with repository.session() as session:
        connection = await session.connection()
        compiled = query.order_by(Member.guild_id, Member.user_id).limit(11).compile(dialect=connection.dialect)
        values = tuple(compiled.params[name] for name in compiled.positiontup or ())
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}"
        plan = (await connection.exec_driver_sql(explain, values)).scalar_one()
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 20, plan

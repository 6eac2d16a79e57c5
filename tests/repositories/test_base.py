"""The methods of the base repository."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from models import Guild, Member, MemberStats, Role, Thread, User
from tests.conftest import examples
from tests.repositories.conftest import NOW
from utils.database import Pool
from utils.exceptions import Conflict, DatabaseError, DatabaseUnavailable, NotFound, ValidationError, translate
from utils.repositories import (
    GuildRepository,
    MemberRepository,
    MemberStatsRepository,
    RoleRepository,
    SessionFactory,
    ThreadRepository,
    UserRepository,
)
from utils.repositories.base import MAX_PAGE

KEYS = st.sets(st.tuples(st.integers(1, 4), st.integers(1, 2**63 - 1) | st.integers(1, 40)), max_size=60)


async def test_add_returns_row_with_database_defaults(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    added = await guilds.add(Guild(id=5 << 22, name="Five"))
    assert added.is_active
    assert added.created_at.year == 2015
    assert (added.stamp, added.unavailable, added.left_at) == (0, False, None)
    got = await guilds.get(5 << 22)
    assert got is not added
    assert (got.name, got.updated_at) == ("Five", added.updated_at)
    assert await guilds.exists(5 << 22)
    assert not await guilds.exists(6)


async def test_get_raises_and_find_returns_none_if_missing(sessions: SessionFactory) -> None:
    guilds, members = GuildRepository(sessions), MemberRepository(sessions)
    with pytest.raises(NotFound, match="guilds has no row 7"):
        await guilds.get(7)
    with pytest.raises(NotFound, match=r"members has no row \(7, 8\)"):
        await members.get((7, 8))
    assert await guilds.find(7) is None
    assert await members.find((7, 8)) is None
    with pytest.raises(NotFound):
        await guilds.update(7, name="Seven")
    for repository in (guilds, UserRepository(sessions)):
        with pytest.raises(NotFound):
            await repository.delete(7)


async def test_tombstoned_rows_are_hidden_by_default(sessions: SessionFactory) -> None:
    roles = RoleRepository(sessions)
    await roles.upsert_many([{"guild_id": 1, "id": id, "name": f"role {id}"} for id in (10, 11)])
    await roles.delete((1, 10))
    with pytest.raises(NotFound, match="has had a tombstone since"):
        await roles.get((1, 10))
    assert await roles.find((1, 10)) is None
    assert not await roles.exists((1, 10))
    assert await roles.count() == 1
    assert [role.id for role in (await roles.list()).items] == [11]
    with pytest.raises(NotFound):
        await roles.delete((1, 10))
    with pytest.raises(NotFound):
        await roles.update((1, 10), name="gone")

    assert (await roles.get((1, 10), include_deleted=True)).deleted_at is not None
    assert await roles.find((1, 10), include_deleted=True) is not None
    assert await roles.exists((1, 10), include_deleted=True)
    assert await roles.count(Role.guild_id == 1, include_deleted=True) == 2
    assert [role.id async for role in roles.stream(include_deleted=True)] == [10, 11]
    assert (await roles.update((1, 10), include_deleted=True, deleted_at=None)).deleted_at is None
    assert await roles.exists((1, 10))


async def test_delete_removes_row_of_table_without_tombstone(sessions: SessionFactory, database: Pool) -> None:
    users = UserRepository(sessions)
    await users.add(User(id=1, username="ada"))
    await users.delete(1)
    assert await database.fetchval("SELECT count(*) FROM users") == 0


async def test_update_returns_row_and_sets_updated_at(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    before = await guilds.add(Guild(id=1, name="Old", features=["A"]))
    after = await guilds.update(1, name="New", left_at=NOW)
    assert (after.name, after.features, after.left_at, after.is_active) == ("New", ["A"], NOW, False)
    assert after.updated_at > before.updated_at


async def test_concurrent_updates_by_expression_are_not_lost(sessions: SessionFactory) -> None:
    stats = MemberStatsRepository(sessions)
    await stats.add(MemberStats(guild_id=1, user_id=2))
    await asyncio.gather(*(stats.update((1, 2), xp=MemberStats.xp + 3) for _ in range(8)))
    assert (await stats.get((1, 2))).xp == 24


@pytest.mark.parametrize("values", [{}, {"id": 6}, {"nam": "x"}, {"created_at": NOW}, {"owner": None}])
async def test_update_rejects_key_and_unknown_columns(sessions: SessionFactory, values: dict[str, Any]) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=5))
    with pytest.raises(ValidationError, match="guilds"):
        await guilds.update(5, **values)


async def test_none_in_json_column_is_stored_as_sql_null(sessions: SessionFactory, database: Pool) -> None:
    roles = RoleRepository(sessions)
    assert (await roles.add(Role(guild_id=1, id=1, tags=None))).tags is None
    await roles.add(Role(guild_id=1, id=2, tags={"bot_id": "3"}))
    assert (await roles.update((1, 2), tags=None)).tags is None
    await roles.upsert_many([{"guild_id": 1, "id": 3, "tags": None}])
    assert await database.fetchval("SELECT count(*) FROM roles WHERE tags IS NULL") == 3


async def test_taken_key_raises_conflict_with_constraint(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=1, name="First"))
    with pytest.raises(Conflict, match="already exists") as caught:
        await guilds.add(Guild(id=1, name="Second"))
    assert isinstance(caught.value, DatabaseError)
    assert caught.value.constraint == "pk_guilds"
    assert caught.value.sqlstate == "23505"
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert (await guilds.get(1)).name == "First"


async def test_not_null_violation_raises_conflict(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    with pytest.raises(Conflict, match='"roles"') as caught:
        await members.upsert_many([{"guild_id": 1, "user_id": 1, "roles": None}])
    assert caught.value.constraint is None


async def test_sessions_may_translate_errors_themselves(sessions: SessionFactory) -> None:
    @contextlib.asynccontextmanager
    async def translating() -> AsyncIterator[AsyncSession]:
        try:
            async with sessions() as session:
                yield session
        except Exception as exc:
            error = translate(exc)
            if error is None or error is exc:
                raise
            raise error from exc

    guilds = GuildRepository(translating)
    await guilds.add(Guild(id=1))
    with pytest.raises(Conflict) as caught:
        await guilds.add(Guild(id=1))
    assert caught.value.constraint == "pk_guilds"
    with pytest.raises(NotFound):
        await guilds.get(2)


async def test_driver_errors_are_translated(sessions: SessionFactory, database: Pool) -> None:
    guilds = GuildRepository(sessions)
    with pytest.raises(DatabaseError, match="out of int16 range"):
        await guilds.upsert_many([{"id": 1, "nsfw_level": 1 << 40}])
    with pytest.raises(DatabaseError):
        await guilds.get("five")  # type: ignore[arg-type]
    await database.execute("DROP TABLE guilds")
    with pytest.raises(DatabaseError, match="run the migrations"):
        await guilds.get(1)


async def test_unreachable_database_raises_unavailable() -> None:
    @contextlib.asynccontextmanager
    async def refuse() -> AsyncIterator[AsyncSession]:
        raise ConnectionRefusedError(111, "refused")
        yield AsyncSession()

    with pytest.raises(DatabaseUnavailable):
        await GuildRepository(refuse).find(1)


async def test_session_passes_callers_errors_and_rolls_back(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)

    async def fail() -> None:
        async with guilds.session() as session:
            session.add(Guild(id=1))
            await session.flush()
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await guilds.count() == 0
    with pytest.raises(DatabaseError, match="division") as caught:
        async with guilds.session() as session:
            await session.execute(text("SELECT 1 / 0"))
    assert isinstance(caught.value.__cause__.__cause__, Exception)  # type: ignore[union-attr]
    assert asyncpg.DivisionByZeroError.sqlstate == caught.value.sqlstate


async def test_relationships_raise_unless_loaded(sessions: SessionFactory) -> None:
    guilds, roles, members = GuildRepository(sessions), RoleRepository(sessions), MemberRepository(sessions)
    await UserRepository(sessions).upsert_many([{"id": 7, "username": "ada"}])
    await guilds.upsert_many([{"id": 1, "owner_id": 7}, {"id": 2, "owner_id": 8}])
    await roles.upsert_many([{"guild_id": 1, "id": id, "position": 9 - id} for id in (3, 4, 5)])
    await roles.delete((1, 5))
    await members.upsert_many([{"guild_id": 1, "user_id": 7}])

    plain = await guilds.get(1)
    for name in ("owner", "roles", "channels", "threads"):
        with pytest.raises(InvalidRequestError, match="raise"):
            getattr(plain, name)
    full = await guilds.get(1, load=("owner", "roles", "channels"))
    assert full.owner is not None
    assert full.owner.username == "ada"
    assert [role.id for role in full.roles] == [4, 3]
    assert full.channels == []
    assert (await guilds.get(2, load="owner")).owner is None
    page = await guilds.list(load=("owner", "roles"))
    assert [len(guild.roles) for guild in page.items] == [2, 0]

    member: Any = await members.get((1, 7), load=("user", "guild", "stats"))
    assert (member.user.username, member.guild.id, member.stats) == ("ada", 1, None)
    user: Any = await UserRepository(sessions).get(7, load="memberships")
    assert [member.guild_id for member in user.memberships] == [1]


async def test_load_accepts_sqlalchemy_options(sessions: SessionFactory) -> None:
    threads = ThreadRepository(sessions)
    await GuildRepository(sessions).add(Guild(id=1))
    await RoleRepository(sessions).add(Role(guild_id=1, id=2))
    await threads.add(Thread(guild_id=1, id=3))
    thread = await threads.get((1, 3), load=[selectinload(Thread.guild).selectinload(Guild.roles), "parent"])
    assert thread.guild is not None
    assert [role.id for role in thread.guild.roles] == [2]
    assert thread.parent is None


async def test_load_rejects_unknown_relationship(sessions: SessionFactory) -> None:
    with pytest.raises(ValidationError, match=r"no relationship 'moderators': choose from owner, members, roles"):
        await GuildRepository(sessions).get(1, load=("moderators",))


async def test_rejects_key_of_wrong_shape(sessions: SessionFactory) -> None:
    with pytest.raises(ValidationError, match=r"\(guild_id, user_id\), not 5"):
        await MemberRepository(sessions).get(5)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"\(id\), not \(1, 2\)"):
        await GuildRepository(sessions).exists((1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1])
async def test_list_rejects_limit_out_of_range(sessions: SessionFactory, limit: int) -> None:
    with pytest.raises(ValidationError, match="stream"):
        await GuildRepository(sessions).list(limit=limit)


async def test_repositories_can_share_a_session(sessions: SessionFactory) -> None:
    async with sessions() as session:
        joined = contextlib.nullcontext(session)
        guilds, members = GuildRepository(lambda: joined), MemberRepository(lambda: joined)
        await guilds.add(Guild(id=1, owner_id=4))
        await members.add(Member(guild_id=1, user_id=4))
        assert (await guilds.get(1, load="owner")).owner is None
        assert (await guilds.update(1, name="Renamed")).name == "Renamed"
        assert await GuildRepository(sessions).find(1) is None
    assert (await GuildRepository(sessions).get(1)).name == "Renamed"
    assert "guilds" in repr(guilds)


@examples(25)
@given(keys=KEYS, limit=st.integers(1, 70), every=st.integers(2, 5))
async def test_pages_yield_every_row_exactly_once(
    sessions: SessionFactory, database: Pool, keys: set[tuple[int, int]], limit: int, every: int
) -> None:
    await database.execute("TRUNCATE members")
    members = MemberRepository(sessions)
    await members.upsert_many({"guild_id": guild, "user_id": user} for guild, user in keys)
    for number, key in enumerate(sorted(keys)):
        if number % every == 0:
            await members.delete(key)
    present = [key for number, key in enumerate(sorted(keys)) if number % every]

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
    assert seen == present

    pages = [page async for page in members.pages(limit=limit, include_deleted=True)]
    assert [(row.guild_id, row.user_id) for page in pages for row in page.items] == sorted(keys)
    assert all(page.items for page in pages)
    of_guild = [row.user_id async for row in members.stream(Member.guild_id == 2)]
    assert of_guild == [user for guild, user in present if guild == 2]
    pages_of_guild = [page async for page in members.pages(Member.guild_id == 2, limit=limit)]
    assert [row.user_id for page in pages_of_guild for row in page.items] == of_guild
    rest = await members.list(Member.guild_id == 2, after=(1, 1), limit=70)
    assert [row.user_id for row in rest.items] == of_guild
    assert await members.count(Member.guild_id == 2) == len(of_guild)


async def test_concurrent_writes_do_not_shift_pages(sessions: SessionFactory) -> None:
    guilds = GuildRepository(sessions)
    await guilds.upsert_many({"id": id} for id in range(10, 100, 10))
    first = await guilds.list(limit=4)
    assert [row.id for row in first.items] == [10, 20, 30, 40]
    await guilds.upsert_many([{"id": 15}, {"id": 55}])
    await guilds.delete(20)
    await guilds.delete(50)
    second = await guilds.list(limit=4, after=first.next)
    assert [row.id for row in second.items] == [55, 60, 70, 80]


async def test_late_page_reads_few_blocks(sessions: SessionFactory, database: Pool) -> None:
    await database.execute("INSERT INTO members (guild_id, user_id) SELECT 1, id FROM generate_series(1, 20000) AS id")
    await database.execute("VACUUM ANALYZE members")
    repository = MemberRepository(sessions)
    where = Member.guild_id == 1
    query = select(Member).where(where, repository._after((1, 19_000), (where,)))
    async with repository.session() as session:
        connection = await session.connection()
        compiled = query.order_by(Member.guild_id, Member.user_id).limit(11).compile(dialect=connection.dialect)
        values = tuple(compiled.params[name] for name in compiled.positiontup or ())
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {compiled}"
        plan = (await connection.exec_driver_sql(explain, values)).scalar_one()
    assert plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"] < 20, plan

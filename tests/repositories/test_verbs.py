"""The verbs that every repository has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import selectinload

from models import Guild, Member, MemberStats, Role, Thread, User
from tests.repositories.conftest import NOW
from utils.database import Pool
from utils.exceptions import Conflict, DatabaseError, DatabaseUnavailable, NotFound, ValidationError, translate
from utils.repositories import (
    GuildRepository,
    MemberRepository,
    MemberStatsRepository,
    RoleRepository,
    Sessions,
    ThreadRepository,
    UserRepository,
)
from utils.repositories.base import MAX_PAGE


async def test_a_row_that_is_added_can_be_got_and_carries_what_the_database_filled_in(sessions: Sessions) -> None:
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


async def test_what_is_not_there_is_said_by_get_and_none_to_find(sessions: Sessions) -> None:
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


async def test_what_has_gone_is_hidden_unless_it_is_asked_for(sessions: Sessions) -> None:
    roles = RoleRepository(sessions)
    await roles.upsert_many([{"guild_id": 1, "id": id, "name": f"role {id}"} for id in (10, 11)])
    await roles.delete((1, 10))
    with pytest.raises(NotFound, match="went away at"):
        await roles.get((1, 10))
    assert await roles.find((1, 10)) is None
    assert not await roles.exists((1, 10))
    assert await roles.count() == 1
    assert [role.id for role in (await roles.list()).items] == [11]
    with pytest.raises(NotFound):
        await roles.delete((1, 10))
    with pytest.raises(NotFound):
        await roles.update((1, 10), name="gone")

    assert (await roles.get((1, 10), include_gone=True)).deleted_at is not None
    assert await roles.find((1, 10), include_gone=True) is not None
    assert await roles.exists((1, 10), include_gone=True)
    assert await roles.count(Role.guild_id == 1, include_gone=True) == 2
    assert [role.id async for role in roles.stream(include_gone=True)] == [10, 11]
    assert (await roles.update((1, 10), include_gone=True, deleted_at=None)).deleted_at is None
    assert await roles.exists((1, 10))


async def test_what_keeps_nothing_that_is_gone_is_removed(sessions: Sessions, database: Pool) -> None:
    users = UserRepository(sessions)
    await users.add(User(id=1, username="ada"))
    await users.delete(1)
    assert await database.fetchval("SELECT count(*) FROM users") == 0


async def test_an_update_returns_the_row_as_it_is_now_and_says_when(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    before = await guilds.add(Guild(id=1, name="Old", features=["A"]))
    after = await guilds.update(1, name="New", left_at=NOW)
    assert (after.name, after.features, after.left_at, after.is_active) == ("New", ["A"], NOW, False)
    assert after.updated_at > before.updated_at


async def test_updates_by_expression_lose_none(sessions: Sessions) -> None:
    stats = MemberStatsRepository(sessions)
    await stats.add(MemberStats(guild_id=1, user_id=2))
    await asyncio.gather(*(stats.update((1, 2), xp=MemberStats.xp + 3) for _ in range(8)))
    assert (await stats.get((1, 2))).xp == 24


@pytest.mark.parametrize("values", [{}, {"id": 6}, {"nam": "x"}, {"created_at": NOW}, {"owner": None}])
async def test_an_update_of_what_cannot_be_set_is_refused(sessions: Sessions, values: dict[str, Any]) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=5))
    with pytest.raises(ValidationError, match="guilds"):
        await guilds.update(5, **values)


async def test_no_json_is_null_in_sql_however_it_was_written(sessions: Sessions, database: Pool) -> None:
    roles = RoleRepository(sessions)
    assert (await roles.add(Role(guild_id=1, id=1, tags=None))).tags is None
    await roles.add(Role(guild_id=1, id=2, tags={"bot_id": "3"}))
    assert (await roles.update((1, 2), tags=None)).tags is None
    await roles.upsert_many([{"guild_id": 1, "id": 3, "tags": None}])
    assert await database.fetchval("SELECT count(*) FROM roles WHERE tags IS NULL") == 3


async def test_a_key_that_is_taken_is_a_conflict_that_names_the_constraint(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)
    await guilds.add(Guild(id=1, name="First"))
    with pytest.raises(Conflict, match="already exists") as caught:
        await guilds.add(Guild(id=1, name="Second"))
    assert isinstance(caught.value, DatabaseError)
    assert caught.value.constraint == "pk_guilds"
    assert caught.value.sqlstate == "23505"
    assert isinstance(caught.value.__cause__, IntegrityError)
    assert (await guilds.get(1)).name == "First"


async def test_a_missing_value_is_a_conflict_without_a_name(sessions: Sessions) -> None:
    members = MemberRepository(sessions)
    with pytest.raises(Conflict, match='"roles"') as caught:
        await members.upsert_many([{"guild_id": 1, "user_id": 1, "roles": None}])
    assert caught.value.constraint is None


async def test_sessions_that_translate_already_change_nothing(sessions: Sessions) -> None:
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


async def test_what_the_driver_refuses_is_our_own_error(sessions: Sessions, database: Pool) -> None:
    guilds = GuildRepository(sessions)
    with pytest.raises(DatabaseError, match="out of int16 range"):
        await guilds.upsert_many([{"id": 1, "nsfw_level": 1 << 40}])
    with pytest.raises(DatabaseError):
        await guilds.get("five")  # type: ignore[arg-type]
    await database.execute("DROP TABLE guilds")
    with pytest.raises(DatabaseError, match="run the migrations"):
        await guilds.get(1)


async def test_a_database_that_cannot_be_reached_is_unavailable() -> None:
    @contextlib.asynccontextmanager
    async def nowhere() -> AsyncIterator[AsyncSession]:
        raise ConnectionRefusedError(111, "refused")
        yield AsyncSession()

    with pytest.raises(DatabaseUnavailable):
        await GuildRepository(nowhere).find(1)


async def test_errors_of_ones_own_leave_a_lent_session_as_they_are_and_undo_its_work(sessions: Sessions) -> None:
    guilds = GuildRepository(sessions)

    async def give_up() -> None:
        async with guilds.session() as session:
            session.add(Guild(id=1))
            await session.flush()
            raise LookupError

    with pytest.raises(LookupError):
        await give_up()
    assert await guilds.count() == 0
    with pytest.raises(DatabaseError, match="division") as caught:
        async with guilds.session() as session:
            await session.execute(text("SELECT 1 / 0"))
    assert isinstance(caught.value.__cause__.__cause__, Exception)  # type: ignore[union-attr]
    assert asyncpg.DivisionByZeroError.sqlstate == caught.value.sqlstate


async def test_relationships_are_loaded_when_asked_for_and_raise_otherwise(sessions: Sessions) -> None:
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
    full = await guilds.get(1, with_=("owner", "roles", "channels"))
    assert full.owner is not None
    assert full.owner.username == "ada"
    assert [role.id for role in full.roles] == [4, 3]
    assert full.channels == []
    assert (await guilds.get(2, with_="owner")).owner is None
    page = await guilds.list(with_=("owner", "roles"))
    assert [len(guild.roles) for guild in page.items] == [2, 0]

    member: Any = await members.get((1, 7), with_=("user", "guild", "stats"))
    assert (member.user.username, member.guild.id, member.stats) == ("ada", 1, None)
    user: Any = await UserRepository(sessions).get(7, with_="memberships")
    assert [one.guild_id for one in user.memberships] == [1]


async def test_loader_options_of_sqlalchemy_do_as_well(sessions: Sessions) -> None:
    threads = ThreadRepository(sessions)
    await GuildRepository(sessions).add(Guild(id=1))
    await RoleRepository(sessions).add(Role(guild_id=1, id=2))
    await threads.add(Thread(guild_id=1, id=3))
    thread = await threads.get((1, 3), with_=[selectinload(Thread.guild).selectinload(Guild.roles), "parent"])
    assert thread.guild is not None
    assert [role.id for role in thread.guild.roles] == [2]
    assert thread.parent is None


async def test_what_does_not_exist_cannot_be_loaded(sessions: Sessions) -> None:
    with pytest.raises(ValidationError, match=r"no 'members' to load: there are owner, roles"):
        await GuildRepository(sessions).get(1, with_=("members",))


async def test_a_key_of_the_wrong_shape_is_refused(sessions: Sessions) -> None:
    with pytest.raises(ValidationError, match=r"\(guild_id, user_id\), not 5"):
        await MemberRepository(sessions).get(5)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"\(id\), not \(1, 2\)"):
        await GuildRepository(sessions).exists((1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1])
async def test_a_page_has_bounds(sessions: Sessions, limit: int) -> None:
    with pytest.raises(ValidationError, match="stream"):
        await GuildRepository(sessions).list(limit=limit)


async def test_one_session_can_serve_several_repositories(sessions: Sessions) -> None:
    async with sessions() as session:
        joined = contextlib.nullcontext(session)
        guilds, members = GuildRepository(lambda: joined), MemberRepository(lambda: joined)
        await guilds.add(Guild(id=1, owner_id=4))
        await members.add(Member(guild_id=1, user_id=4))
        assert (await guilds.get(1, with_="owner")).owner is None
        assert (await guilds.update(1, name="Renamed")).name == "Renamed"
        assert await GuildRepository(sessions).find(1) is None
    assert (await GuildRepository(sessions).get(1)).name == "Renamed"
    assert "guilds" in repr(guilds)

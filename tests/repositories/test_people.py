"""UserRepository, MemberRepository and MemberStatsRepository."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import discord
import pytest
from sqlalchemy import select

from models import Member
from tests.repositories.conftest import NOW
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.repositories import (
    GuildRepository,
    MemberRepository,
    MemberStatsRepository,
    SessionFactory,
    UserRepository,
    UserTotals,
)
from utils.repositories.people import has_role


@pytest.fixture
async def guild() -> discord.Guild:
    """A guild as discord.py has it in memory, with one role and nobody else."""
    client = discord.Client(intents=discord.Intents(guilds=True))
    payload: Any = {"id": "1", "name": "g", "roles": [{"id": "1", "name": "@everyone", "permissions": "0"}]}
    return client._connection._add_guild_from_data(payload)


async def people(sessions: SessionFactory, *rows: tuple[int, str | None, str | None, str | None]) -> MemberRepository:
    """Write members of guild 1: id, username, display name, nick."""
    members = MemberRepository(sessions)
    await UserRepository(sessions).upsert_many(
        {"id": id, "username": one, "global_name": two} for id, one, two, _ in rows
    )
    await members.upsert_many({"guild_id": 1, "user_id": id, "nick": nick, "joined_at": NOW} for id, _, _, nick in rows)
    return members


async def test_members_become_objects_of_discord_py(sessions: SessionFactory, guild: discord.Guild) -> None:
    members = await people(sessions, (7, "ada", "Ada", "Countess"), (8, "bob", None, None))
    await MemberRepository(sessions).upsert(guild_id=1, user_id=9, nick="of nobody known")
    ada = await members.as_discord(guild, 7)
    assert ada is not None
    assert (ada.display_name, ada.name, ada.joined_at, ada.guild) == ("Countess", "ada", NOW, guild)
    assert guild.get_member(7) is None
    nameless = await members.as_discord(guild, 9)
    assert nameless is not None
    assert (nameless.name, nameless.nick) == ("9", "of nobody known")
    await members.delete((1, 8))
    assert (await members.as_discord(guild, 8), await members.as_discord(guild, 404)) == (None, None)


async def test_finds_members_by_the_beginning_of_any_name(
    sessions: SessionFactory, guild: discord.Guild, database: Pool
) -> None:
    rows = ((7, "zoe", "Ada", None), (8, "ada", None, "x"), (9, "bob", None, "ADAx"), (10, "50%_a", None, "Élan"))
    members = await people(sessions, *rows, (11, "adagone", None, None))
    await members.delete((1, 11))
    await UserRepository(sessions).upsert(id=12, username="adaelsewhere")

    async def found(prefix: str, **options: Any) -> list[int]:
        return [member.id for member in await members.search(guild, prefix, **options)]

    assert await found("aDa") == [8, 9, 7]
    assert await found("ada", limit=2) == [8, 9]
    assert await found("50%_") == [10]
    assert (await found("%"), await found("_"), await found("\\"), await found("adaé")) == ([], [], [], [])
    folds = await database.fetchval("SELECT lower('É') = 'é'")  # not with the locale C
    assert (await found("Él"), await found("él")) == ([10], [10] if folds else [])
    assert await found("") == [7, 8, 9, 10]
    with pytest.raises(ValidationError):
        await found("ada", limit=0)


async def test_a_name_means_the_username_before_other_names(sessions: SessionFactory, guild: discord.Guild) -> None:
    members = await people(
        sessions, (7, "x", "y", "Ada"), (8, "y", "Ada", None), (9, "ADA", None, None), (10, "ada", None, None)
    )

    async def named(name: str, discriminator: str | None = None) -> int | None:
        found = await members.by_name(guild, name, discriminator)
        return None if found is None else found.id

    assert [await named(name) for name in ("ada", "ADA", "Ada", "aDA", "y", "nobody")] == [10, 9, 8, 9, 8, None]
    await UserRepository(sessions).upsert(id=9, discriminator="0042")
    assert (await named("ada", "0042"), await named("ada", "0000"), await named("y", "0042")) == (9, 10, None)


async def test_searches_by_name_use_the_indexes(sessions: SessionFactory, guild: discord.Guild, database: Pool) -> None:
    names = "md5(n::text), md5((n * 3)::text) FROM generate_series(1, 9000) n"
    await database.execute(f"INSERT INTO users (id, username, global_name) SELECT n, {names}")
    await database.execute(f"INSERT INTO members (guild_id, user_id, avatar, nick) SELECT 1, n, {names}")
    await database.execute("ANALYZE users, members")
    members = MemberRepository(sessions)
    for _ in range(8):  # also with the plan for any prefix, which PostgreSQL may choose from the sixth time on
        assert len(await members.search(guild, "abcd")) in range(1, 9)

    async def all_used() -> bool:
        rows = await database.fetch("SELECT indexrelname FROM pg_stat_user_indexes WHERE idx_scan >= 8")
        return {row[0] for row in rows} >= {
            "ix_users_lower_username", "ix_users_lower_global_name", "ix_members_guild_id_lower_nick"
        }  # fmt: skip

    await until(all_used)


async def test_finds_users_by_both_names_ignoring_case(sessions: SessionFactory) -> None:
    users = UserRepository(sessions)
    names = [(1, "zoe", "Ada"), (2, "ada", None), (3, None, "Älva"), (4, "ada_l", "100%"), (5, "adax", None)]
    await users.upsert_many({"id": id, "username": one, "global_name": two} for id, one, two in names)
    assert [user.id for user in await users.by_name("ADA")] == [2, 1]
    assert [user.id for user in await users.by_name("ÄLVA")] == [3]
    assert await users.by_name("nobody") == []
    assert [user.id for user in await users.search("Ada")] == [2, 4, 5, 1]
    assert [user.id for user in await users.search("ada_")] == [4], "a prefix is not a LIKE pattern"
    assert [user.id for user in await users.search("100%")] == [4]
    assert [user.id for user in await users.search("ada", limit=2)] == [2, 4]
    with pytest.raises(ValidationError):
        await users.search("ada", limit=0)


async def test_finds_users_by_name_and_discriminator(sessions: SessionFactory) -> None:
    users = UserRepository(sessions)
    names = [(1, "ada", "0"), (2, "ada", "0042"), (3, "ada", None), (4, "zoe", "0042")]
    await users.upsert_many({"id": id, "username": one, "discriminator": two} for id, one, two in names)
    await users.upsert(id=5, username="eve", global_name="ada", discriminator="0042")
    for bot in ("0042", 42, "#0042"):
        assert [user.id for user in await users.by_name("Ada", bot)] == [2]
    for nobody in ("0", 0, "0000"):
        assert [user.id for user in await users.by_name("ada", nobody)] == [1, 3]
    assert await users.by_name("ada", 43) == []


async def test_statistics_of_users(sessions: SessionFactory) -> None:
    users = UserRepository(sessions)
    assert await users.statistics() == UserTotals(0, 0, 0, None)
    ages = ((10, True, None), (20, False, None), (30, None, True))
    ids = [discord.utils.time_snowflake(NOW - timedelta(days=days)) for days, _, _ in ages]
    await users.upsert_many(
        {"id": id, "bot": bot, "verified": verified} for id, (_, bot, verified) in zip(ids, ages, strict=True)
    )
    totals = await users.statistics()
    assert (totals.total, totals.bots, totals.verified) == (3, 1, 1)
    assert totals.average_age_days == pytest.approx(20, abs=0.5)


async def test_guilds_of_returns_only_present_guilds(sessions: SessionFactory) -> None:
    guilds, members = GuildRepository(sessions), MemberRepository(sessions)
    await guilds.upsert_many({"id": id, "owner_id": 7} for id in (1, 2, 3, 4))
    await members.upsert_many({"guild_id": id, "user_id": 7} for id in (1, 2, 3))
    await members.delete((2, 7))
    await guilds.delete(3)
    shared = await UserRepository(sessions).guilds_of(7, load="owner")
    assert [(guild.id, guild.owner) for guild in shared] == [(1, None)]


async def test_finds_members_by_role_boost_and_join_date(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    await UserRepository(sessions).upsert_many([{"id": 1, "username": "ada"}])
    await members.upsert_many(
        {
            "guild_id": guild, "user_id": id, "roles": [50, 60] if id % 2 else [60],
            "joined_at": NOW - timedelta(days=id), "premium_since": NOW if id == 3 else None,
        }
        for guild in (1, 2) for id in range(1, 6)
    )  # fmt: skip
    await members.delete((1, 5))
    page = await members.of_guild(1, limit=3, load="user")
    first: Any = page.items[0]
    assert (first.user.username, page.next) == ("ada", (1, 3))
    assert [row.user_id for row in (await members.of_guild(1, after=page.next)).items] == [4]
    assert len((await members.of_guild(1, include_deleted=True)).items) == 5
    assert [row.user_id for row in (await members.with_role(1, 50)).items] == [1, 3]
    assert len((await members.with_role(1, 1)).items) == 4, "@everyone"
    assert (await members.with_role(1, 51)).items == []
    assert [row.user_id for row in (await members.boosters(1)).items] == [3]
    day = timedelta(days=1)
    assert [row.user_id for row in (await members.joined_between(1, NOW - 3 * day, NOW - day)).items] == [2, 3]
    assert await members.count_present(1) == 4
    with pytest.raises(ValidationError, match="no time zone"):
        await members.joined_between(1, datetime(2024, 1, 1), NOW)  # noqa: DTZ001 - rejected


async def test_with_role_uses_the_gin_index(sessions: SessionFactory, database: Pool) -> None:
    await database.execute(
        "INSERT INTO members (guild_id, user_id, roles) SELECT 1 + id % 3, id, ARRAY[id % 400, 1000 + id % 7]"
        " FROM generate_series(1, 30000) AS id"
    )
    await database.execute("VACUUM ANALYZE members")  # merges the index's pending list, as autovacuum does
    members = MemberRepository(sessions)
    assert len((await members.with_role(1, 399)).items) == 25
    query = select(Member).where(*has_role(1, 399), Member.left_at.is_(None))
    async with members.session() as session:
        connection = await session.connection()
        compiled = query.order_by(Member.guild_id, Member.user_id).limit(101).compile(dialect=connection.dialect)
        values = tuple(compiled.params[name] for name in compiled.positiontup or ())
        plan = "\n".join((await connection.exec_driver_sql(f"EXPLAIN {compiled}", values)).scalars())
    assert "Bitmap Index Scan on ix_members_roles" in plan, plan


async def test_add_xp_and_top_rank_present_members(sessions: SessionFactory) -> None:
    stats, members = MemberStatsRepository(sessions), MemberRepository(sessions)
    await members.upsert_many({"guild_id": 1, "user_id": id} for id in (1, 2, 3))
    assert [await stats.add_xp(1, 1, 5), await stats.add_xp(1, 1, 6), await stats.add_xp(1, 1, -1)] == [5, 11, 10]
    await stats.upsert_many({"guild_id": 1, "user_id": id, "xp": id * 10, "message_count": 9 - id} for id in (2, 3, 4))
    await members.delete((1, 3))
    assert [(row.user_id, row.xp) for row in await stats.top(1)] == [(2, 20), (1, 10)]
    top: list[Any] = list(await stats.top(1, "message_count", limit=1, load="user"))
    assert [(row.user_id, row.user) for row in top] == [(2, None)]
    with pytest.raises(ValidationError, match="'id'"):
        await stats.top(1, "id")  # type: ignore[arg-type]

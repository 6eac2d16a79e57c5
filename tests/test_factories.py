"""The factories that cogs' tests are written with: plausible rows, ids in order, written as the mirror writes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import (
    Population,
    Snowflakes,
    imagine,
    made_at,
    make_channel,
    make_guild,
    make_member,
    make_role,
    make_user,
    populate,
    values_of,
    write,
)
from utils.database import Pool
from utils.mirror.records.rows import key_columns


def test_ids_are_unique_and_ascending() -> None:
    guild = make_guild()
    ids = [guild.id, make_user().id, make_role(guild).id, make_channel(guild).id, make_guild().id]
    assert ids == sorted(set(ids))
    assert make_user(id=7).id == 7


def test_two_hands_never_give_out_the_same_id() -> None:
    one, other = Snowflakes(1), Snowflakes(2)
    assert not {one.next() for _ in range(50)} & {other.next() for _ in range(50)}
    with pytest.raises(ValueError, match="0 to 1023"):
        Snowflakes(1024)


def test_explicit_values_override_generated_ones() -> None:
    guild = make_guild(name="Tea house")
    role = make_role(guild, name="Guests")
    ann = make_user(username="ann", bot=True)
    member = make_member(guild, ann, nick="Ann", roles=[role, 5])
    assert (guild.name, ann.username, member.nick) == ("Tea house", "ann", "Ann")
    assert member.roles == [5, role.id]
    assert len(ann.discriminator or "") == 4
    assert make_role(guild, id=guild.id).name == "@everyone"
    assert member.joined_at is not None
    assert member.joined_at > made_at(guild.id)


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(TypeError, match="Guild has no column title"):
        make_guild(title="Tea house")


@given(guilds=st.integers(0, 3), members=st.integers(0, 12), seed=st.integers(0, 5_000))
def test_one_seed_gives_the_same_rows(guilds: int, members: int, seed: int) -> None:
    first, again = (imagine(guilds=guilds, members=members, seed=seed) for _ in range(2))
    assert [values_of(row) for row in first.rows] == [values_of(row) for row in again.rows]
    assert len(first.members) == guilds * members
    keys = [(row.__tablename__, *(getattr(row, name) for name in key_columns(row.__tablename__))) for row in first.rows]
    assert len(keys) == len(set(keys))
    for rows in (first.guilds, first.users):
        ids = [row.id for row in rows]
        assert ids == sorted(ids)


def test_guilds_share_people_and_have_owners() -> None:
    made = imagine(guilds=3, members=9)
    shared = [user for user in made.users if sum(member.user_id == user.id for member in made.members) == 3]
    assert len(shared) == 3
    assert {guild.owner_id for guild in made.guilds} <= {member.user_id for member in made.members}


@pytest.fixture
async def people(database: Pool) -> Population:
    return await populate(database, guilds=2, members=10)


async def test_population_equals_the_tables(database: Pool, people: Population) -> None:
    for row in people.rows:
        table = row.__tablename__
        where = " AND ".join(f"{name} = ${number}" for number, name in enumerate(key_columns(table), start=1))
        keys = (getattr(row, name) for name in key_columns(table))
        record = await database.fetchrow(f"SELECT * FROM {table} WHERE {where}", *keys)  # noqa: S608
        assert record is not None
        assert {name: record[name] for name in values_of(row)} == values_of(row)
        assert record["stamp"] > 0
    assert await database.fetchval("SELECT count(*) FROM changes") == 0


async def test_writing_what_changed_leaves_its_history(database: Pool, people: Population) -> None:
    member = people.members[0]
    before, member.nick = member.nick, "somebody else"
    await write(database, member)
    record = await database.fetchrow("SELECT action, before, after, inferred FROM changes")
    assert record is not None
    assert tuple(record) == ("update", {"nick": before}, {"nick": "somebody else"}, False)


async def test_two_populations_lie_side_by_side(database: Pool) -> None:
    await populate(database, seed=1)
    await populate(database, seed=2)
    assert await database.fetchval("SELECT count(*) FROM members") == 20


async def test_a_row_is_given_once(database: Pool) -> None:
    guild = make_guild()
    with pytest.raises(ValueError, match="given twice"):
        await write(database, guild, guild)

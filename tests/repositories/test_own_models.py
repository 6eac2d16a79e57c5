"""Repositories of authors' own models: `self.repository(Case)`."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import true
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from models import Base, Member
from utils.bot.registrations import remove_tables
from utils.database import Pool
from utils.exceptions import Declined, NotFound, ValidationError
from utils.repositories import GuildRepository, MemberRepository, Repository, SessionFactory

if TYPE_CHECKING:
    from tests.repositories.own_models import Case

MODULE = "tests.repositories.own_models"


@pytest.fixture
def model() -> Iterator[type[Case]]:
    """The model, declared for one test only: others compare all declared tables with the database."""
    yield importlib.import_module(MODULE).Case
    remove_tables(MODULE)
    del sys.modules[MODULE]


@pytest.fixture
async def cases(model: type[Case], sessions: SessionFactory, database: Pool) -> Repository[Case, Any]:
    """Its repository, as a cog gets it."""
    create = CreateTable(Base.metadata.tables["own_cases"])
    await database.execute(str(create.compile(dialect=postgresql.dialect())))  # type: ignore[no-untyped-call]
    return Repository(sessions, model)


async def test_all_verbs(cases: Repository[Case, Any], model: type[Case]) -> None:
    first = await cases.add(model(guild_id=1, code="a"))
    assert (first.state, first.points, first.notes, first.extra) == ("open", 0, [], None)
    second = await cases.upsert(guild_id=1, code="b", points=3)
    again = await cases.upsert({"guild_id": 1, "code": "b"}, state="closed")
    assert (second.points, second.state) == (3, "open")
    assert (again.points, again.state) == (3, "closed")
    assert (await cases.upsert(guild_id=1, code="b", state="closed")).points == 3, "unchanged rows are returned too"
    assert await cases.get_or_none((1, "c")) is None
    found = await cases.get_or_none((1, "b"))
    assert found is not None
    assert found.state == "closed"
    assert await cases.upsert_many([{"guild_id": guild, "code": "c"} for guild in (1, 2)]) == 2
    page = await cases.list(model.guild_id == 1, limit=2)
    assert ([row.code for row in page.items], page.next) == (["a", "b"], (1, "b"))
    assert [row.code for row in (await cases.list(model.guild_id == 1, after=page.next)).items] == ["c"]
    assert [(row.guild_id, row.code) async for row in cases.stream()] == [(1, "a"), (1, "b"), (1, "c"), (2, "c")]
    assert (await cases.update((1, "a"), points=model.points + 2)).points == 2
    assert await cases.exists((1, "a"))
    await cases.delete((1, "a"))
    assert await cases.delete_where(model.guild_id == 1, model.state == "open") == 1
    with pytest.raises(ValidationError, match="needs a condition"):
        await cases.delete_where()
    assert await cases.delete_where(true()) == 2
    assert await cases.count() == 0
    with pytest.raises(ValidationError, match=r"key of own_cases is \(guild_id, code\)"):
        await cases.get(1)


async def test_a_typed_update_changes_the_locked_row(cases: Repository[Case, Any], model: type[Case]) -> None:
    await cases.upsert(guild_id=1, code="a", notes=["one"], extra={"by": [1]})

    def change(case: Case) -> None:
        case.state = "closed"
        case.points = model.points + 5
        case.notes.append("two")
        assert case.extra is not None
        case.extra["by"].append(2)

    changed = await cases.update((1, "a"), change, user_id=7)
    assert (changed.state, changed.points, changed.user_id) == ("closed", 5, 7)
    assert (changed.notes, changed.extra) == (["one", "two"], {"by": [1, 2]})
    stored = await cases.get((1, "a"))
    assert (stored.notes, stored.extra) == (changed.notes, changed.extra)

    def empty(case: Case) -> None:
        case.extra = None

    assert (await cases.update((1, "a"), empty)).extra is None
    assert await cases.count(model.extra.is_(None)) == 1, "SQL's NULL, not JSON's"


def refuse(case: Case) -> None:
    """Change a row, then refuse."""
    case.state = "closed"
    raise Declined("no")


def move(case: Case) -> None:
    """Change the key."""
    case.code = "z"


@pytest.mark.parametrize(
    ("key", "change", "values", "error"),
    [
        ((1, "a"), refuse, {}, Declined),
        ((1, "a"), move, {}, ValidationError),
        ((1, "a"), lambda case: None, {"stat": "x"}, ValidationError),
        ((1, "b"), refuse, {}, NotFound),
    ],
)
async def test_a_refused_update_changes_nothing(
    cases: Repository[Case, Any], key: Any, change: Callable[[Case], None], values: Any, error: type[Exception]
) -> None:
    await cases.upsert(guild_id=1, code="a")
    with pytest.raises(error):
        await cases.update(key, change, **values)
    assert (await cases.get((1, "a"))).state == "open"
    assert await cases.count() == 1


async def test_concurrent_typed_updates_are_not_lost(cases: Repository[Case, Any]) -> None:
    await cases.upsert(guild_id=1, code="a")

    def add(case: Case) -> None:
        case.points += 1
        case.notes.append(str(case.points))

    await asyncio.gather(*(cases.update((1, "a"), add) for _ in range(8)))
    case = await cases.get((1, "a"))
    assert (case.points, case.notes) == (8, list("12345678"))


async def test_tombstones_are_respected(sessions: SessionFactory) -> None:
    members = MemberRepository(sessions)
    assert (await members.upsert(guild_id=1, user_id=7, nick="a")).left_at is None
    assert await members.delete_where(Member.guild_id == 1) == 1
    assert await members.delete_where(Member.guild_id == 1) == 0, "they have theirs already"
    assert await members.get_or_none((1, 7)) is None
    gone = await members.get_or_none((1, 7), include_deleted=True)
    assert gone is not None

    def rename(member: Member) -> None:
        member.nick = "b"

    with pytest.raises(NotFound):
        await members.update((1, 7), rename)
    renamed = await members.update((1, 7), rename, include_deleted=True)
    assert (renamed.nick, renamed.updated_at > gone.updated_at) == ("b", True)
    assert (await members.upsert(guild_id=1, user_id=7)).left_at is None


async def test_members_are_loaded_with_their_guild(sessions: SessionFactory) -> None:
    guilds, members = GuildRepository(sessions), MemberRepository(sessions)
    await guilds.upsert_many([{"id": 1}, {"id": 2}])
    await members.upsert_many({"guild_id": guild, "user_id": user} for guild in (1, 2) for user in (9, 7, 8))
    await members.delete((1, 8))
    guild = await guilds.get(1, load="members")
    assert [member.user_id for member in guild.members] == [7, 9]

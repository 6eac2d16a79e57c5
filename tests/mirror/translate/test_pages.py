"""Pages of listings agree with dispatches, and a malformed member costs only itself."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mirror.tables import GUILD
from utils.exceptions import ValidationError
from utils.mirror.discord.tap import decode
from utils.mirror.records.validation import validate_row
from utils.mirror.translate import objects, pages
from utils.mirror.translate.objects import LISTED_MEMBER_COLUMNS, LISTED_USER_COLUMNS, Payload
from utils.mirror.translate.pages import Page, read_page

STAMP = 77
IDS = st.integers(1, 2**63 - 1).map(str)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
MOMENTS = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)).map(  # noqa: DTZ001 - the offset is written below
    lambda at: at.isoformat(timespec="microseconds") + "+00:00"
)
USERS = st.fixed_dictionaries(
    {
        "id": IDS,
        "username": TEXT,
        "discriminator": st.sampled_from(["0", "0001"]),
        "global_name": st.none() | TEXT,
        "avatar": st.none() | TEXT,
        "public_flags": st.integers(0, 2**40),
    },
    optional={"bot": st.booleans(), "system": st.booleans(), "banner": st.none(), "avatar_decoration_data": st.none()},
)
#: Discord API reference, "Guild Member Object".
MEMBERS = st.fixed_dictionaries(
    {
        "user": USERS,
        "roles": st.lists(IDS, max_size=4, unique=True),
        "joined_at": st.none() | MOMENTS,
        "deaf": st.booleans(),
        "mute": st.booleans(),
        "flags": st.integers(0, 2**31 - 1),
    },
    optional={
        "nick": st.none() | TEXT,
        "avatar": st.none() | TEXT,
        "premium_since": st.none() | MOMENTS,
        "pending": st.booleans(),
        "communication_disabled_until": st.none() | MOMENTS,
        "banner": st.none(),
    },
)


def never(error: ValidationError) -> None:
    raise AssertionError(f"a valid member was rejected: {error}")


def member(user_id: int = 1, **values: Any) -> Payload:
    user = {"id": str(user_id), "username": "u", "discriminator": "0", "global_name": None, "avatar": None}
    return {"user": user | {"public_flags": 0}, "roles": ["3", "2"], "joined_at": None, "flags": 0} | values


@given(payloads=st.lists(MEMBERS, max_size=5))
def test_a_listed_member_equals_a_joined_member(payloads: list[Payload]) -> None:
    given = copy.deepcopy(payloads)
    page = read_page(GUILD, payloads, STAMP, never)
    assert payloads == given, "the payload must not be modified"
    assert page.seen == len(page.users) == len(page.members) == len(payloads)
    for payload, user, listed in zip(payloads, page.users, page.members, strict=True):
        one, other = (validate_row(row) for row in objects.member(GUILD, payload, is_join=True))
        assert user == (*one.key, *(one.values[name] for name in LISTED_USER_COLUMNS), STAMP)
        assert listed == (*other.key, *(other.values[name] for name in LISTED_MEMBER_COLUMNS), STAMP)
        assert one.may_insert
        assert other.may_insert


@given(payloads=st.lists(MEMBERS, max_size=5))
def test_the_slow_path_equals_the_fast_path(payloads: list[Payload]) -> None:
    slow = Page(seen=len(payloads))
    pages._read_one_by_one(slow, GUILD, payloads, STAMP, never)
    fast = read_page(GUILD, payloads, STAMP, never)
    assert (slow.users, slow.members) == (fast.users, fast.members)


BROKEN: list[tuple[Any, list[int | None]]] = [
    (None, [None]),
    ("a member", [None]),
    ([], [None]),
    ({}, [None]),
    ({"user": None, "roles": [], "joined_at": None}, [None]),
    ({"user": {"id": None, "username": "u"}, "roles": [], "joined_at": None}, [None]),
    ({"user": {"id": "not a number", "username": "u"}, "roles": [], "joined_at": None}, [None]),
    ({"user": {"id": [], "username": "u"}, "roles": [], "joined_at": None}, [None]),
    ({"user": {"id": "5"}, "roles": [], "joined_at": None}, [5]),
    (member(5, roles=None, joined_at="yesterday"), [5]),
    (member(5, roles=["x"]), [5]),
    (member(5, roles=[None]), [5]),
    (member(5, joined_at=7), [5]),
    (member(5, nick=["n"]), [5]),
    (member(5, pending="yes"), [5]),
    (member(5, flags=2**31), [5]),
    (member(5, roles=[str(2**63)]), [5]),
    (member(2**63), [2**63]),
    (member(5, user={"id": "5", "username": 7}), [5]),
    (member(5, user={"id": "5", "username": None, "public_flags": "x"}), [5]),
    (member(5, premium_since={}), [5]),
]


@pytest.mark.parametrize(("broken", "unreadable"), BROKEN)
def test_skips_only_malformed_members(broken: Any, unreadable: list[int | None]) -> None:
    refused: list[ValidationError] = []
    page = read_page(GUILD, [member(1), broken, member(2)], STAMP, refused.append)
    assert [record[0] for record in page.users] == [record[1] for record in page.members] == [1, 2]
    assert page.unreadable == unreadable
    assert refused
    assert page.seen == 3


@pytest.mark.parametrize("ids", [("1e400", "[]"), ("5", "[1e400]")])
def test_skips_members_with_infinite_numbers(ids: tuple[str, str]) -> None:
    text = '{{"user": {{"id": {}, "username": "u"}}, "joined_at": null, "roles": {}}}'.format(*ids)
    page = read_page(GUILD, [member(1), decode(text), member(2)], STAMP, lambda error: None)
    assert [record[1] for record in page.members] == [1, 2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(
    payload=MEMBERS,
    where=st.lists(st.sampled_from(["user", "id", "username", "roles", "joined_at", "nick", "flags"])),
    junk=JSON,
)
def test_no_json_makes_a_page_raise(payload: Payload, where: list[str], junk: Any) -> None:
    for name in where:
        target = payload["user"] if name in ("id", "username") and isinstance(payload["user"], dict) else payload
        target[name] = junk
    page = read_page(GUILD, [member(2**62), payload], STAMP, lambda error: None)
    assert page.members[0][1] == 2**62
    assert len(page.members) + len(page.unreadable) == 2


def test_sorts_roles_and_clears_left_at() -> None:
    page = read_page(GUILD, [member(1, roles=["30", "4"])], STAMP, never)
    listed = dict(zip(LISTED_MEMBER_COLUMNS, page.members[0][2:], strict=False))
    assert listed["roles"] == [4, 30]
    assert listed["left_at"] is None


def test_reads_a_page_from_json() -> None:
    page = read_page(GUILD, orjson.loads(orjson.dumps([member(1), member(2)])), STAMP, never)
    assert len(page.members) == 2

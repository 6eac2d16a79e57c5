"""The shapes of other bots' files: what each entry is about, and where it is stored."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.docs.blocks import ROOT, blocks_of
from tests.operations.importing.files import GUILD, STATS, USER, import_content
from utils.database import Pool
from utils.operations.importing.reader import Reader
from utils.operations.importing.repair import UnusableValue
from utils.operations.importing.shapes import LATE_GUILD, Outline

G, H, U, V = GUILD, GUILD + 1, USER, USER + 1
RED = "384734293238749"
OBJECT_ID = {"$oid": "65a1b2c3d4e5f60718293a4b"}

#: File name, content, and the stored documents as (guild, key).
SHAPES: dict[str, tuple[str, Any, set[tuple[int, str]]]] = {
    "MEE6's players": (
        "mee6.json",
        {
            "admin": False,
            "guild": {"id": str(G), "name": "x"},
            "page": 0,
            "players": [
                {"guild_id": str(g), "id": str(u), "xp": 5, "message_count": 3, "detailed_xp": [1, 2, 3]}
                for g in (G, H)
                for u in (U, V)
            ],
        },
        {(G, f"{G}_{U}"), (G, f"{G}_{V}"), (H, f"{H}_{U}"), (H, f"{H}_{V}"), (G, f"{G}_mee6")},
    ),
    "an array of MEE6's players": (
        "levels.json",
        [{"guild_id": str(g), "id": str(U), "username": "x", "xp": 5} for g in (G, H)],
        {(G, f"{G}_{U}"), (H, f"{H}_{U}")},
    ),
    "guild_id and id": (
        "tickets.json",
        [{"guild_id": g, "id": n, "topic": "x"} for g in (G, H) for n in (1, 2)],
        {(G, f"{G}_1"), (G, f"{G}_2"), (H, f"{H}_1"), (H, f"{H}_2")},
    ),
    "message_id": (
        "reactions.json",
        [{"message_id": str(G + 5), "emoji": "a"}, {"message_id": str(G + 6), "guild_id": G, "emoji": "b"}],
        {(0, f"{G + 5}"), (G, f"{G}_{G + 6}")},
    ),
    "a message with two records": (
        "reactions.json",
        [{"message_id": str(G + 5), "emoji": "a"}, {"message_id": str(G + 5), "emoji": "b"}],
        {(0, f"{G + 5}"), (0, f"{G + 5}#2")},
    ),
    "warnings of a member": (
        "warnings.json",
        [{"guild_id": G, "user_id": U, "reason": reason} for reason in ("a", "b", "a")],
        {(G, f"{G}_{U}"), (G, f"{G}_{U}#2")},
    ),
    "quick.db": (
        "quickdb.json",
        [
            {"ID": f"money_{G}_{U}", "data": 5},
            {"ID": f"money_{G}_{V}", "data": 7},
            {"ID": "guilds", "data": {str(G): {"prefix": "?"}}},
            {"ID": str(H), "data": {str(U): {"a": 1}, str(V): {"a": 2}}},
        ],
        {(0, f"money_{G}_{U}"), (0, f"money_{G}_{V}"), (G, str(G)), (H, f"{H}_{U}"), (H, f"{H}_{V}")},
    ),
    "mongoexport": (
        "mongo.json",
        [{"_id": OBJECT_ID, "userID": str(u), "guildID": str(G), "xp": 5} for u in (U, V)],
        {(G, f"{G}_{U}"), (G, f"{G}_{V}")},
    ),
    "_id": ("tags.json", [{"_id": "hello", "text": "x"}, {"_id": OBJECT_ID}], {(0, "hello"), (0, OBJECT_ID["$oid"])}),
    "an _id of guild and user": (
        "mongo.json", [{"_id": {"guild": {"$numberLong": str(G)}, "user": U}, "xp": 1}], {(G, f"{G}_{U}")},
    ),
    "userID": ("people.json", [{"userID": str(U)}, {"userID": str(V)}], {(0, str(U)), (0, str(V))}),
    "Red": (
        "settings.json",
        {
            RED: {
                "GLOBAL": {"schema_version": 1},
                "GUILD": {str(G): {"bank_name": "x", "roles": {str(H): 1}}},
                "MEMBER": {str(G): {str(U): {"balance": 5}, str(V): {"balance": 6}}, str(H): {str(U): {"balance": 7}}},
                "USER": {str(U): {"balance": 1}},
            }
        },
        {
            (0, f"{RED}.GLOBAL"), (G, f"{RED}.GUILD.{G}"), (G, f"{RED}.MEMBER.{G}_{U}"), (G, f"{RED}.MEMBER.{G}_{V}"),
            (H, f"{RED}.MEMBER.{H}_{U}"), (0, f"{RED}.USER.{U}"),
        },
    ),
    "guild, then user": (
        "levels.json",
        {str(G): {str(U): {"xp": 1}, str(V): {"xp": 2}}, str(H): {str(U): 7}},
        {(G, f"{G}_{U}"), (G, f"{G}_{V}"), (H, f"{H}_{U}")},
    ),
    "guild with a list of users": (
        "levels.json",
        {str(G): [{"user_id": U, "n": 1}, {"user_id": V, "n": 1}]},
        {(G, f"{G}_{U}"), (G, f"{G}_{V}")},
    ),
    "guild with users and settings": (
        "data.json",
        {str(G): {"prefix": "!", "users": {str(U): {"n": 1}, f"<@!{V}>": {"n": 2}}, "log": 1}, str(H): {"prefix": "?"}},
        {(G, f"{G}_{U}"), (G, f"{G}_{V}"), (G, str(G)), (0, str(H))},
    ),
    "guilds in an array": (
        "guilds.json",
        [{"id": str(G), "name": "x", "members": [{"id": str(U)}, {"id": str(V)}]}],
        {(G, str(G)), (G, f"{G}_{U}"), (G, f"{G}_{V}")},
    ),
    "users": ("data.json", {"users": {str(U): {"n": 1}, str(V): {"n": 2}}}, {(0, str(U)), (0, str(V))}),
    "users of a stated guild": (
        "data.json",
        {"guild_id": str(G), "users": {str(U): {"n": 1}}},
        {(G, f"{G}_{U}"), (G, f"{G}_data")},
    ),
    "users in a guild's file": (f"{G}.json", {str(U): {"n": 1}, str(V): {"n": 1}}, {(G, f"{G}_{U}"), (G, f"{G}_{V}")}),
    "two containers of users": (
        "data.json",
        {"users": {str(U): {"n": 1}}, "members": {str(U): {"n": 2}}, "economy": {str(U): {"coins": 2}}},
        {(0, str(U)), (0, f"members.{U}"), (0, f"economy.{U}")},
    ),
    "mentions": ("afk.json", {f"<@!{U}>": {"n": 1}, f"<@{V}>": {"n": 2}}, {(0, str(U)), (0, str(V))}),
    "guild and mention": ("afk.json", {f"{G}_<@!{U}>": {}, f"{G}-{V}": {}}, {(G, f"{G}_{U}"), (G, f"{G}-{V}")}),
    "settings": ("config.json", {"prefix": "!", "log": {"channel": str(G)}}, {(0, "config")}),
    "settings of one type": ("bot_settings.json", {"prefix": "!", "token": "x"}, {(0, "bot_settings")}),
    "settings without the name": ("mybot.json", {"prefix": "!", "enabled": True, "admins": [U]}, {(0, "mybot")}),
    "settings with a list of users": ("config.json", {"prefix": "!", "users": [str(U)]}, {(0, "config")}),
    "settings of guilds": (
        "prefixes.json", {str(G): {"prefix": "!", "roles": {str(H): 1}}, str(H): {}}, {(0, str(G)), (0, str(H))},
    ),
    "entries of one type": ("tags.json", {"hello": "world", "foo": "bar"}, {(0, "hello"), (0, "foo")}),
}  # fmt: skip


async def stored(database: Pool) -> set[tuple[int, str]]:
    rows = await database.fetch("SELECT guild_id, key FROM documents WHERE namespace <> 'legacy'")
    return {(row["guild_id"], row["key"]) for row in rows}


@pytest.mark.parametrize("name", SHAPES)
async def test_entries_have_the_keys_that_identify_them(database: Pool, tmp_path: Path, name: str) -> None:
    file, content, expected = SHAPES[name]
    outcome = await import_content(database, tmp_path, file, content)
    assert outcome.ok, outcome.text
    assert await stored(database) == expected
    assert outcome.data["files"][0]["lost_entries"] == 0
    again = await import_content(database, tmp_path, file, content)
    assert "nothing to change" in again.text


def nested(users: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return files in which two guilds have these users: by name, the file and its content."""
    records = [{"user_id": user, **value} for user, value in users.items()]
    return {
        "guild, then user": ("levels.json", {str(G): users, str(H): users}),
        "with a version first": ("levels.json", {str(g): {"version": 1, **users} for g in (G, H)}),
        "in a container": ("levels.json", {"guilds": {str(G): users, str(H): users}}),
        "in a container with a version": ("levels.json", {"guilds": {"version": 1, str(G): users, str(H): users}}),
        "in containers of any name": ("levels.json", {"a": {"b": {str(G): users, str(H): users}}}),
        "settings beside users": ("data.json", {str(g): {"prefix": "!", "users": users} for g in (G, H)}),
        "settings and guilds": ("data.json", {"version": 2, "guilds": {str(g): {"users": users} for g in (G, H)}}),
        "users in a container": ("data.json", {str(g): {"leveling": {"on": True, "users": users}} for g in (G, H)}),
        "lists of records": ("levels.json", {str(G): records, str(H): records}),
        "lists in a container": ("levels.json", {str(g): {"warnings": {"members": records}} for g in (G, H)}),
        "objects in an array": ("levels.json", [{str(G): users}, {str(H): users}]),
        "guilds in an array": ("levels.json", [{"guild_id": str(g), "members": users} for g in (G, H)]),
        "quick.db": ("json.json", [{"ID": str(G), "data": users}, {"ID": str(H), "data": users}]),
        "Red": ("settings.json", {RED: {"GLOBAL": {}, "MEMBER": {str(G): users, str(H): users}}}),
        "members.json": ("members.json", {str(G): users, str(H): users}),
        "players": ("mee6.json", {"players": [{"guild_id": g, **row} for g in (G, H) for row in records]}),
    }


#: A reader for which 300 members are more than its longest entry and than what it reads at once.
BoundedReader = partial(Reader, longest=10_000, window=1_000)


@pytest.mark.parametrize("size", [2, 300], ids=["small", "large"])
@pytest.mark.parametrize("shape", nested({}))
def test_nested_members_are_members_at_any_size(shape: str, size: int) -> None:
    file, content = nested({str(U + n): {"messages": n, "note": "x" * 80} for n in range(size)})[shape]
    outline = Outline("members" if file == "members.json" else "documents", Path(file).stem)
    found: set[tuple[int, int | None]] = set()
    for entry in BoundedReader(io.BytesIO(json.dumps(content).encode()), outline=outline):
        assert entry.problem is None
        place = outline.place(entry)
        if place.is_member:
            found.add((place.guild_id, place.user_id))
    assert found == {(g, U + n) for g in (G, H) for n in range(size)}


@given(
    st.sampled_from(sorted(nested({}))),
    st.integers(2, 6),
    st.integers(200, 2_000),
    st.integers(1, 300),
    st.booleans(),
)
def test_the_longest_entry_makes_no_difference_to_members(
    shape: str, size: int, longest: int, window: int, is_spaced: bool
) -> None:
    file, content = nested({str(U + n): {"messages": n, "note": "xx"} for n in range(size)})[shape]
    text = json.dumps(content, indent=2 if is_spaced else None)
    outline = Outline("members" if file == "members.json" else "documents", Path(file).stem)
    found = set()
    for entry in Reader(io.BytesIO(text.encode()), outline=outline, longest=longest, window=window):
        assert entry.problem is None
        place = outline.place(entry)
        found |= {(place.guild_id, place.user_id)} if place.is_member else set()
    assert found == {(g, U + n) for g in (G, H) for n in range(size)}


def test_what_is_too_long_for_one_document_becomes_several() -> None:
    names = {f"name {n}": {"note": "x" * 100} for n in range(12_000)}
    for content, guild_id in (({str(G): names}, G), ({"shop": names}, 0), ({str(G): {"users": {}, **names}}, G)):
        outline = Outline("documents", "data")
        places = []
        for entry in Reader(io.BytesIO(json.dumps(content).encode()), outline=outline):
            assert entry.problem is None
            places.append(outline.place(entry))
        assert {place.guild_id for place in places} == {guild_id}
        assert len({place.key for place in places}) == len(places) >= len(names)


@pytest.mark.parametrize("size", [2, 300], ids=["small", "large"])
def test_nested_members_in_lines_are_members(size: int) -> None:
    users = {str(U + n): {"messages": n, "note": "x" * 80} for n in range(size)}
    for lines in (
        [{str(g): users} for g in (G, H)],
        [{"_id": str(g), "prefix": "!", "users": users} for g in (G, H)],
        [{"guild_id": {"$numberLong": str(g)}, "members": users} for g in (G, H)] if size < 10 else [],
        [{"guild_id": g, "user_id": user} for g in (G, H) for user in users],
    ):
        text = "\n".join(map(json.dumps, lines))
        outline = Outline("documents", "guilds")
        found, numbers = set(), set()
        for entry in BoundedReader(io.BytesIO(text.encode()), lines=True, outline=outline):
            assert entry.problem is None
            place = outline.place(entry)
            numbers.add(entry.line)
            if place.is_member:
                found.add((place.guild_id, place.user_id))
        assert found == ({(g, U + n) for g in (G, H) for n in range(size)} if lines else set())
        assert numbers == set(range(1, len(lines) + 1))


@pytest.mark.parametrize("size", [1, pytest.param(12_000, marks=pytest.mark.slow)], ids=["small", "large"])
async def test_a_guild_stated_after_its_users_is_not_lost_in_silence(database: Pool, tmp_path: Path, size: int) -> None:
    users = {str(U + n): {"messages": 1, "note": "x" * 90} for n in range(size)}
    for stated in ({"guild_id": str(G)}, {"guild": {"id": str(G), "name": "x"}}):
        await database.execute("DELETE FROM member_stats")
        outcome = await import_content(database, tmp_path, "data.json", {"users": users, **stated})
        members = await database.fetchval("SELECT count(*) FROM member_stats")
        if size == 1:
            assert (outcome.ok, members) == (True, 1)
        else:
            assert (outcome.exit_code, outcome.data["left_out"], members) == (3, {LATE_GUILD: 1}, 0)
        outcome = await import_content(database, tmp_path, "data.json", {"users": users, **stated}, guild_id=G)
        assert (outcome.ok, await database.fetchval("SELECT count(*) FROM member_stats")) == (True, size)


async def test_the_guild_option_does_not_replace_a_stated_guild(database: Pool, tmp_path: Path) -> None:
    content = {str(G): {str(U): {"messages": 4}}}
    for guild_id in (G, H):
        await import_content(database, tmp_path, "levels.json", content, guild_id=guild_id)
        assert [tuple(row)[:3] for row in await database.fetch(STATS)] == [(G, U, 4)]


def test_entries_of_users_are_not_split() -> None:
    content = {str(U): {"xp": 1, "friends": {"best": {str(V): {"since": 1}}}}, str(V): {"xp": 2}}
    outline = Outline("documents", "profiles")
    entries = list(Reader(io.BytesIO(json.dumps(content).encode()), outline=outline))
    assert [outline.place(entry).key for entry in entries] == [str(U), str(V)]


@pytest.mark.parametrize("size", [1, pytest.param(12_000, marks=pytest.mark.slow)], ids=["small", "large"])
async def test_nested_members_fill_the_statistics(database: Pool, tmp_path: Path, size: int) -> None:
    users = {str(U + n): {"messages": n, "xp": 2 * n, "note": "x" * 80} for n in range(size)}
    players = [{"guild_id": g, "id": user, **value} for g in (G, H) for user, value in users.items()]
    for file, content in (
        ("levels.json", {str(G): users, str(H): users}),
        ("data.json", {str(g): {"prefix": "!", "users": users} for g in (G, H)}),
        ("settings.json", {RED: {"GLOBAL": {}, "MEMBER": {str(G): users, str(H): users}}}),
        (
            "players.json",
            {"players": players},
        ),
    ):
        await database.execute("DELETE FROM member_stats")
        outcome = await import_content(database, tmp_path, file, content)
        assert outcome.ok, outcome.text
        rows = [(row["guild_id"], row["user_id"], row["message_count"]) for row in await database.fetch(STATS)]
        assert rows == [(g, U + n, n) for g in (G, H) for n in range(size)], file
        assert await database.fetchval("SELECT sum(xp) FROM member_stats") == 2 * size * (size - 1)


async def test_settings_file_is_stored_unchanged(database: Pool, tmp_path: Path) -> None:
    content = {"prefix": "!", "log_channel": G, "nested": {"a": [1, 2]}}
    await import_content(database, tmp_path, "config.json", content)
    assert await database.fetchval("SELECT value FROM documents WHERE namespace = 'legacy.config'") == content


async def test_rest_of_a_guild_stays_one_document(database: Pool, tmp_path: Path) -> None:
    content = {str(G): {"prefix": "!", "users": {str(U): {"n": 1}}, "roles": {str(H): "x"}}}
    await import_content(database, tmp_path, "data.json", content)
    value = await database.fetchval("SELECT value FROM documents WHERE guild_id = $1 AND key = $2", G, str(G))
    assert value == {"prefix": "!", "roles": {str(H): "x"}}


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        ({"message_count": "12", "last_active": None}, (G, U, 12, None)),
        ({"messageCount": 12}, (G, U, 12, None)),
        ({"messages": 12, "statistics": {"xp": 1}}, (G, U, 12, None)),
        ({"stats": {"messages": 12}}, (G, U, 12, None)),
    ],
)
@pytest.mark.parametrize("file", ["members.json", "levels.json"])
async def test_reads_statistics_without_the_statistics_object(
    database: Pool, tmp_path: Path, file: str, entry: dict[str, Any], row: tuple[Any, ...]
) -> None:
    await import_content(database, tmp_path, file, {f"{G}_{U}": entry})
    assert [tuple(row) for row in await database.fetch(STATS)] == [row]


@pytest.mark.parametrize("content", [{f"<@!{U}>": {}}, {"users": {str(U): {}}}, {f"money_{U}": 1}, [{"ID": f"x_{U}"}]])
async def test_omits_suppressed_users_in_any_shape(database: Pool, tmp_path: Path, content: Any) -> None:
    await database.execute("INSERT INTO ops.suppressions (user_id) VALUES ($1)", U)
    outcome = await import_content(database, tmp_path, "data.json", content)
    assert outcome.data["files"][0]["suppressed"] == 1
    assert await stored(database) == set()


async def test_guild_option_makes_users_members(database: Pool, tmp_path: Path) -> None:
    for name in ("users.json", "members.json", "data.json"):
        content = {"users": {str(U): {"messages": 4}}, "members": {}} if name == "data.json" else {U: {"messages": 4}}
        await database.execute("DELETE FROM member_stats")
        await import_content(database, tmp_path, name, content, guild_id=G)
        assert [tuple(row)[:3] for row in await database.fetch(STATS)] == [(G, U, 4)], name


async def test_ids_of_channels_are_no_members(database: Pool, tmp_path: Path) -> None:
    await database.execute("INSERT INTO guilds (id, name) VALUES ($1, 'x')", G)
    await database.execute("INSERT INTO channels (guild_id, id, name, type) VALUES ($1, $2, 'x', 0)", G, U)
    await import_content(database, tmp_path, "counts.json", {str(G): {str(U): {"messages": 3}}})
    assert await stored(database) == {(G, f"{G}_{U}")}
    assert await database.fetch(STATS) == []


async def test_chosen_kind_overrides_the_shape(database: Pool, tmp_path: Path) -> None:
    content = {"prefix": "!", "users": {str(U): 1}}
    await import_content(database, tmp_path, "a.json", content, kind="documents")
    await import_content(database, tmp_path, "b.json", content, kind="settings")
    assert await stored(database) == {(0, "prefix"), (0, "users"), (0, "b")}


async def test_documented_examples_are_imported_as_described(database: Pool, tmp_path: Path) -> None:
    examples = [block for block in blocks_of(ROOT / "docs/how-to/importing.md") if block.language == "json"]
    assert len(examples) > 8
    for number, block in enumerate(examples):
        outcome = await import_content(database, tmp_path, f"example{number}.json", json.loads(block.text))
        assert outcome.ok, f"{block}: {outcome.text}"
        assert outcome.data["files"][0]["rejected"] == {}, str(block)


ids = st.integers(0, 3).map(lambda number: str(GUILD + number))
names = ids | ids.map(lambda text: f"<@!{text}>") | st.sampled_from(
    ["users", "members", "guilds", "data", "xp", "id", "ID", "guild_id", "user_id", "key", "prefix", "MEMBER", "GLOBAL"]
)  # fmt: skip
leaves = st.integers(0, 9) | ids | st.booleans() | st.none()
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=20
)  # fmt: skip


def leaves_in(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return the scalars in a value, each with the name it has there."""
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in leaves_in(item, name)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves_in(item, key)]
    return [(key, json.dumps(value))]


@given(st.lists(trees, max_size=4) | st.dictionaries(names, trees, max_size=4), st.integers(1, 60))
def test_no_value_of_any_shape_is_lost(whole: Any, window: int) -> None:
    outline = Outline("documents", "data")
    reader = Reader(io.BytesIO(json.dumps(whole).encode()), window=window, outline=outline)
    found: list[tuple[str, str]] = []
    for entry in reader:
        assert json.loads(entry.text) == entry.value
        found += leaves_in(entry.value, entry.key or "")
        with contextlib.suppress(UnusableValue):  # nothing identifies it: it is reported
            place = outline.place(entry)
            assert place.key
            assert not place.is_member or (place.guild_id and place.user_id)
    # The key of a record of a key and a value is not part of what is stored.
    missing = Counter(text for _, text in leaves_in(whole)) - Counter(text for _, text in found)
    assert sum(missing.values()) <= count_records(whole)


def count_records(value: Any) -> int:
    """Count the objects in arrays that have just two fields."""
    if isinstance(value, dict):
        return sum(map(count_records, value.values()))
    if not isinstance(value, list):
        return 0
    return sum(count_records(item) + (isinstance(item, dict) and len(item) == 2) for item in value)

"""Import of members.json: repairs, rejections, and rules for merging with existing rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.operations.importing.files import (
    GUILD,
    PREFERENCES,
    STATS,
    USER,
    export_text,
    import_content,
    member,
    stored_rows,
)
from utils.database import Pool
from utils.documents import preferences

KEY = f"{GUILD}_{USER}"
ACTIVE = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


def rejects(outcome_data: Any) -> list[dict[str, Any]]:
    path = outcome_data["files"][0]["rejects"]
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if path else []


async def test_member_fills_stats_and_preferences_only(database: Pool, tmp_path: Path) -> None:
    outcome = await import_content(database, tmp_path, "members.json", {KEY: member()})
    assert outcome.ok
    assert [tuple(row) for row in await database.fetch(STATS)] == [(GUILD, USER, 17, ACTIVE)]
    assert [tuple(row) for row in await database.fetch(PREFERENCES)] == [(GUILD, USER, True, "de")]
    row = await database.fetchrow("SELECT * FROM documents WHERE namespace = 'legacy.members'")
    assert row is not None
    assert (row["guild_id"], row["key"], row["value"]) == (GUILD, KEY, member())
    for table in ("members", "users", "guilds"):
        assert await database.fetchval(f"SELECT count(*) FROM {table}") == 0  # noqa: S608
    assert str(GUILD) not in outcome.text
    assert str(USER) not in outcome.text


@pytest.mark.parametrize(
    ("part", "name", "value", "stored", "kind"),
    [
        ("statistics", "message_count", "12", 12, "message_count: count as text"),
        ("statistics", "message_count", 12.7, 12, "message_count: count with a fraction, truncated"),
        ("statistics", "message_count", -3, 0, "message_count: negative count set to 0"),
        ("statistics", "last_active", "2024-05-06T07:08:09", ACTIVE, "last_active: time without a zone, assumed UTC"),
        ("statistics", "last_active", "2024-05-06T09:08:09+02:00", ACTIVE, None),
        ("statistics", "last_active", "2024-05-06T07:08:09Z", ACTIVE, None),
        ("statistics", "last_active", 1714979289, ACTIVE, "last_active: time in Unix seconds"),
        ("statistics", "last_active", 1714979289000, ACTIVE, "last_active: time in Unix milliseconds"),
        ("statistics", "last_active", "1714979289", ACTIVE, "last_active: Unix time as text"),
        ("preferences", "notifications", "true", True, "notifications: boolean spelled differently"),
        ("preferences", "notifications", "OFF", False, "notifications: boolean spelled differently"),
        ("preferences", "notifications", 1, True, "notifications: boolean spelled differently"),
        ("preferences", "language", "pt_br", "pt-BR", "language: language tag normalized"),
        ("preferences", "language", None, None, None),
    ],
)
async def test_repairs_values(
    database: Pool, tmp_path: Path, part: str, name: str, value: Any, stored: Any, kind: str | None
) -> None:
    entry = member()
    entry[part] = {**entry[part], name: value}
    outcome = await import_content(database, tmp_path, "members.json", {KEY: entry})
    table, column = ("member_stats", "last_active_at" if name == "last_active" else name)
    if part == "preferences":
        table = "member_preferences"
    assert await database.fetchval(f"SELECT {column} FROM {table}") == stored  # noqa: S608
    found = outcome.data["files"][0]["repaired"]
    assert list(found) == ([kind] if kind else [])
    if kind:
        assert found[kind] == {"count": 1, "examples": [{"line": 1, "key": KEY, "value": ascii(value)}]}
    assert rejects(outcome.data) == []
    assert json.loads(await export_text(database, tmp_path, "members")) == {KEY: entry}  # unrepaired


@pytest.mark.parametrize(
    ("entry", "reasons"),
    [
        (member(preferences={"notifications": "perhaps", "language": "Klingon!"}),
         ["notifications: the value is not a boolean", "language: the language is not a tag like en, de or pt-BR"]),
        (member(statistics={"message_count": 10**15, "last_active": "yesterday"}),
         ["message_count: the count is above 10^12", "last_active: the time is neither ISO 8601 nor Unix seconds"]),
        (member(statistics={"message_count": True, "last_active": 0}),
         ["message_count: the count is not a number", "last_active: the time is before 2015"]),
        (member(statistics={"message_count": [], "last_active": "9999-12-31T23:59:59-12:00"}),
         ["message_count: the count is not a number", "last_active: the time is out of range"]),
        (member(statistics={"last_active": 10**30}), ["last_active: the time is out of range"]),
        (member(statistics=7, preferences=[]), ["statistics: it is not an object", "preferences: it is not an object"]),
        (["nothing"], ["it is not an object"]),
    ],
)  # fmt: skip
async def test_unusable_values_are_recorded_and_original_is_kept(
    database: Pool, tmp_path: Path, entry: Any, reasons: list[str]
) -> None:
    outcome = await import_content(database, tmp_path, "members.json", f'{{\n  "{KEY}": {json.dumps(entry)}\n}}')
    assert rejects(outcome.data) == [
        {"line": 2, "column": 42, "key": KEY, "reasons": reasons, "stored": True, "text": json.dumps(entry)}
    ]
    assert json.loads(await export_text(database, tmp_path, "members")) == {KEY: entry}


@pytest.mark.parametrize(
    ("key", "problem"), [(f" {GUILD} - {USER} ", None), (f"{GUILD}", "guild_user"), ("0_5", "not a Discord id")]
)
async def test_reads_differently_spelled_member_keys(
    database: Pool, tmp_path: Path, key: str, problem: str | None
) -> None:
    outcome = await import_content(database, tmp_path, "members.json", {key: member()})
    assert await database.fetchval("SELECT guild_id FROM documents WHERE key = $1", key) == (0 if problem else GUILD)
    assert await database.fetchval("SELECT count(*) FROM member_stats") == (0 if problem else 1)
    assert [problem in row["reasons"][0] for row in rejects(outcome.data)] == ([True] if problem else [])


async def test_reads_arrays_and_lines_of_members(database: Pool, tmp_path: Path) -> None:
    entries = [{"guild_id": GUILD, "user_id": str(USER + i), **member()} for i in range(3)]
    await import_content(database, tmp_path, "members.json", entries)
    first = await stored_rows(database)
    again = await import_content(
        database, tmp_path, "members.ndjson", "\n".join(map(json.dumps, entries)), kind="members"
    )
    assert "nothing to change" in again.text
    assert await stored_rows(database) == first
    assert len(first[1]) == 3


async def test_keeps_greater_statistics(database: Pool, tmp_path: Path) -> None:
    later = datetime(2025, 1, 1, tzinfo=UTC)
    await database.execute(
        "INSERT INTO member_stats (guild_id, user_id, message_count, last_active_at, xp)"
        " VALUES ($1, $2, 100, NULL, 5), ($1, $3, 3, $4, 6), ($1, $5, 100, $4, 7)",
        GUILD, USER, USER + 1, later, USER + 2,
    )  # fmt: skip
    outcome = await import_content(
        database, tmp_path, "members.json", {f"{GUILD}_{USER + i}": member() for i in range(4)}
    )  # fmt: skip
    assert [tuple(row) for row in await database.fetch(STATS)] == [
        (GUILD, USER, 100, ACTIVE), (GUILD, USER + 1, 17, later), (GUILD, USER + 2, 100, later),
        (GUILD, USER + 3, 17, ACTIVE),
    ]  # fmt: skip
    assert await database.fetchval("SELECT sum(xp) FROM member_stats") == 18
    file = outcome.data["files"][0]
    assert (file["stats_new"], file["stats_changed"]) == (1, 2)


async def test_keeps_preferences_chosen_by_the_member(database: Pool, tmp_path: Path) -> None:
    await preferences.put(database, GUILD, USER, notifications=False)
    await preferences.put(database, GUILD, USER + 1, language="fr")
    await preferences.put(database, GUILD, USER + 2, language="fr", notifications=False)
    whole = {f"{GUILD}_{USER + i}": member() for i in range(4)}
    outcome = await import_content(database, tmp_path, "members.json", whole)
    assert [tuple(row) for row in await database.fetch(PREFERENCES)] == [
        (GUILD, USER, False, "de"), (GUILD, USER + 1, True, "fr"), (GUILD, USER + 2, False, "fr"),
        (GUILD, USER + 3, True, "de"),
    ]  # fmt: skip
    file = outcome.data["files"][0]
    assert (file["preferences_new"], file["preferences_changed"]) == (1, 2)


async def test_omits_suppressed_users(database: Pool, tmp_path: Path) -> None:
    await database.execute("INSERT INTO ops.suppressions (user_id) VALUES ($1)", USER)
    outcome = await import_content(database, tmp_path, "members.json", {KEY: member(), f"{GUILD}_{USER + 1}": member()})
    users = await import_content(database, tmp_path, "users.json", {str(USER): {}, str(USER + 1): {}})
    assert [item.data["files"][0]["suppressed"] for item in (outcome, users)] == [1, 1]
    documents, stats, choices = await stored_rows(database)
    assert not any(str(USER) in row[2] for row in documents)
    assert [row[1] for row in (*stats, *choices)] == [USER + 1, USER + 1]

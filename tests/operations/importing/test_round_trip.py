"""Export, and import followed by export."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.operations.importing.files import GUILD, USER, export_text, files_in, import_content, member, stored_rows
from tests.operations.importing.test_escaping import any_json, texts
from utils.database import Pool
from utils.exceptions import ValidationError
from utils.operations.importing.escaping import original_key

keys = texts.filter(lambda key: 0 < len(key) <= 50)
files = st.dictionaries(keys, any_json, min_size=1, max_size=8)


@given(files, st.booleans())
@examples(30)
async def test_any_object_round_trips_in_order(
    database: Pool, tmp_path: Path, whole: dict[str, Any], is_pretty: bool
) -> None:
    await database.execute("DELETE FROM documents")
    text = json.dumps(whole, indent=2 if is_pretty else None)
    outcome = await import_content(database, tmp_path, "things.json", text, kind="documents")
    assert outcome.data["files"][0]["documents_new"] == len(whole)
    exported = json.loads(await export_text(database, tmp_path, "legacy.things"))
    assert exported == whole
    assert list(exported) == list(whole)
    again = await import_content(database, tmp_path, "things.json", text, kind="documents")
    assert "nothing to change" in again.text


@given(files)
@examples(15)
async def test_json_lines_and_csv_round_trip(database: Pool, tmp_path: Path, whole: dict[str, Any]) -> None:
    await database.execute("DELETE FROM documents")
    await import_content(database, tmp_path, "shop.json", whole)
    lines = await export_text(database, tmp_path, "shop", "jsonl")
    before = [row[:4] for row in (await stored_rows(database))[0]]
    await database.execute("DELETE FROM documents")
    await import_content(database, tmp_path, "shop.jsonl", lines)
    assert [row[:4] for row in (await stored_rows(database))[0]] == before
    table = list(csv.reader(io.StringIO(await export_text(database, tmp_path, "shop", "csv"), newline="")))
    assert table[0] == ["guild_id", "key", "value"]
    assert {original_key(row[1]): json.loads(row[2]) for row in table[1:]} == whole


async def test_exports_members_of_one_guild_and_of_all(database: Pool, tmp_path: Path) -> None:
    whole = {f"{guild}_{user}": member() for guild in (GUILD, GUILD + 1) for user in (USER + 2, USER)}
    await import_content(database, tmp_path, "members.json", whole)
    exported = json.loads(await export_text(database, tmp_path, "members"))
    assert (exported, list(exported)) == (whole, list(whole))
    one = json.loads(await export_text(database, tmp_path, "members", guild_id=GUILD))
    assert one == {key: value for key, value in whole.items() if key.startswith(f"{GUILD}_")}


async def test_keys_in_several_guilds_require_json_lines(database: Pool, tmp_path: Path) -> None:
    lines = [{"guild_id": str(guild), "key": "prefix", "value": "!"} for guild in (GUILD, GUILD + 1)]
    await import_content(database, tmp_path, "greetings.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(ValidationError, match="--guild"):
        await export_text(database, tmp_path, "legacy.greetings")
    out = await export_text(database, tmp_path, "legacy.greetings", "jsonl")
    assert [json.loads(line) for line in out.splitlines()] == lines


async def test_exports_whole_tables(database: Pool, tmp_path: Path) -> None:
    await import_content(database, tmp_path, "members.json", {f"{GUILD}_{USER + i}": member() for i in range(2_500)})
    rows = json.loads(await export_text(database, tmp_path, "member_stats"))
    assert len(rows) == 2_500
    assert rows[1] == {
        "guild_id": GUILD, "user_id": USER + 1, "message_count": 17, "last_active_at": "2024-05-06T07:08:09+00:00",
        "xp": 0,
    }  # fmt: skip
    lines = await export_text(database, tmp_path, "member_stats", "jsonl", guild_id=GUILD)
    assert [json.loads(line) for line in lines.splitlines()] == rows
    assert await export_text(database, tmp_path, "member_stats", "jsonl", guild_id=1) == ""


async def test_postgresql_reads_exported_csv(database: Pool, tmp_path: Path) -> None:
    await database.execute(
        "INSERT INTO users (id, username, global_name, avatar)"
        " VALUES (1, '', NULL, E'a,\"b\"\\n\\\\.'), (2, ' x', '\\.', 'é')"
    )
    text = await export_text(database, tmp_path, "table:users", "csv")
    await database.execute("CREATE TABLE copy_of_users (LIKE users)")
    async with database.acquire() as connection:
        await connection.copy_to_table("copy_of_users", source=io.BytesIO(text.encode()), format="csv", header=True)
    difference = "SELECT * FROM users EXCEPT SELECT * FROM copy_of_users"
    assert await database.fetch(difference) == []
    assert await database.fetchval("SELECT count(*) FROM copy_of_users") == 2


@pytest.mark.parametrize("what", ["no such thing", "table:nowhere", "member_stat", "members", "legacy.nothing"])
async def test_unknown_source_leaves_existing_file_unchanged(database: Pool, tmp_path: Path, what: str) -> None:
    (tmp_path / "out.json").write_text("before")
    with pytest.raises(ValidationError):
        await export_text(database, tmp_path, what)
    assert (tmp_path / "out.json").read_text() == "before"
    assert [path.name for path in files_in(tmp_path)] == ["out.json"]

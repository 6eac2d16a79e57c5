"""Description of the schema."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from models import Base
from utils.database import Pool
from utils.exceptions import GuildbookError
from utils.operations.development.seed import seed
from utils.operations.upkeep import describe as describing
from utils.operations.upkeep.describe import describe

MEMBERS = 50


async def test_describes_every_table(database: Pool) -> None:
    found = {(table["schema"], table["name"]): table for table in await describe(database)}
    for table in Base.metadata.tables.values():
        described = found[table.schema or "public", table.name]
        assert {column["name"] for column in described["columns"]} == set(table.columns.keys())
        assert any(key.startswith("PRIMARY KEY") for key in described["keys"].values())
        assert described["comment"]
    assert found["public", "role_membership"]["kind"] == "view"
    assert not any(name.startswith("changes_") for _, name in found)
    json.dumps(list(found.values()))


async def test_describes_columns_keys_and_indexes_of_a_table(database: Pool) -> None:
    await seed(database, guilds=1, members=MEMBERS)
    (members,) = await describe(database, "members")
    columns = {column["name"]: column for column in members["columns"]}
    assert columns["roles"] == {
        "name": "roles", "type": "bigint[]", "nullable": False, "default": "'{}'::bigint[]", "generated": False,
        "comment": None,
    }  # fmt: skip
    assert members["keys"]["pk_members"] == "PRIMARY KEY (guild_id, user_id)"
    names = {index["name"] for index in members["indexes"]}
    assert names == {"pk_members", "ix_members_user_id", "ix_members_roles", "ix_members_guild_id_lower_nick"}
    assert members["estimated_rows"] == MEMBERS
    assert members["bytes"] > sum(index["bytes"] for index in members["indexes"]) > 0
    (changes,) = await describe(database, "public.changes")
    assert (changes["kind"], changes["partitions"]) == ("partitioned table", 1)
    (users,) = await describe(database, "users")
    assert next(column for column in users["columns"] if column["name"] == "created_at")["generated"]


async def test_database_comments_take_precedence(database: Pool) -> None:
    await database.execute("COMMENT ON TABLE members IS 'who is where'; COMMENT ON COLUMN members.nick IS 'a name'")
    (members,) = await describe(database, "members")
    assert members["comment"] == "who is where"
    assert [column["comment"] for column in members["columns"] if column["comment"]] == ["a name"]
    assert "a name" in describing.plain([members])
    assert "a name" in rendered([members])


async def test_unknown_table_suggests_similar_name(database: Pool) -> None:
    with pytest.raises(GuildbookError, match=r"there is no table membres in .*; there is members"):
        await describe(database, "membres")


async def test_rejects_sql_in_identifiers(database: Pool) -> None:
    with pytest.raises(GuildbookError):
        await describe(database, "members; DROP TABLE members")


async def test_formats_tables_as_text(database: Pool) -> None:
    tables = await describe(database)
    for text in (describing.plain(tables), rendered(tables)):
        for expected in ("guilds (table, rows not estimated yet, ", "ops.leases", "role_membership (view)", "bigint[]"):
            assert expected in text
    assert "  key    pk_members: PRIMARY KEY (guild_id, user_id)" in describing.plain(tables)


def rendered(tables: list[describing.Table]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(describing.pretty(tables))
    return str(console.file.getvalue())  # type: ignore[attr-defined]

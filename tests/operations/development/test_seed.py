"""A database to develop against: seeded, reset with care, and described."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
from rich.console import Console

from models import Base
from tests.mirror.tables import GUILD, said, write
from utils.database import ConnectTarget, Pool
from utils.exceptions import GuildbookError, MigrationError
from utils.operations import migrations
from utils.operations.development import seed as development
from utils.operations.development.seed import reset, seed
from utils.operations.upkeep import describe as describing
from utils.operations.upkeep.describe import describe
from utils.service.lease import Lease

FOREIGN = 50


async def counts(database: Pool) -> dict[str, int]:
    tables = ("guilds", "users", "members", "roles", "channels", "threads", "member_stats")
    return {table: await database.fetchval(f"SELECT count(*) FROM {table}") for table in tables}  # noqa: S608


async def people(database: Pool) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await database.fetch("SELECT id, username, avatar FROM users ORDER BY id")]


async def test_what_is_seeded_is_there_and_hangs_together(database: Pool) -> None:
    written = await seed(database, guilds=3, members=80)
    assert written == await counts(database)
    assert (written["guilds"], written["members"]) == (3, 240)
    assert written["users"] < written["members"]  # some are in more than one guild
    for broken in (
        "SELECT count(*) FROM members m WHERE NOT EXISTS (SELECT FROM users u WHERE u.id = m.user_id)",
        "SELECT count(*) FROM members m JOIN users u ON u.id = m.user_id WHERE m.joined_at < u.created_at",
        "SELECT count(*) FROM members WHERE joined_at > now() OR left_at > now() OR left_at < joined_at",
        "SELECT count(*) FROM members m WHERE EXISTS (SELECT FROM unnest(m.roles) AS held WHERE NOT EXISTS "
        "(SELECT FROM roles r WHERE r.guild_id = m.guild_id AND r.id = held))",
        "SELECT count(*) FROM guilds g WHERE NOT EXISTS (SELECT FROM members m WHERE m.guild_id = g.id "
        "AND m.user_id = g.owner_id AND m.left_at IS NULL)",
        "SELECT count(*) FROM guilds g WHERE member_count <> (SELECT count(*) FROM members m "
        "WHERE m.guild_id = g.id AND m.left_at IS NULL)",
        "SELECT count(*) FROM member_stats WHERE last_active_at > now()",
        "SELECT count(*) FROM changes",
    ):
        assert await database.fetchval(broken) == 0, broken


async def test_one_seed_gives_the_same_people(database: Pool) -> None:
    await seed(database, guilds=1, members=20, seed=4)
    first = await people(database)
    await reset(database, name=None, environment="development")
    await seed(database, guilds=1, members=20, seed=4)
    assert await people(database) == first


async def test_a_database_with_guilds_is_only_added_to_on_demand(database: Pool) -> None:
    await write(database, said("guilds", (GUILD,), 1, name="a real one"))
    with pytest.raises(GuildbookError, match=r"guilds are in this database already \(1\).*--more"):
        await seed(database)
    await seed(database, guilds=1, members=5, more=True)
    await seed(database, guilds=2, members=5, more=True)
    assert (await counts(database))["guilds"] == 4
    assert await database.fetchval("SELECT name FROM guilds WHERE id = $1", GUILD) == "a real one"


@pytest.mark.parametrize(("guilds", "members"), [(0, 5), (1, 0)])
async def test_a_seeding_of_nothing_is_refused(database: Pool, guilds: int, members: int) -> None:
    with pytest.raises(GuildbookError, match="at least 1 of each"):
        await seed(database, guilds=guilds, members=members)


async def test_a_seeding_that_breaks_off_leaves_nothing(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = development._Invention.guild
    calls = 0

    def once(self: Any, size: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of names")
        return made(self, size)

    monkeypatch.setattr(development._Invention, "guild", once)
    with pytest.raises(RuntimeError):
        await seed(database, guilds=2, members=5)
    assert not any((await counts(database)).values())


async def test_a_reset_makes_everything_anew(database: Pool) -> None:
    await seed(database, guilds=1, members=5)
    name = await reset(database, name=None, environment="development")
    assert name == await database.fetchval("SELECT current_database()")
    assert not any((await counts(database)).values())
    assert await migrations.pending(database) == []
    assert await database.fetchval("SELECT count(*) FROM ops.leases") == 0


async def test_outside_development_a_reset_wants_the_databases_name(database: Pool) -> None:
    name = await database.fetchval("SELECT current_database()")
    await seed(database, guilds=1, members=5)
    for given, environment in ((None, "production"), ("guildbook", "production"), ("guildbook", "development")):
        with pytest.raises(GuildbookError, match=name):
            await reset(database, name=given, environment=environment)
    assert (await counts(database))["members"] == 5
    assert await reset(database, name=name, environment="production") == name
    assert (await counts(database))["members"] == 0


async def test_while_a_bot_acts_nothing_is_reset(database: Pool, target: ConnectTarget) -> None:
    await seed(database, guilds=1, members=5)
    lease = Lease(target, "the bot")
    await lease.wait()
    try:
        name = await database.fetchval("SELECT current_database()")
        with pytest.raises(GuildbookError, match="the bot acts on this database"):
            await reset(database, name=name, environment="development")
        assert (await counts(database))["members"] == 5
    finally:
        await lease.release(5)
    await reset(database, name=None, environment="development")


async def test_during_a_reset_no_bot_can_begin_to_act(
    database: Pool, target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(target, "the bot")
    taken: list[bool] = []

    async def downgrade(where: Pool, revision: str) -> None:
        waiting = asyncio.create_task(lease.wait())
        taken.append(bool((await asyncio.wait({waiting}, timeout=1.5))[0]))
        waiting.cancel()
        await asyncio.wait({waiting})
        raise MigrationError("broken off")

    monkeypatch.setattr(migrations, "downgrade", downgrade)
    with pytest.raises(MigrationError):
        await reset(database, name=None, environment="development")
    assert taken == [False]
    async with asyncio.timeout(5):  # given back
        await lease.wait()
    await lease.release(5)


async def test_an_empty_database_can_be_reset(empty_target: ConnectTarget) -> None:
    database = Pool(empty_target)
    await database.connect()
    try:
        await reset(database, name=None, environment="development")
        assert not any((await counts(database)).values())
    finally:
        await database.close()


async def test_every_table_is_described(database: Pool) -> None:
    found = {(table["schema"], table["name"]): table for table in await describe(database)}
    for table in Base.metadata.tables.values():
        described = found[table.schema or "public", table.name]
        assert {column["name"] for column in described["columns"]} == set(table.columns.keys())
        assert any(key.startswith("PRIMARY KEY") for key in described["keys"].values())
        assert described["comment"]
    assert found["public", "role_membership"]["kind"] == "view"
    assert not any(name.startswith("changes_") for _, name in found)
    json.dumps(list(found.values()))


async def test_one_table_is_described_with_all_that_it_has(database: Pool) -> None:
    await seed(database, guilds=1, members=FOREIGN)
    (members,) = await describe(database, "members")
    columns = {column["name"]: column for column in members["columns"]}
    assert columns["roles"] == {
        "name": "roles", "type": "bigint[]", "nullable": False, "default": "'{}'::bigint[]", "generated": False,
        "comment": None,
    }  # fmt: skip
    assert members["keys"]["pk_members"] == "PRIMARY KEY (guild_id, user_id)"
    assert {index["name"] for index in members["indexes"]} == {"pk_members", "ix_members_user_id", "ix_members_roles"}
    assert members["estimated_rows"] == FOREIGN
    assert members["bytes"] > sum(index["bytes"] for index in members["indexes"]) > 0
    (changes,) = await describe(database, "public.changes")
    assert (changes["kind"], changes["partitions"]) == ("partitioned table", 1)
    (users,) = await describe(database, "users")
    assert next(column for column in users["columns"] if column["name"] == "created_at")["generated"]


async def test_comments_of_the_database_win_over_those_of_the_models(database: Pool) -> None:
    await database.execute("COMMENT ON TABLE members IS 'who is where'; COMMENT ON COLUMN members.nick IS 'a name'")
    (members,) = await describe(database, "members")
    assert members["comment"] == "who is where"
    assert [column["comment"] for column in members["columns"] if column["comment"]] == ["a name"]
    assert "a name" in describing.plain([members])
    assert "a name" in rendered([members])


async def test_a_table_that_is_not_there_is_named_with_what_is_near(database: Pool) -> None:
    with pytest.raises(GuildbookError, match=r"membres: no such table .*; there is members"):
        await describe(database, "membres")


async def test_a_name_that_is_no_name_is_no_accident(database: Pool) -> None:
    with pytest.raises(GuildbookError):
        await describe(database, "members; DROP TABLE members")


async def test_tables_can_be_read_by_people(database: Pool) -> None:
    tables = await describe(database)
    for text in (describing.plain(tables), rendered(tables)):
        for expected in ("guilds (table, rows not counted yet, ", "ops.leases", "role_membership (view)", "bigint[]"):
            assert expected in text
    assert "  key    pk_members: PRIMARY KEY (guild_id, user_id)" in describing.plain(tables)


def rendered(tables: list[describing.Table]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(describing.pretty(tables))
    return str(console.file.getvalue())  # type: ignore[attr-defined]

"""Seeding and resetting a development database."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bot.running import run_cli
from tests.mirror.tables import GUILD, entry_of, write
from utils.database import ConnectTarget, Pool
from utils.exceptions import BackupError, GuildbookError, MigrationError
from utils.operations import migrations
from utils.operations.development import seed as development
from utils.operations.development.seed import Reset, reset, seed
from utils.service.lease import Lease


async def counts(database: Pool) -> dict[str, int]:
    tables = ("guilds", "users", "members", "roles", "channels", "threads", "member_stats")
    return {table: await database.fetchval(f"SELECT count(*) FROM {table}") for table in tables}  # noqa: S608


async def user_rows(database: Pool) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await database.fetch("SELECT id, username, avatar FROM users ORDER BY id")]


async def test_seeded_rows_are_consistent(database: Pool) -> None:
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


async def test_same_seed_gives_the_same_users(database: Pool) -> None:
    await seed(database, guilds=1, members=20, seed=4)
    first = await user_rows(database)
    await reset(database, name=None, environment="development", backup=None)
    await seed(database, guilds=1, members=20, seed=4)
    assert await user_rows(database) == first


async def test_adds_to_existing_guilds_only_with_more(database: Pool) -> None:
    await write(database, entry_of("guilds", (GUILD,), 1, name="a real one"))
    with pytest.raises(GuildbookError, match=r"already contains 1 guild:.*--more"):
        await seed(database)
    await seed(database, guilds=1, members=5, more=True)
    await seed(database, guilds=2, members=5, more=True)
    assert (await counts(database))["guilds"] == 4
    assert await database.fetchval("SELECT name FROM guilds WHERE id = $1", GUILD) == "a real one"


@pytest.mark.parametrize(("guilds", "members"), [(0, 5), (1, 0)])
async def test_rejects_zero_guilds_or_members(database: Pool, guilds: int, members: int) -> None:
    with pytest.raises(GuildbookError, match="must be at least 1"):
        await seed(database, guilds=guilds, members=members)


async def test_failed_seed_writes_nothing(database: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = development._Generator.guild
    calls = 0

    def fail_on_second_call(self: Any, size: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of names")
        return generate(self, size)

    monkeypatch.setattr(development._Generator, "guild", fail_on_second_call)
    with pytest.raises(RuntimeError):
        await seed(database, guilds=2, members=5)
    assert not any((await counts(database)).values())


async def test_reset_recreates_all_tables(database: Pool) -> None:
    await seed(database, guilds=1, members=5)
    done = await reset(database, name=None, environment="development", backup=None)
    assert done.database == await database.fetchval("SELECT current_database()")
    assert not any((await counts(database)).values())
    assert await migrations.pending(database) == []
    assert await database.fetchval("SELECT count(*) FROM ops.leases") == 0


async def test_reset_requires_database_name_in_production(database: Pool) -> None:
    name = await database.fetchval("SELECT current_database()")
    await seed(database, guilds=1, members=5)
    for given, environment in ((None, "production"), ("guildbook", "production"), ("guildbook", "development")):
        with pytest.raises(GuildbookError, match=name):
            await reset(database, name=given, environment=environment, backup=None)
    assert (await counts(database))["members"] == 5
    assert await reset(database, name=name, environment="production", backup=None) == Reset(name, None)
    assert (await counts(database))["members"] == 0


async def test_reset_is_refused_while_a_bot_is_running(database: Pool, target: ConnectTarget) -> None:
    await seed(database, guilds=1, members=5)
    lease = Lease(target, "the bot")
    await lease.wait()
    try:
        name = await database.fetchval("SELECT current_database()")
        with pytest.raises(GuildbookError, match="the bot acts on this database"):
            await reset(database, name=name, environment="development", backup=None)
        assert (await counts(database))["members"] == 5
    finally:
        await lease.release(5)
    await reset(database, name=None, environment="development", backup=None)


async def test_no_bot_can_take_the_lease_during_a_reset(
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
        await reset(database, name=None, environment="development", backup=None)
    assert taken == [False]
    async with asyncio.timeout(5):  # the lease was released
        await lease.wait()
    await lease.release(5)


async def test_reset_of_an_empty_database(empty_target: ConnectTarget) -> None:
    database = Pool(empty_target)
    await database.connect()
    try:
        await reset(database, name=None, environment="development", backup=None)
        assert not any((await counts(database)).values())
    finally:
        await database.close()


async def test_reset_makes_a_backup_unless_there_is_nothing_to_lose(database: Pool) -> None:
    made: list[str] = []

    async def backup() -> str:
        assert (await counts(database))["guilds"] > 0 or await database.fetchval("SELECT count(*) FROM documents")
        made.append("20260102T030405Z-abcdef")
        return made[-1]

    async def reset_with_backup() -> Reset:
        return await reset(database, name=None, environment="development", backup=backup)

    assert (await reset_with_backup()).backup is None  # empty
    await seed(database, guilds=1, members=5)
    assert (await reset_with_backup()).backup is None  # seeded
    assert made == []
    for statement in (
        "INSERT INTO guilds (id, name) VALUES (41771983423143937, 'a real one')",
        "INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '1')",
        "INSERT INTO member_stats (guild_id, user_id) VALUES (41771983423143937, 1)",
    ):
        await seed(database, guilds=1, members=5)
        await database.execute(statement)
        done = await reset_with_backup()
        assert (done.backup, "; backup made before: 2026" in done.line) == (made[-1], True)
        assert not any((await counts(database)).values())
    assert len(made) == 3


async def test_reset_is_refused_if_the_backup_fails(database: Pool) -> None:
    await write(database, entry_of("guilds", (GUILD,), 1, name="a real one"))

    async def backup() -> str:
        raise BackupError("no space left")

    with pytest.raises(BackupError, match=r"no space left. Nothing was changed: .* --no-backup"):
        await reset(database, name=None, environment="development", backup=backup)
    assert (await counts(database))["guilds"] == 1


@pytest.mark.slow
@pytest.mark.direct("pg_dump needs a direct connection")
async def test_the_command_backs_up_before_a_reset(tmp_path: Path, database: Pool, database_url: str) -> None:
    await write(database, entry_of("guilds", (GUILD,), 1, name="a real one"))
    values = {"DATABASE_URL": database_url, "ENVIRONMENT": "development", "DATA_DIR": "data"}
    code, output = await run_cli(tmp_path, "db", "reset", "--json", **values)
    made = json.loads(output)["backup"]
    assert (code, await database.fetchval("SELECT count(*) FROM guilds")) == (0, 0)
    (file,) = (tmp_path / "data" / "backups").glob("*Z-??????.json")
    manifest = json.loads(file.read_text())
    assert (manifest["id"], manifest["reason"]) == (made, "before reset")
    assert (await run_cli(tmp_path, "backup", "restore", made, "--yes", **values))[0] == 0
    assert await database.fetchval("SELECT name FROM guilds") == "a real one"
    code, output = await run_cli(tmp_path, "db", "reset", "--no-backup", "--json", **values)
    assert (code, json.loads(output)["backup"]) == (0, None)

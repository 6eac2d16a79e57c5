"""The database is dropped and recreated under a running bot: it is held if a backup of it is known, or begins anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulator import Simulator, World
from tests.bot.held import BARE, Held
from tests.bot.running import BotProcess, mirror_differences, wait_until_mirrored
from tests.conftest import IS_EXHAUSTIVE, sampled
from tests.mirror.restoring import Droppable
from tests.waiting import until
from utils.database import Pool
from utils.exceptions import DatabaseError

pytestmark = pytest.mark.slow


@pytest.fixture
def world() -> World:
    """Two small guilds."""
    world = World(seed=11)
    world.add_guild(members=60, name="Large")
    world.add_guild(members=40, name="Small")
    return world


def send_messages(simulator: Simulator, guild_id: int, count: int) -> tuple[int, int]:
    """Send messages as a member of a guild; return the member and the number that was sent."""
    world = simulator.world
    guild = world.guild(guild_id)
    channel = next(c.id for c in guild.channels.values() if c.type == 0 and not c.hidden)
    author = next(id for id in guild.members if id != world.bot.id and not world.user(id).bot)
    for number in range(count):
        world.message(guild_id, channel, author, f"number {number}")
    return author, count


async def counted(pool: Pool, user_id: int) -> int:
    """Return how many messages of a user are counted."""
    query = "SELECT coalesce(sum(message_count), 0) FROM member_stats WHERE user_id = $1"
    return int(await pool.fetchval(query, user_id))


async def test_without_a_known_backup_it_begins_anew_without_a_restart(
    tmp_path: Path, simulator: Simulator, dropped: Droppable, small: int
) -> None:
    held = Held(tmp_path, simulator, dropped, SPOOL="always")
    async with held.bot as bot:
        await bot.wait_until_ready()
        await dropped.recreate(template=BARE)
        author, sent = send_messages(simulator, small, 5)
        await bot.wait_for_output("beginning anew")
        await bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)

        async def are_counted() -> bool:
            return await counted(held.pool, author) == sent

        await until(are_counted)
        assert bot.process.returncode is None
        await held.stop()
    assert "Traceback" not in bot.output


@pytest.mark.parametrize("way", sampled(["restore", "begin anew"], ["restore"]))
async def test_with_a_known_backup_it_is_held_until_an_operator_decides(
    tmp_path: Path, simulator: Simulator, dropped: Droppable, small: int, way: str
) -> None:
    world = simulator.world
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        author, before = send_messages(simulator, small, 3)

        async def are_counted() -> bool:
            return await counted(held.pool, author) == before

        await until(are_counted)
        backup = await held.back_up()
        await dropped.recreate(template=BARE)
        await until(held.is_held)
        status, body = await held.readiness()
        assert (status, body["ok"], body["database"]) == (503, False, False)
        assert body["held"]["reason"] == "the database is empty: it has no tables yet"
        assert body["held"]["backup"] == backup.id
        for command in (f"backup restore {backup.id}", "db begin-anew"):
            assert f"python bot.py {command}" in body["held"]["todo"]
        assert (await bot.get("/healthz"))[0] == 200
        await until(lambda: any("db begin-anew" in message["content"] for message in simulator.channels.sent.values()))
        joined = world.join(small)
        send_messages(simulator, small, 4)
        assert await held.pool.fetchval("SELECT to_regclass('guilds') IS NULL"), "nothing is written to it"
        spool = tmp_path / "data" / "spool"
        await until(lambda: any(path.stat().st_size for path in spool.rglob("*") if path.name != "lock"))
        if way == "restore":
            code, output = await held.cli("backup", "restore", backup.id, "--yes")
        else:
            code, output = await held.cli("db", "begin-anew")
        assert code == 0, output
        await bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)

        async def are_all_counted() -> bool:
            return await counted(held.pool, author) == (before if way == "restore" else 0) + 4

        await until(are_all_counted)
        kinds = await held.pool.fetch("SELECT kind FROM member_events WHERE user_id = $1", joined)
        assert [row["kind"] for row in kinds] == ["join"]
        actions = await held.pool.fetch("SELECT command FROM ops.admin_actions")
        expected = {"backup restore"} if way == "restore" else {"begin anew", "db begin-anew"}
        assert expected <= {row["command"] for row in actions}
        assert await mirror_differences(held.pool, simulator) == []
        await held.stop()
    assert "Traceback" not in bot.output
    assert bot.output.count("nothing is written to it") <= 2
    assert [line for line in bot.output.splitlines() if "run the migrations" in line] == [], (
        "in a hold, that is refused"
    )


@pytest.mark.parametrize("way", sampled(["restore", "begin-anew"], ["begin-anew"]))
async def test_slash_commands_end_the_hold(tmp_path: Path, simulator: Simulator, dropped: Droppable, way: str) -> None:
    world = simulator.world
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        backup = await held.back_up()
        await dropped.recreate(template=BARE)
        await until(held.is_held)
        group = "backup" if way == "restore" else None
        result = await simulator.run_command("db", user_id=world.operator_id, subcommand=way, subcommand_group=group)
        label = "Restore" if way == "restore" else "Begin anew"
        await result.wait_done(30, until=lambda seen: bool(seen.buttons))
        await simulator.press(result, result.buttons[label], user_id=world.operator_id)
        await bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)
        text = f"Backup {backup.id}" if way == "restore" else "The database begins anew"
        await result.wait_done(30, until=lambda seen: text in (seen.final_content or ""))
        row = await held.pool.fetchrow("SELECT user_id, result FROM ops.admin_actions WHERE command LIKE 'db %'")
        assert row is not None
        assert row["user_id"] == world.operator_id
        assert text in row["result"]
        await held.stop()


async def test_a_backup_of_something_else_holds_nothing(
    tmp_path: Path, simulator: Simulator, dropped: Droppable
) -> None:
    others: list[dict[str, Any]] = [
        {"application_id": 42},
        {"host": "elsewhere:5432"},
        {"database": "another"},
        {"application_id": None, "host": None},
    ]
    if not IS_EXHAUSTIVE:
        others = others[:2]  # tests/operations/backup/catalog/test_identity.py compares each part
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        manifest = await held.back_up()
        file = held.catalog.local.path / f"{manifest.id}.json"
        for number, changed in enumerate(others, 1):
            file.write_bytes(replace(manifest, **changed).serialize())
            await dropped.recreate(template=BARE)
            await bot.wait_for_output("beginning anew", times=number)
            await bot.wait_until_ready()
            await wait_until_mirrored(held.pool, simulator)
        await held.stop()


@pytest.mark.parametrize("is_running", [True, False], ids=["while it runs", "at its start"])
async def test_recover_auto_restores_without_an_operator(
    tmp_path: Path, simulator: Simulator, dropped: Droppable, is_running: bool
) -> None:
    held = Held(tmp_path, simulator, dropped, RECOVER="auto")
    async with held.bot as bot:
        await bot.wait_until_ready()
        await held.pool.execute("INSERT INTO documents (guild_id, namespace, key, value) VALUES (0, 'a', 'b', '1')")
        await held.back_up()
        if is_running:
            await dropped.recreate(template=BARE)
        else:
            await held.stop()
            await dropped.recreate(template=BARE)
            held.bot = BotProcess(tmp_path, **held.settings)
            await held.bot.__aenter__()
        await held.bot.wait_for_output("RECOVER=auto: Backup")
        await until(lambda: has_document(held.pool))
        await held.bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)
        [action] = await held.pool.fetch("SELECT arguments FROM ops.admin_actions WHERE command = 'backup restore'")
        assert action["arguments"]["by"] == "RECOVER=auto"
        await held.stop()


async def has_document(pool: Pool) -> bool:
    try:
        return bool(await pool.fetchval("SELECT count(*) FROM documents"))
    except DatabaseError:
        return False


@pytest.mark.parametrize("copied", sampled([BARE, None], [BARE]), ids=["no tables", "empty tables"])
async def test_a_start_on_an_emptied_database_waits(
    tmp_path: Path, simulator: Simulator, dropped: Droppable, copied: str | None
) -> None:
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        backup = await held.back_up()
        await held.stop()
    await dropped.recreate(template=copied)
    identified = simulator.gateway.identifies
    held.bot = BotProcess(tmp_path, **held.settings)
    async with held.bot as bot:
        await until(held.is_held)
        assert (await held.readiness())[1]["held"]["backup"] == backup.id
        code, output = await held.cli("doctor")
        assert "backups: the database is empty" in output
        assert simulator.gateway.identifies == identified
        code, output = await held.cli("db", "begin-anew")
        assert code == 0, output
        await bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)
        await held.stop()
    held.bot = BotProcess(tmp_path, **held.settings)
    async with held.bot as bot:  # the decision holds
        await bot.wait_until_ready()
        await held.stop()


async def test_a_start_asks_discord_whose_the_backups_are(
    tmp_path: Path, simulator: Simulator, dropped: Droppable
) -> None:
    """Those of another application with the same address hold nothing, and nobody has to say so."""
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        manifest = await held.back_up()
        await held.stop()
    file = held.catalog.local.path / f"{manifest.id}.json"
    file.write_bytes(replace(manifest, application_id=42).serialize())
    await dropped.recreate(template=BARE)
    held.bot = BotProcess(tmp_path, **held.settings)
    async with held.bot as bot:
        await bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)
        await held.stop()
    assert "nothing is written to it" not in bot.output


async def test_truncated_tables_are_held_while_the_bot_runs(
    tmp_path: Path, simulator: Simulator, dropped: Droppable, small: int
) -> None:
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        backup = await held.back_up()
        await dropped.recreate()  # with the tables, without a row
        await until(held.is_held)
        author, sent = send_messages(simulator, small, 3)
        code, output = await held.cli("backup", "restore", backup.id, "--yes")
        assert code == 0, output
        await bot.wait_until_ready()

        async def are_counted() -> bool:
            return await counted(held.pool, author) == sent

        await until(are_counted)
        await wait_until_mirrored(held.pool, simulator)
        await held.stop()


async def test_auto_migrate_off_waits_for_an_operator(tmp_path: Path, simulator: Simulator, dropped: Droppable) -> None:
    held = Held(tmp_path, simulator, dropped, AUTO_MIGRATE="false")
    async with held.bot as bot:
        await bot.wait_until_ready()
        await dropped.recreate(template=BARE)
        await until(held.is_held)
        assert (await held.readiness())[1]["held"]["problem"] == "AUTO_MIGRATE is off"
        code, output = await held.cli("db", "begin-anew")
        assert code == 0, output
        await bot.wait_until_ready()
        await wait_until_mirrored(held.pool, simulator)
        await held.stop()


async def test_missing_lease_table_is_held_and_goes_on_when_it_is_back(
    tmp_path: Path, simulator: Simulator, dropped: Droppable
) -> None:
    held = Held(tmp_path, simulator, dropped)
    async with held.bot as bot:
        await bot.wait_until_ready()
        await held.pool.execute("ALTER TABLE ops.leases RENAME TO mislaid")
        await until(held.is_held)
        assert "ops.leases" in (await held.readiness())[1]["held"]["reason"]
        await held.pool.execute("ALTER TABLE ops.mislaid RENAME TO leases")
        await bot.wait_until_ready()
        await held.stop()


async def test_a_store_that_does_not_answer_may_have_a_backup(
    tmp_path: Path, simulator: Simulator, dropped: Droppable
) -> None:
    unreachable = {
        "BACKUP_URL": "s3://bucket/backups",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    held = Held(tmp_path, simulator, dropped, **unreachable)
    await dropped.recreate(template=BARE)
    async with held.bot as bot:
        await until(held.is_held)
        body = (await held.readiness())[1]
        assert "backups cannot be listed" in body["held"]["problem"]
        assert (await held.cli("db", "begin-anew"))[0] == 0
        await bot.wait_until_ready()
        await held.stop()


async def test_another_schema_of_the_database_begins_anew_in_its_place(
    tmp_path: Path, simulator: Simulator, dropped: Droppable
) -> None:
    await dropped.recreate(template=BARE)
    held = Held(tmp_path, simulator, dropped, DB_SCHEMA="botx")
    async with held.bot as bot:
        await bot.wait_until_ready()
        backup = await held.back_up()
        await dropped.recreate(template=BARE)
        await until(held.is_held)
        assert (await held.readiness())[1]["held"]["backup"] == backup.id
        assert (await held.cli("db", "begin-anew"))[0] == 0
        await bot.wait_until_ready()
        assert await held.pool.fetchval("SELECT count(*) FROM botx.guilds") == 2
        assert await held.pool.fetchval("SELECT to_regclass('public.guilds') IS NULL")
        await held.stop()


async def test_begin_anew_refuses_a_database_with_guilds(
    tmp_path: Path, simulator: Simulator, dropped: Droppable
) -> None:
    held = Held(tmp_path, simulator, dropped)
    await held.pool.execute("INSERT INTO guilds (id, name) VALUES (1, 'one')")
    code, output = await held.cli("db", "begin-anew")
    assert code == 1
    assert "is not empty, it has guilds in it: nothing was changed" in output

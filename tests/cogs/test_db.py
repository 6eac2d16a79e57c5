"""/db over the wire: operators can run every command, nobody else can, and dangerous ones ask first."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from discord import app_commands

from cogs.db import DatabaseCommands
from simulator import InteractionResult, Simulator
from tests.bot.running import running_bot, wait_until_mirrored
from tests.operations.backup.helpers import dropping_scratch_databases
from tests.operations.migrations.support import HEAD
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable, MigrationError
from utils.operations import migrations
from utils.operations.backup.catalog import BackupCatalog
from utils.operations.slash import REFUSAL

pytestmark = [pytest.mark.slow, pytest.mark.guilds(60)]


class Command(NamedTuple):
    """A command as it is typed, and a part of its answer."""

    path: str
    options: dict[str, Any]
    #: The button to press; None if it does not ask.
    button: str | None
    answer: str


COMMANDS = [
    Command("stats", {}, None, "tables"),
    Command("health", {}, None, "database"),
    Command("maintain", {}, "Do it", "done: "),
    Command("import", {}, None, "members.json → legacy.members: 1 entry, would be written"),
    Command("import", {"name": "members.json", "dry_run": False}, "Import", "1 entry, written"),
    Command("export", {"what": "members"}, None, "Exported 1 of documents legacy.members"),
    Command("migrate status", {}, None, "pending: none"),
    Command("migrate history", {}, None, "<t:"),
    Command("migrate preview", {"down": True}, None, "downgrade from"),
    Command("import", {"name": "members.json", "dry_run": False}, None, "Nothing to import: "),
    Command("migrate upgrade", {}, None, "the newest revision: nothing to do"),
    Command("migrate downgrade", {"revision": HEAD}, None, f"the schema is at {HEAD} already: nothing to do"),
    Command("migrate stamp", {}, None, f"{HEAD} is recorded already: nothing to do"),
    Command("backup create", {}, None, "backup 2"),
    Command("backup create", {"tables": "members, users"}, None, "some tables only"),
    Command("backup list", {}, None, "manual"),
    Command("backup verify", {}, None, "is intact"),
    Command("backup drill", {}, None, "was restored completely"),
    Command("backup prune", {}, None, "Nothing to delete"),
    Command("backup accept", {}, None, "Nothing to accept"),
    Command("backup restore", {}, "Restore", "is live in database"),
    Command("backup restore", {"tables": "documents, member_stats"}, "Restore", "in 2 of "),
    Command("backup restore", {"guild": "5"}, "Restore", "1 document of guild 5"),
    Command("backup restore", {"whole_database": True}, "Restore", "kept as"),
]
PATHS = {command.path for command in COMMANDS} | {"begin-anew", "backup push"}


@pytest.fixture
async def bot(
    tmp_path: Path, database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Guildbook]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "import").mkdir(parents=True)
    entry = {"join_date": "2024-01-01T00:00:00+00:00", "statistics": {"message_count": 3}}
    (tmp_path / "data" / "import" / "members.json").write_text(json.dumps({"5_7": entry}))
    async with (
        dropping_scratch_databases(database.target),
        running_bot(database, simulator, extensions=["cogs.db"], data_dir=tmp_path / "data") as client,
    ):
        yield client


async def run_command(
    simulator: Simulator, user_id: int, path: str, options: dict[str, Any], **where: Any
) -> InteractionResult:
    """Run a command of /db."""
    *group, name = path.split()
    return await simulator.run_command(
        "db", subcommand_group=group[0] if group else None, subcommand=name, options=options, user_id=user_id, **where
    )


async def final_answer(database: Pool, result: InteractionResult) -> str:
    """Return the final reply, once the audit log has it too."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(DatabaseUnavailable):  # while a restore swaps the database
                written = await database.fetchval("SELECT result FROM ops.admin_actions ORDER BY id DESC LIMIT 1")
                if written is not None and result.final_content == written:
                    return str(written)
            await asyncio.sleep(0.02)


async def test_operators_can_run_every_command(bot: Guildbook, database: Pool, simulator: Simulator) -> None:
    operator = simulator.world.operator_id
    await wait_until_mirrored(database, simulator)
    for command in COMMANDS:
        result = await run_command(simulator, operator, command.path, command.options)
        assert (await result.wait_done(until=lambda seen: seen.type is not None)).ephemeral
        if command.button is not None:
            await result.wait_done(60, until=lambda seen: bool(seen.buttons) or "Failed" in (seen.final_content or ""))
            assert command.button in result.buttons, result.final_content
            await simulator.press(result, result.buttons[command.button], user_id=operator)
        answer = await final_answer(database, result)
        assert command.answer in answer, (command.path, answer)
        assert not answer.startswith("Failed"), (command.path, answer)
        assert not result.buttons
        if command.path == "stats":
            assert result.files["statistics.png"].startswith(b"\x89PNG")
            fields = {field["name"]: field["value"] for field in result.edits[-1].embeds[0]["fields"]}
            assert fields.keys() >= {"Pool", "Growth", "Last syncs"}
            names = [guild.name for guild in simulator.world.guilds.values()]
            assert any(name in fields["Last syncs"] for name in names), "guilds have names, and no ids"
            assert re.search(r"<t:\d+:R>", fields["Last syncs"]), "times are the reader's"
        if command.path == "migrate preview":
            assert [name for name in result.files if name.endswith(".sql")]
    rows = await database.fetch("SELECT user_id, command FROM ops.admin_actions ORDER BY id")
    assert [tuple(row) for row in rows] == [(operator, f"db {command.path}") for command in COMMANDS]
    assert await database.fetchval("SELECT message_count FROM member_stats WHERE user_id = 7") == 3
    data = bot.settings.data_dir
    assert json.loads((data / "export" / "members.json").read_text()) == json.loads(
        (data / "import" / "members.json").read_text()
    )
    await wait_until_mirrored(database, simulator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guild": "abc"}, "'abc' is not a guild id"),
        ({"guild": "5", "tables": "members"}, "either tables or the documents of a guild"),
        ({"guild": "5", "whole_database": True}, "cannot be replaced by a part"),
        ({"drop_old": True}, "leaves no old database to drop"),
    ],
)
async def test_a_restore_refuses_contradictions_before_it_asks(
    bot: Guildbook, database: Pool, simulator: Simulator, options: dict[str, Any], message: str
) -> None:
    result = await run_command(simulator, simulator.world.operator_id, "backup restore", options)
    answer = await final_answer(database, result)
    assert message in answer
    assert not result.buttons


def test_every_command_is_tried() -> None:
    found = {
        command.qualified_name.removeprefix("db ")
        for command in DatabaseCommands.db_group.walk_commands()
        if isinstance(command, app_commands.Command)
    }
    assert found == PATHS


async def test_nobody_else_can_run_any_command(
    tmp_path: Path, database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    guild = next(iter(simulator.world.guilds.values()))
    members = [
        id for id in guild.ordered_member_ids() if id not in (simulator.world.bot.id, simulator.world.operator_id)
    ]
    people = {guild.owner_id, *members[:2]} - {simulator.world.operator_id}
    monkeypatch.chdir(tmp_path)
    async with running_bot(database, simulator, extensions=["cogs.db"], data_dir=tmp_path, admin_guild_id=guild.id):
        before = await database.fetchval("SELECT count(*) FROM ops.admin_actions")
        refused = 0
        for person in people:
            for path in sorted(PATHS):
                needed = {"migrate downgrade": {"revision": "0001"}, "export": {"what": "members"}}.get(path, {})
                result = await run_command(simulator, person, path, needed, guild_id=guild.id)
                await result.wait_done(30)
                assert (result.final_content, result.ephemeral, result.buttons) == (REFUSAL, True, {})
                refused += 1
        rows = await database.fetch("SELECT DISTINCT result FROM ops.admin_actions")
        assert [row["result"] for row in rows] == ["refused: not an operator"]
        assert before < await database.fetchval("SELECT count(*) FROM ops.admin_actions") <= min(refused, 10) + before
        assert not (tmp_path / "backups").exists()


@pytest.mark.parametrize("in_guild", [True, False])
async def test_registers_commands_only_where_operators_are(
    database: Pool, simulator: Simulator, tmp_path: Path, in_guild: bool
) -> None:
    guild_id = next(iter(simulator.world.guilds))
    where: dict[str, Any] = {"admin_guild_id": guild_id} if in_guild else {}
    async with running_bot(database, simulator, extensions=["cogs.db"], data_dir=tmp_path, **where):
        everywhere, here = simulator.interactions.commands(), simulator.interactions.commands(guild_id)
        assert [command["name"] for command in (here if in_guild else everywhere)] == ["db"]
        assert not (everywhere if in_guild else here)
        if in_guild:
            with pytest.raises(LookupError):
                await run_command(simulator, simulator.world.operator_id, "stats", {})
        else:  # in direct messages with the bot only
            assert everywhere[0]["contexts"] == [1]
            with pytest.raises(LookupError):
                await run_command(simulator, simulator.world.operator_id, "stats", {}, guild_id=guild_id)


async def test_downgrade_backs_up_and_shuts_the_bot_down(bot: Guildbook, database: Pool, simulator: Simulator) -> None:
    operator = simulator.world.operator_id
    result = await run_command(simulator, operator, "migrate downgrade", {"revision": "0002"})
    await result.wait_done(until=lambda seen: bool(seen.buttons))
    assert "Then this bot shuts down" in (result.final_content or "")
    await simulator.press(result, result.buttons["Downgrade"], user_id=operator)
    answer = await final_answer(database, result)
    assert "reverted: " in answer
    assert "before downgrade" in "".join(entry.line for entry in await BackupCatalog(bot.settings).entries())
    await until(bot.is_closed)
    assert isinstance(bot.shutdown_error, MigrationError)
    assert await database.fetchval("SELECT version_num FROM guildbook_version") == "0002"


async def test_downgrade_to_where_it_is_does_not_stop_the_bot(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    result = await run_command(simulator, simulator.world.operator_id, "migrate downgrade", {"revision": HEAD})
    assert await final_answer(database, result) == f"the schema is at {HEAD} already: nothing to do"
    assert not result.buttons
    assert bot.shutdown_error is None
    assert await BackupCatalog(bot.settings).entries() == []
    result = await run_command(simulator, simulator.world.operator_id, "migrate status", {})
    assert "pending: none" in await final_answer(database, result)


async def test_begin_anew_does_not_ask_about_a_database_that_is_not_empty(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    await wait_until_mirrored(database, simulator)
    result = await run_command(simulator, simulator.world.operator_id, "begin-anew", {})
    assert "the database is not empty, it has guilds in it: nothing was changed" in await final_answer(database, result)
    assert all("Begin anew?" not in edit.content for edit in result.edits)


async def test_upgrade_and_stamp_say_what_they_would_do_and_ask(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    operator = simulator.world.operator_id
    await migrations.pause_auto_migrate(database, HEAD)
    await database.execute("DELETE FROM guildbook_version")
    result = await run_command(simulator, operator, "migrate stamp", {"revision": "0001"})
    assert "the schema is not what revision 0001 makes" in await final_answer(database, result)
    result = await run_command(simulator, operator, "migrate stamp", {})
    await result.wait_done(60, until=lambda seen: bool(seen.buttons))
    assert f"the schema is what revision {HEAD} makes" in (result.final_content or "")
    await simulator.press(result, result.buttons["Stamp"], user_id=operator)
    assert f"is recorded as {HEAD}" in await final_answer(database, result)
    result = await run_command(simulator, operator, "migrate upgrade", {})
    await result.wait_done(60, until=lambda seen: bool(seen.buttons))
    assert "AUTO_MIGRATE is resumed, which is paused: " in (result.final_content or "")
    await simulator.press(result, result.buttons["Cancel"], user_id=operator)
    assert await final_answer(database, result) == "Cancelled: nothing was done."
    assert await migrations.find_pause(database) is not None


async def test_import_and_export_stay_in_their_directories(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    for name in ("../data/../../etc", "/etc/passwd", "../../x.json"):
        result = await run_command(simulator, simulator.world.operator_id, "import", {"name": name})
        assert "leads out of DATA_DIR/import" in await final_answer(database, result)
    result = await run_command(simulator, simulator.world.operator_id, "export", {"what": "../../members"})
    assert "leads out of DATA_DIR/export" in await final_answer(database, result)

"""/db over the wire: every command by an operator, by nobody else, and what is dangerous only after a button."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from simulator import InteractionResult, Limits, Simulator, World
from tests.bot.running import running_bot, wait_until_mirrored
from tests.operations.backup.restoring import cleaned
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.exceptions import DatabaseUnavailable, MigrationError
from utils.operations import slash
from utils.operations.backup.service import BackupService
from utils.operations.slash import REFUSAL


class Given(NamedTuple):
    """A command as it is typed, and what its last word begins with or holds."""

    path: str
    options: dict[str, Any]
    #: The button to be pressed; None: it asks nothing.
    button: str | None
    answer: str


COMMANDS = [
    Given("stats", {}, None, "tables"),
    Given("health", {}, None, "database"),
    Given("maintain", {}, "Do it", "done: "),
    Given("import", {}, None, "members.json → legacy.members: 1 entries, would be written"),
    Given("import", {"name": "members.json", "dry_run": False}, "Import", "1 entries, written"),
    Given("export", {"what": "members"}, None, "Exported 1 of documents legacy.members"),
    Given("migrate status", {}, None, "pending: none"),
    Given("migrate history", {}, None, "0001"),
    Given("migrate preview", {"down": True}, None, "downgrade from"),
    Given("migrate upgrade", {}, "Upgrade", "the schema is up to date"),
    Given("migrate stamp", {}, "Stamp", "is recorded as"),
    Given("backup create", {}, None, "backup 2"),
    Given("backup create", {"tables": "members, users"}, None, "some tables only"),
    Given("backup list", {}, None, "manual"),
    Given("backup verify", {}, None, "is whole"),
    Given("backup drill", {}, None, "came back whole"),
    Given("backup prune", {}, "Delete", "0 of 2 backups deleted"),
    Given("backup restore", {}, "Restore", "is the live database"),
]
PATHS = {given.path for given in COMMANDS} | {"migrate downgrade"}


@pytest.fixture
def world() -> World:
    world = World(seed=5)
    world.add_guild(members=60, name="Small")
    return world


@pytest.fixture
async def simulator(world: World) -> AsyncIterator[Simulator]:
    async with Simulator(world, limits=Limits.none()) as running_simulator:
        yield running_simulator


@pytest.fixture
async def bot(
    tmp_path: Path, database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Guildbook]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slash, "EDIT_SECONDS", 0.05)
    (tmp_path / "data" / "import").mkdir(parents=True)
    entry = {"join_date": "2024-01-01T00:00:00+00:00", "statistics": {"message_count": 3}}
    (tmp_path / "data" / "import" / "members.json").write_text(json.dumps({"5_7": entry}))
    async with (
        cleaned(database.target),
        running_bot(database, simulator, extensions=["cogs.db"], data_dir=tmp_path / "data") as client,
    ):
        yield client


async def type_in(
    simulator: Simulator, user_id: int, path: str, options: dict[str, Any], **where: Any
) -> InteractionResult:
    """Give a command of /db."""
    *group, name = path.split()
    return await simulator.run_command(
        "db", subcommand_group=group[0] if group else None, subcommand=name, options=options, user_id=user_id, **where
    )


async def last_word(database: Pool, result: InteractionResult) -> str:
    """Return the reply once it stands in the books."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(DatabaseUnavailable):  # while a restore takes its place
                written = await database.fetchval("SELECT result FROM ops.admin_actions ORDER BY id DESC LIMIT 1")
                if written is not None and result.final_content == written:
                    return str(written)
            await asyncio.sleep(0.02)


async def test_an_operator_can_do_everything_and_it_is_written_down(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    operator = simulator.world.operator_id
    await wait_until_mirrored(database, simulator)
    for given in COMMANDS:
        result = await type_in(simulator, operator, given.path, given.options)
        assert (await result.wait_done(until=lambda seen: seen.type is not None)).ephemeral
        if given.button is not None:
            await result.wait_done(60, until=lambda seen: bool(seen.buttons) or "Failed" in (seen.final_content or ""))
            assert given.button in result.buttons, result.final_content
            await simulator.press(result, result.buttons[given.button], user_id=operator)
        told = await last_word(database, result)
        assert given.answer in told, (given.path, told)
        assert not told.startswith("Failed"), (given.path, told)
        assert not result.buttons
        if given.path == "stats":
            assert result.files["statistics.png"].startswith(b"\x89PNG")
            assert {field["name"] for field in result.edits[-1].embeds[0]["fields"]} >= {"Pool", "Growth", "Last syncs"}
        if given.path == "migrate preview":
            assert [name for name in result.files if name.endswith(".sql")]
    rows = await database.fetch("SELECT user_id, command FROM ops.admin_actions ORDER BY id")
    assert [tuple(row) for row in rows] == [(operator, f"db {given.path}") for given in COMMANDS]
    assert await database.fetchval("SELECT message_count FROM member_stats WHERE user_id = 7") == 3
    data = bot.settings.data_dir
    assert json.loads((data / "export" / "members.json").read_text()) == json.loads(
        (data / "import" / "members.json").read_text()
    )
    await wait_until_mirrored(database, simulator)


async def test_nobody_else_can_do_anything_not_the_guilds_owner_nor_its_administrators(
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
        asked = 0
        for person in people:
            for path in sorted(PATHS):
                needed = {"migrate downgrade": {"revision": "0001"}, "export": {"what": "members"}}.get(path, {})
                result = await type_in(simulator, person, path, needed, guild_id=guild.id)
                await result.wait_done(30)
                assert (result.final_content, result.ephemeral, result.buttons) == (REFUSAL, True, {})
                asked += 1
        rows = await database.fetch("SELECT DISTINCT result FROM ops.admin_actions")
        assert [row["result"] for row in rows] == ["refused: not an operator"]
        assert await database.fetchval("SELECT count(*) FROM ops.admin_actions") == before + asked
        assert not (tmp_path / "backups").exists()


@pytest.mark.parametrize("in_guild", [True, False])
async def test_the_commands_are_registered_where_operators_are_and_nowhere_else(
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
                await type_in(simulator, simulator.world.operator_id, "stats", {})
        else:  # in direct messages with the bot only
            assert everywhere[0]["contexts"] == [1]
            with pytest.raises(LookupError):
                await type_in(simulator, simulator.world.operator_id, "stats", {}, guild_id=guild_id)


async def test_a_downgrade_backs_up_ends_the_bot_and_stays_down(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    operator = simulator.world.operator_id
    result = await type_in(simulator, operator, "migrate downgrade", {"revision": "0002"})
    await result.wait_done(until=lambda seen: bool(seen.buttons))
    assert "Then this bot ends" in (result.final_content or "")
    await simulator.press(result, result.buttons["Downgrade"], user_id=operator)
    told = await last_word(database, result)
    assert "reverted: " in told
    assert "before downgrade" in "".join(entry.line for entry in await BackupService(bot.settings).known())
    await until(bot.is_closed)
    assert isinstance(bot.shutdown_error, MigrationError)
    assert await database.fetchval("SELECT version_num FROM alembic_version") == "0002"


async def test_an_import_leads_nowhere_but_into_its_directory(
    bot: Guildbook, database: Pool, simulator: Simulator
) -> None:
    for name in ("../data/../../etc", "/etc/passwd", "../../x.json"):
        result = await type_in(simulator, simulator.world.operator_id, "import", {"name": name})
        assert "leads out of DATA_DIR/import" in await last_word(database, result)
    result = await type_in(simulator, simulator.world.operator_id, "export", {"what": "../../members"})
    assert "leads out of DATA_DIR/export" in await last_word(database, result)

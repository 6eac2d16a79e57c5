"""What operators and the bot do with a database, each as one function that raises what is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simulator import Limits, Simulator
from simulator import World as DiscordWorld
from tests.mirror.harness import differences, mirrored
from tests.operations.migrations.support import KNOWN
from tests.worlds.worlds import World
from utils.exceptions import BackupError
from utils.operations import migrations
from utils.operations.backup.service import BackupService
from utils.operations.doctor import CHECKS, DoctorContext, run_checks
from utils.operations.importing.importer import import_files
from utils.operations.migrations import admin
from utils.settings import Settings, variables

#: What an operation may use beside its world.
Use = tuple[pytest.MonkeyPatch, Path]
Operation = Callable[[World, pytest.MonkeyPatch, Path], Awaitable[None]]
GUILD = 41771983423143937
USER = 80351110224678912
#: The checks of `doctor` that a database has a part in.
ABOUT_THE_DATABASE = frozenset({"settings", "variables", "database", "address", "rights", "schema"})
ABOUT_THE_DATABASE |= {"connections", "clock", "tools"}
#: Names as people have them: outside of every encoding but UTF8's, and with what SQL and COPY quote.
NAME = "Дим\u0301а 🦄 \\N 'x' \"y\" %s $1"


async def migrate(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Upgrade the database, take a revision back, and upgrade again; the status is good then."""
    async with world.connected() as pool:
        await migrations.prepare_schema(pool, auto_migrate=True)
        await admin.downgrade(pool, KNOWN[-2], backup=None)
        await admin.upgrade(pool)
        status = await admin.status(pool)
        assert status.ok, status.text


async def mirror(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Mirror a small guild, and what happens in it."""
    discord = DiscordWorld(seed=5)
    guild = discord.add_guild(members=25, name=NAME)
    async with world.connected() as pool:
        await migrations.prepare_schema(pool, auto_migrate=True)  # as at each start
    async with (
        world.connected() as pool,
        Simulator(discord, limits=Limits.none()) as simulator,
        mirrored(pool, simulator, monkeypatch, spool=directory / "spool") as bot,
    ):
        await bot.settled()
        assert await differences(pool, simulator) == []
        rng = random.Random(7)
        for _ in range(30):
            discord.random_event(rng)
        discord.rename_user(max(discord.guild(guild).members), global_name=NAME)
        await bot.settled()
        assert await differences(pool, simulator) == []


async def back_up(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Back up, change rows, drill and restore; through a pooler, all of this is refused with one line."""
    service = BackupService(Settings(_env_file=None, data_dir=directory / "data"))  # type: ignore[call-arg]
    async with world.connected() as pool:
        await migrations.prepare_schema(pool, auto_migrate=True)
        if pool.direct.pooled:
            with pytest.raises(BackupError, match=r"is a pooler, .*set DATABASE_UNPOOLED_URL\Z"):
                await service.create(pool)
            return
        await pool.execute("INSERT INTO guilds (id, name) VALUES ($1, $2)", GUILD, NAME)
        created = await service.create(pool)
        await pool.execute("UPDATE guilds SET name = 'since', stamp = stamp + 1 WHERE id = $1", GUILD)
        await pool.execute("INSERT INTO guilds (id, name) VALUES ($1, 'new')", GUILD + 1)
        drilled = await service.drill(pool)
        assert drilled.ok, drilled.text
        restored = await service.restore(pool, created.data["id"])
        assert restored.ok, restored.text
        rows = await pool.fetch("SELECT name FROM guilds WHERE id IN ($1, $2)", GUILD, GUILD + 1)
        assert [row["name"] for row in rows] == [NAME]
        await pool.execute("DELETE FROM guilds WHERE id = $1", GUILD)


async def import_files_of_another_bot(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Import members and settings."""
    members = {f"{GUILD}_{USER + n}": {"statistics": {"message_count": n}, "preferences": {}} for n in range(20)}
    (directory / "members.json").write_text(json.dumps(members))
    (directory / "shop.json").write_text(json.dumps({"a": {"n": NAME}, "b": {"n": 2.5e300}}))
    settings = Settings(_env_file=None, data_dir=directory / "data")  # type: ignore[call-arg]
    async with world.connected() as pool:
        await migrations.prepare_schema(pool, auto_migrate=True)
        files = [directory / "members.json", directory / "shop.json"]
        outcome = await import_files(pool, settings, files)
        assert outcome.ok, outcome.text
        value = await pool.fetchval("SELECT value FROM documents WHERE key = 'a'")
        assert value == {"n": NAME}
        assert (await import_files(pool, settings, files)).text.count("nothing to change") == len(files)


async def examine(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[Any]:
    """Return what `doctor` finds."""
    for name in variables():
        monkeypatch.delenv(name, raising=False)
    # A schema in the address would be a start-up option, which a pooler refuses.
    settings = {"DATABASE_URL": replace(world.target, schema=None).libpq_url(), "DATA_DIR": str(directory / "data")}
    if world.target.schema is not None:
        settings["DB_SCHEMA"] = world.target.schema
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    checks = [check for check in CHECKS if check.name in ABOUT_THE_DATABASE]
    return await run_checks(DoctorContext(env_file=None, environ=settings), checks)


async def doctor(world: World, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Find nothing that has to be mended."""
    findings = await examine(world, monkeypatch, directory)
    problems = [it for it in findings if it.state == "fail" or (it.state == "warn" and it.name not in world.warned_by)]
    assert not problems, problems


#: In the order in which they are done.
OPERATIONS: dict[str, Operation] = {
    "migrate": migrate,
    "mirror": mirror,
    "back up": back_up,
    "import": import_files_of_another_bot,
    "doctor": doctor,
}

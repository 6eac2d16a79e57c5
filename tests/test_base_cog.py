"""What BaseCog gives a cog: tasks that end with it, and answers to what goes wrong."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
from pathlib import Path
from typing import Any

import discord
import pytest
from discord import app_commands
from discord.ext import commands

from models import Role
from simulator import InteractionResult, Simulator, World
from tests.bot.running import running
from tests.bot.written import WrittenCogs
from tests.waiting import until
from utils import base_cog
from utils.base_cog import BaseCog
from utils.bot import command_errors
from utils.bot.command_errors import explain
from utils.database import Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable, Declined, GuildbookError

FAULTY = """
async def unable(interaction: discord.Interaction[Guildbook]) -> bool:
    raise app_commands.MissingPermissions(["manage_roles", "ban_members"])

class Odd(app_commands.Transformer):
    async def transform(self, interaction: discord.Interaction[Guildbook], value: str) -> str:
        if value == "away":
            raise DatabaseUnavailable("no route to 10.0.0.5")
        raise ValueError(value)

class Faulty(BaseCog):
    async def ready(self, interaction: discord.Interaction[Guildbook], how: str) -> None:
        if how in ("deferred", "private", "begun"):
            await interaction.response.defer(ephemeral=how == "private", thinking=True)
        if how == "begun":
            await interaction.followup.send("so far")
        if how == "answered":
            await interaction.response.send_message("so far")

    @app_commands.command()
    async def crash(self, interaction: discord.Interaction[Guildbook], how: str = "") -> None:
        await self.ready(interaction, how)
        raise KeyError("the password is hunter2")

    @app_commands.command()
    async def away(self, interaction: discord.Interaction[Guildbook], how: str = "") -> None:
        await self.ready(interaction, how)
        raise DatabaseUnavailable("no route to 10.0.0.5")

    @app_commands.command()
    async def decline(self, interaction: discord.Interaction[Guildbook]) -> None:
        raise Declined("You have no\\nquotes yet")

    @app_commands.command()
    @app_commands.check(unable)
    async def barred(self, interaction: discord.Interaction[Guildbook]) -> None: ...

    @app_commands.command()
    @app_commands.checks.cooldown(1, 60)
    async def slow(self, interaction: discord.Interaction[Guildbook]) -> None:
        await interaction.response.send_message("done")

    @app_commands.command()
    async def odd(self, interaction: discord.Interaction[Guildbook],
                  value: app_commands.Transform[str, Odd]) -> None: ...

    @app_commands.command()
    async def own(self, interaction: discord.Interaction[Guildbook]) -> None:
        raise RuntimeError

    @own.error
    async def own_error(self, interaction: discord.Interaction[Guildbook], error: Exception) -> None:
        await interaction.response.send_message("I know")

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Faulty(bot))
"""


@pytest.fixture
def world() -> World:
    """One small guild."""
    world = World(seed=11)
    world.add_guild(members=10, name="Small")
    return world


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WrittenCogs:
    """A cog whose commands fail."""
    cogs = WrittenCogs(tmp_path, monkeypatch)
    cogs.write("faulty", "from utils.exceptions import DatabaseUnavailable\n" + FAULTY)
    return cogs


async def use(
    simulator: Simulator, name: str, *, operator: bool = False, seen: int = 1, **options: Any
) -> InteractionResult:
    """Use a command and wait for so many words: an answer, an edit or a follow-up."""
    guild = next(iter(simulator.world.guilds.values()))
    user_id, guild_id = (simulator.world.operator_id, None) if operator else (guild.owner_id, guild.id)
    result = await simulator.run_command(name, user_id=user_id, guild_id=guild_id, options=options)

    def words(result: InteractionResult) -> int:
        return bool(result.content) + len(result.edits) + len(result.followups)

    return await result.wait_done(until=lambda result: words(result) >= seen)


def id_of(text: str | None) -> str:
    """Return the reference in an answer."""
    found = re.search(r"\(reference ([0-9a-f]{8})\)$", text or "")
    assert found, text
    assert "\n" not in (text or "")
    return found[1]


async def test_every_error_is_one_line_with_a_reference_that_stands_in_the_log(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    faulty: WrittenCogs,
) -> None:
    caplog.set_level(logging.INFO)
    expected = {
        "crash": command_errors.INTERNAL,
        "away": command_errors.AWAY,
        "decline": "You have no quotes yet",
        "barred": "You need the permissions Manage Roles, Ban Members for that.",
        "odd": "'7' does not fit there: expected odd.",
    }
    async with running(database, simulator, monkeypatch, extensions=faulty.extensions):
        for name, told in expected.items():
            given: dict[str, Any] = {"value": "7"} if name == "odd" else {}
            result = await use(simulator, name, **given)
            id = id_of(result.content)
            assert result.content == f"{told} (reference {id})"
            assert result.ephemeral
            (line,) = [it for it in caplog.records if getattr(it, "reference", None) == id]
            assert id in line.getMessage()
            assert line.name == faulty.module("faulty")
            assert (line.exc_info is not None) == (name in ("crash", "away")), "no traceback for what is no fault"
        assert (await use(simulator, "slow")).content == "done"
        assert re.match(r"Not so fast: try again in \d\d s\.", (await use(simulator, "slow")).content or "")
        assert (await use(simulator, "own")).content == "I know"
        away = await use(simulator, "odd", value="away")
        assert (away.content or "").startswith(command_errors.AWAY)


@pytest.mark.parametrize("how", ["deferred", "private", "begun", "answered"])
async def test_the_answer_is_private_whatever_was_said_before(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, faulty: WrittenCogs, how: str
) -> None:
    async with running(database, simulator, monkeypatch, extensions=faulty.extensions):
        result = await use(simulator, "crash", seen=1 if how in ("deferred", "private") else 2, how=how)
        if how == "private":
            assert result.ephemeral
            id_of(result.edits[-1].content)
        else:
            (message,) = result.followups
            id_of(message["content"])
            assert message["flags"] & discord.MessageFlags.ephemeral.flag
            assert (result.message is None) == (how == "deferred"), "what everybody saw stays, unless it said nothing"


async def test_only_operators_are_shown_what_lies_behind_it(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, faulty: WrittenCogs
) -> None:
    async with running(database, simulator, monkeypatch, extensions=faulty.extensions):
        assert "10.0.0.5" in ((await use(simulator, "away", operator=True)).content or "")
        crash = (await use(simulator, "crash", operator=True)).content or ""
        assert "KeyError" in crash
        assert "hunter2" not in crash


async def test_an_answer_that_cannot_be_given_is_logged(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    faulty: WrittenCogs,
) -> None:
    simulator.interactions.response_deadline = 0.0
    async with running(database, simulator, monkeypatch, extensions=faulty.extensions):
        guild = next(iter(simulator.world.guilds.values()))
        await simulator.run_command("crash", user_id=guild.owner_id, guild_id=guild.id)
        await until(lambda: "nobody could be told of it" in caplog.text)
        assert not [line for line in caplog.records if line.name.startswith("discord.app_commands")]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (app_commands.BotMissingPermissions(["ban_members"]), "I need the permission Ban Members for that"),
        (app_commands.NoPrivateMessage(), "That works in a server only."),
        (app_commands.MissingRole("chief"), "You need the role 'chief' for that."),
        (app_commands.MissingAnyRole(["chief", 5]), "You need one of these roles for that: 'chief', <@&5>."),
        (app_commands.CheckFailure("secret"), "You may not do that here."),
        (commands.NoPrivateMessage(), "That works in a server only."),
        (commands.BadArgument("'x' is no number"), "That does not fit: 'x' is no number."),
        (DatabaseError("duplicate key"), command_errors.INTERNAL),
        (GuildbookError("inner workings"), command_errors.INTERNAL),
        (Declined("Not today"), "Not today"),
        (commands.CommandInvokeError(DatabaseUnavailable("x")), command_errors.AWAY),
    ],
)
def test_plain_words_for_what_is_known(error: Exception, told: str) -> None:
    assert explain(error).text.startswith(told)


class Worker(BaseCog):
    """Has a task, and says how it ended."""

    def __init__(self, bot: Any) -> None:
        super().__init__(bot)
        self.told: list[str] = []

    async def work(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.told.append("task ended")

    async def stop(self) -> None:
        self.told.append("stop")


class Bot:
    """As much of a bot as a cog that is not added asks for."""

    db: Any = None


async def test_a_task_begins_in_an_empty_context_and_ends_with_the_cog_before_stop() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("of a transaction")
    worker = Worker(Bot())
    await worker.cog_load()

    async def look() -> str | None:
        return variable.get(None)

    assert await worker.spawn(look()) is None
    task = worker.spawn(worker.work(), "the work")
    assert task.get_name() == f"{__name__}: the work"
    await asyncio.sleep(0)
    await worker.cog_unload()
    await worker.cog_unload()
    assert task.cancelled()
    assert worker.told == ["task ended", "stop"]
    with pytest.raises(GuildbookError, match="Worker is unloaded"):
        worker.spawn(worker.work())


async def test_what_a_task_raises_is_logged_under_a_reference(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(Bot())

    async def fail() -> None:
        raise RuntimeError("out of paper")

    await asyncio.wait([worker.spawn(fail(), "printing")])
    await asyncio.sleep(0)
    (line,) = caplog.records
    assert re.search(r"printing failed \([0-9a-f]{8}\)$", line.getMessage())
    assert line.exc_info is not None
    assert "out of paper" in str(line.exc_info[1])


async def test_a_start_that_fails_or_takes_too_long_ends_what_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_cog, "LIFECYCLE_SECONDS", 0.1)

    class Unable(Worker):
        async def start(self) -> None:
            self.spawn(self.work())
            await asyncio.sleep(0)
            await self.fail()

        async def fail(self) -> None:
            raise RuntimeError

    class Slow(Unable):
        async def fail(self) -> None:
            await asyncio.Event().wait()

    for kind, error in ((Unable, RuntimeError), (Slow, GuildbookError)):
        worker = kind(Bot())
        with pytest.raises(error):
            await worker.cog_load()
        assert worker.told == ["task ended", "stop"]


async def test_a_stop_that_fails_or_hangs_and_a_task_that_does_not_end_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base_cog, "LIFECYCLE_SECONDS", 0.1)
    over = asyncio.Event()

    class Stubborn(BaseCog):
        async def work(self) -> None:
            while not over.is_set():
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    continue

        async def stop(self) -> None:
            await asyncio.Event().wait()

    stubborn = Stubborn(Bot())  # type: ignore[arg-type]
    await stubborn.cog_load()
    stubborn.spawn(stubborn.work(), "staying")
    await asyncio.sleep(0)
    await stubborn.cog_unload()
    assert "staying does not end" in caplog.text
    assert "stop() failed" in caplog.text
    over.set()


async def test_a_cog_has_its_own_log_cache_and_repositories(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cogs = WrittenCogs(tmp_path, monkeypatch)
    cogs.plain("one", "first")
    cogs.plain("two", "second")
    guild_id = next(iter(simulator.world.guilds))
    async with running(database, simulator, monkeypatch, extensions=cogs.extensions) as bot:
        one, two = (it for it in bot.cogs.values() if isinstance(it, BaseCog))
        assert (one.log.name, two.log.name) == (cogs.module("one"), cogs.module("two"))
        assert one.cache is one.cache
        assert one.cache is not two.cache
        assert one.guilds is one.guilds
        guild = await one.guilds.get(guild_id)
        assert guild.name == "Small"
        assert (await one.members.get((guild_id, simulator.world.bot.id))).guild_id == guild_id
        assert len((await one.roles.list(Role.guild_id == guild_id)).items) > 0
        async with one.session() as session:
            assert (await session.connection()) is not None

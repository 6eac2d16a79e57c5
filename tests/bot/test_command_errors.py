"""What users see and what is logged when a command fails."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import asyncpg
import discord
import pydantic
import pytest
from discord import app_commands
from discord.ext import commands
from sqlalchemy.exc import DBAPIError

from simulator import InteractionResult, Simulator
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from tests.waiting import until
from utils.bot import command_errors
from utils.bot.command_errors import explain
from utils.database import Pool
from utils.exceptions import DatabaseError, DatabaseUnavailable, Declined, GuildbookError, TransactionConflict
from utils.logs import RateLimit

pytestmark = pytest.mark.guilds(10)

FAILING_COG = """
async def missing_permissions(interaction: discord.Interaction[Guildbook]) -> bool:
    raise app_commands.MissingPermissions(["manage_roles", "ban_members"])

class Odd(app_commands.Transformer):
    async def transform(self, interaction: discord.Interaction[Guildbook], value: str) -> str:
        if value == "unavailable":
            raise DatabaseUnavailable("no route to 10.0.0.5")
        raise ValueError(value)

class Mood(Enum):
    good = 1
    bad = 2

class Plain(commands.Cog):
    @app_commands.command()
    async def plain(self, interaction: discord.Interaction[Guildbook]) -> None:
        raise KeyError("the password is hunter2")

class Failing(BaseCog):
    async def respond(self, interaction: discord.Interaction[Guildbook], how: str) -> None:
        if how in ("deferred", "deferred_privately", "followed_up"):
            await interaction.response.defer(ephemeral=how == "deferred_privately", thinking=True)
        if how == "followed_up":
            await interaction.followup.send("working")
        if how == "answered":
            await interaction.response.send_message("working")

    @app_commands.command()
    async def crash(self, interaction: discord.Interaction[Guildbook], how: str = "") -> None:
        await self.respond(interaction, how)
        raise KeyError("the password is hunter2")

    @app_commands.command()
    async def unavailable(self, interaction: discord.Interaction[Guildbook], how: str = "") -> None:
        await self.respond(interaction, how)
        raise DatabaseUnavailable("no route to 10.0.0.5")

    @app_commands.command()
    async def decline(self, interaction: discord.Interaction[Guildbook]) -> None:
        raise Declined("You have no\\nquotes yet")

    @app_commands.command()
    @app_commands.check(missing_permissions)
    async def barred(self, interaction: discord.Interaction[Guildbook]) -> None: ...

    @app_commands.command()
    @app_commands.checks.cooldown(1, 60)
    async def slow(self, interaction: discord.Interaction[Guildbook]) -> None:
        await interaction.response.send_message("done")

    @app_commands.command()
    async def odd(self, interaction: discord.Interaction[Guildbook],
                  value: app_commands.Transform[str, Odd]) -> None: ...

    @app_commands.command()
    async def choose(self, interaction: discord.Interaction[Guildbook], form: Literal["json", "csv"] = "json",
                     count: app_commands.Range[int, 1, 10] = 1, title: app_commands.Range[str, 2] = "xy",
                     mood: Mood = Mood.good, flag: bool = False) -> None:
        await interaction.response.send_message(f"{form} {count} {title} {mood.name} {flag}")

    @app_commands.command()
    async def own(self, interaction: discord.Interaction[Guildbook]) -> None:
        raise RuntimeError

    @own.error
    async def own_error(self, interaction: discord.Interaction[Guildbook], error: Exception) -> None:
        await interaction.response.send_message("handled")

async def setup(bot: Guildbook) -> None:
    await bot.add_cog(Failing(bot))
    await bot.add_cog(Plain())
"""


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemporaryCogs:
    """A cog whose commands fail."""
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    imports = "from enum import Enum\nfrom typing import Literal\nfrom discord.ext import commands\n"
    cogs.write("failing", imports + "from utils.exceptions import DatabaseUnavailable\n" + FAILING_COG)
    return cogs


async def use(
    simulator: Simulator, name: str, *, as_operator: bool = False, responses: int = 1, **options: Any
) -> InteractionResult:
    """Run a command and wait for `responses` answers, edits and follow-ups in all."""
    guild = next(iter(simulator.world.guilds.values()))
    user_id, guild_id = (simulator.world.operator_id, None) if as_operator else (guild.owner_id, guild.id)
    result = await simulator.run_command(name, user_id=user_id, guild_id=guild_id, options=options)

    def count(result: InteractionResult) -> int:
        return bool(result.content) + len(result.edits) + len(result.followups)

    return await result.wait_done(until=lambda result: count(result) >= responses)


def reference_in(text: str | None) -> str:
    """Return the reference in an answer."""
    match = re.search(r"\(ref ([0-9a-f]{8})\)\.?$", text or "")
    assert match, text
    assert "\n" not in (text or "")
    return match[1]


async def test_answers_in_one_line_and_logs_the_same_reference(
    database: Pool,
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
    failing: TemporaryCogs,
) -> None:
    caplog.set_level(logging.INFO)
    expected = {
        "crash": command_errors.INTERNAL_ERROR,
        "unavailable": command_errors.DATABASE_UNAVAILABLE,
        "barred": "You need the permissions Manage Roles, Ban Members to use this command.",
        "odd": "'7' is not valid here. Expected: odd.",
    }
    async with running_bot(database, simulator, extensions=failing.extensions):
        for name, text in expected.items():
            given: dict[str, Any] = {"value": "7"} if name == "odd" else {}
            result = await use(simulator, name, **given)
            reference = reference_in(result.content)
            assert (result.content or "").replace(f" (ref {reference})", "") == text
            assert result.ephemeral
            (line,) = [it for it in caplog.records if getattr(it, "reference", None) == reference]
            assert f"(ref {reference})" in line.getMessage()
            assert line.name == failing.module("failing")
            assert (line.exc_info is not None) == (name in ("crash", "unavailable")), "only faults have a traceback"
        declined = await use(simulator, "decline")
        assert (declined.content, declined.ephemeral) == ("You have no\nquotes yet", True), "as it was written"
        assert (await use(simulator, "slow")).content == "done"
        assert re.match(
            r"This command is on cooldown\. Try again in \d\d s \(ref", (await use(simulator, "slow")).content or ""
        )
        assert (await use(simulator, "own")).content == "handled"
        unavailable = await use(simulator, "odd", value="unavailable")
        assert (unavailable.content or "").startswith(command_errors.DATABASE_UNAVAILABLE.removesuffix("."))


async def test_value_outside_its_option_is_a_sentence(
    database: Pool, simulator: Simulator, caplog: pytest.LogCaptureFixture, failing: TemporaryCogs
) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"form": "xml"}, "form: 'xml' is not valid here. Expected: one of json, csv"),
        ({"form": 5}, "form: '5' is not valid here. Expected: text"),
        ({"count": 11}, "count: '11' is not valid here. Expected: 1 to 10"),
        ({"count": "many"}, "count: 'many' is not valid here. Expected: a whole number"),
        ({"count": True}, "count: 'True' is not valid here. Expected: a whole number"),
        ({"title": "x"}, "title: 'x' is not valid here. Expected: at least 2 characters"),
        ({"mood": 3}, "mood: '3' is not valid here. Expected: one of good, bad"),
        ({"flag": "maybe"}, "flag: 'maybe' is not valid here. Expected: true or false"),
    ]
    async with running_bot(database, simulator, extensions=failing.extensions):
        for options, text in refused:
            result = await use(simulator, "choose", **options)
            reference_in(result.content)
            assert ((result.content or "").partition(" (ref")[0], result.ephemeral) == (text, True)
        assert (await use(simulator, "choose")).content == "json 1 xy good False"
        result = await use(simulator, "choose", form="csv", count=10, mood=2, flag=True)
        assert result.content == "csv 10 xy bad True"
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


async def test_command_of_a_plain_cog_is_answered_too(
    database: Pool, simulator: Simulator, failing: TemporaryCogs
) -> None:
    async with running_bot(database, simulator, extensions=failing.extensions) as bot:
        reference_in((await use(simulator, "plain")).content)
        guild = next(iter(simulator.world.guilds.values()))
        bot.tree.remove_command("plain")  # Discord still knows it
        result = await simulator.run_command("plain", user_id=guild.owner_id, guild_id=guild.id)
        await result.wait_done()
        assert (result.content or "").startswith("This command has changed.")
    assert result.ephemeral


async def test_repeated_errors_of_users_are_answered_and_not_all_logged(
    database: Pool,
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
    failing: TemporaryCogs,
) -> None:
    caplog.set_level(logging.INFO)
    async with running_bot(database, simulator, extensions=failing.extensions) as bot:
        bot.logged_user_errors = RateLimit(2, 3_600)
        answers = [(await use(simulator, "decline")).content or "" for _ in range(5)]
        assert set(answers) == {"You have no\nquotes yet"}
        reference_in((await use(simulator, "crash")).content)
    lines = [line for line in caplog.records if hasattr(line, "reference")]
    assert [line.levelname for line in lines] == ["INFO", "INFO", "ERROR"]
    assert getattr(lines[-1], "errors_not_logged") == 3  # noqa: B009 - a field


@pytest.mark.parametrize("how", ["deferred", "deferred_privately", "followed_up", "answered"])
async def test_answer_is_private_after_any_earlier_response(
    database: Pool, simulator: Simulator, failing: TemporaryCogs, how: str
) -> None:
    async with running_bot(database, simulator, extensions=failing.extensions):
        result = await use(simulator, "crash", responses=1 if how in ("deferred", "deferred_privately") else 2, how=how)
        if how == "deferred_privately":
            assert result.ephemeral
            reference_in(result.edits[-1].content)
        else:
            (message,) = result.followups
            reference_in(message["content"])
            assert message["flags"] & discord.MessageFlags.ephemeral.flag
            assert (result.message is None) == (how == "deferred"), "only an empty deferral is deleted"


async def test_shows_details_to_operators_only(database: Pool, simulator: Simulator, failing: TemporaryCogs) -> None:
    async with running_bot(database, simulator, extensions=failing.extensions):
        assert "10.0.0.5" in ((await use(simulator, "unavailable", as_operator=True)).content or "")
        crash = (await use(simulator, "crash", as_operator=True)).content or ""
        assert "KeyError" in crash
        assert "hunter2" not in crash


async def test_logs_an_answer_that_discord_refuses(
    database: Pool,
    simulator: Simulator,
    caplog: pytest.LogCaptureFixture,
    failing: TemporaryCogs,
) -> None:
    simulator.interactions.response_deadline = 0.0
    async with running_bot(database, simulator, extensions=failing.extensions):
        guild = next(iter(simulator.world.guilds.values()))
        await simulator.run_command("crash", user_id=guild.owner_id, guild_id=guild.id)
        await until(lambda: "could not answer /crash" in caplog.text)
        assert not [line for line in caplog.records if line.name.startswith("discord.app_commands")]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (app_commands.BotMissingPermissions(["ban_members"]), "I need the permission Ban Members to do that"),
        (app_commands.NoPrivateMessage(), "This command works only in a server."),
        (app_commands.MissingRole("chief"), "You need the role 'chief' to use this command."),
        (app_commands.MissingAnyRole(["chief", 5]), "You need one of these roles to use this command: 'chief', <@&5>."),
        (app_commands.CheckFailure("secret"), "You are not allowed to use this command here."),
        (commands.NoPrivateMessage(), "This command works only in a server."),
        (commands.BadArgument("'x' is not a number"), "Invalid input: 'x' is not a number"),
        (commands.ConversionError(commands.MemberConverter(), ValueError("x")), "One of the values is not valid here."),
        (DatabaseError("duplicate key"), command_errors.INTERNAL_ERROR),
        (GuildbookError("inner workings"), command_errors.INTERNAL_ERROR),
        (Declined("Not today"), "Not today"),
        (commands.CommandInvokeError(DatabaseUnavailable("x")), command_errors.DATABASE_UNAVAILABLE),
        (asyncpg.CannotConnectNowError("x"), command_errors.DATABASE_UNAVAILABLE),
        (commands.CommandInvokeError(FileNotFoundError("the cog's own")), command_errors.INTERNAL_ERROR),
        (TransactionConflict("x"), command_errors.TRANSACTION_CONFLICT),
        (DBAPIError("UPDATE x", {}, asyncpg.DeadlockDetectedError("x")), command_errors.TRANSACTION_CONFLICT),
    ],
)
def test_explains_known_errors(error: Exception, text: str) -> None:
    assert explain(error).text.startswith(text)


class Trade(pydantic.BaseModel):
    amount: int

    @pydantic.field_validator("amount")
    def check(cls, amount: int) -> int:
        assert amount != 13, "thirteen brings bad luck."
        if amount % 2:
            raise ValueError("must be even")
        return amount


@pytest.mark.parametrize(
    ("amount", "text"),
    [(13, "amount: thirteen brings bad luck"), (1, "amount: must be even"), (0.5, "amount should be a valid integer")],
)
def test_explains_invalid_values_in_the_words_of_the_model(amount: float, text: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Trade(amount=amount)  # type: ignore[arg-type]
    assert explain(caught.value).text.startswith(f"Invalid input: {text}")

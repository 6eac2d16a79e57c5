"""/cogs: operators load, unload and reload; nobody else does."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import pytest

from simulator import InteractionResult, Simulator, World
from simulator.ids import snowflake_at
from simulator.interaction_payloads import interaction_payload
from tests.bot.running import running
from tests.bot.written import WrittenCogs
from utils.database import Pool
from utils.operations import slash


@pytest.fixture
def world() -> World:
    """One small guild."""
    world = World(seed=11)
    world.add_guild(members=10, name="Small")
    return world


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WrittenCogs:
    """A cog that works."""
    cogs = WrittenCogs(tmp_path, monkeypatch)
    cogs.plain("one", "first")
    return cogs


@pytest.fixture
def guild_id(world: World) -> int:
    """The id of the one guild."""
    return next(iter(world.guilds))


async def run(simulator: Simulator, subcommand: str, user_id: int | None = None, **options: str) -> str:
    """Run /cogs in direct messages and return its last word; without a user, as an operator."""
    result = await simulator.run_command(
        "cogs", subcommand=subcommand, user_id=user_id or simulator.world.operator_id, options=options
    )
    await result.wait_done(30)
    assert (result.deferred, result.ephemeral) == (True, True)
    return result.final_content or ""


async def suggested(
    simulator: Simulator, subcommand: str, typed: str, user_id: int, guild_id: int | None = None
) -> list[str]:
    """Type into the option `name` and return what is suggested."""
    routes = simulator.interactions
    (command,) = [it for it in routes.commands(guild_id) if it["name"] == "cogs"]
    result = InteractionResult(
        snowflake_at(time.time_ns() // 1000, secrets.randbelow(4096)), secrets.token_hex(32), time.monotonic()
    )
    payload: dict[str, Any] = interaction_payload(
        simulator, command, result.id, result.token, user_id, guild_id, None, [subcommand], {"name": typed}
    )
    payload["type"] = 4
    payload["data"]["options"][0]["options"][0]["focused"] = True
    routes._by_token[result.token] = result
    simulator.gateway.dispatch(guild_id, "INTERACTION_CREATE", payload)
    await result.wait_done()
    return [choice["value"] for choice in result.choices or []]


async def test_an_operator_sees_unloads_loads_and_reloads_cogs(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs
) -> None:
    cogs.write("broken", "raise RuntimeError('out of *paper*')")
    async with running(database, simulator, monkeypatch, extensions=[*cogs.extensions, "cogs.cogs"]) as bot:
        broken, ourselves, one = (await run(simulator, "list")).splitlines()
        assert broken == r"**broken** failed: RuntimeError: out of \*paper\*"
        assert ourselves.startswith("**cogs** loaded in ")
        assert one.startswith("**one** loaded in ")
        assert await run(simulator, "unload", name="one") == "**one** unloaded"
        assert "one" not in [command["name"] for command in simulator.interactions.commands()]
        assert (await run(simulator, "load", name=" cogs.one ")).startswith("**one** loaded in ")
        assert "one" in [command["name"] for command in simulator.interactions.commands()]
        assert (await run(simulator, "reload", name="one")).startswith("**one** loaded in ")
        cogs.write("one", "raise RuntimeError('worse')")
        text = "Failed: one was not reloaded, the former code is back: RuntimeError: worse"
        assert await run(simulator, "reload", name="one") == text
        assert "(the last reload failed): RuntimeError: worse" in await run(simulator, "list")
        assert [state.state for state in bot.loader.states()] == ["failed", "loaded", "loaded"]
    rows = await database.fetch("SELECT command, arguments, result FROM ops.admin_actions ORDER BY id DESC LIMIT 2")
    assert [tuple(row) for row in rows][1] == ("cogs reload", {"name": "one"}, text)


async def test_the_cog_that_loads_the_others_can_be_reloaded_and_stays(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(database, simulator, monkeypatch, extensions=["cogs.cogs"]) as bot:
        former = bot.cogs["CogCommands"]
        assert (await run(simulator, "unload", name="cogs")).startswith("Failed: cogs stays: ")
        for _ in range(2):
            assert (await run(simulator, "reload", name="cogs")).startswith("**cogs** loaded in ")
        assert bot.cogs["CogCommands"] is not former
        assert "there is no cog" in await run(simulator, "load", name="other")


@pytest.mark.parametrize("subcommand", ["list", "load", "unload", "reload"])
async def test_the_owner_of_a_guild_is_refused(
    database: Pool,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    cogs: WrittenCogs,
    guild_id: int,
    subcommand: str,
) -> None:
    owner = simulator.world.guild(guild_id).owner_id
    extensions = [*cogs.extensions, "cogs.cogs"]
    async with running(database, simulator, monkeypatch, extensions=extensions, admin_guild_id=guild_id) as bot:
        former = dict(bot.cogs)
        result = await simulator.run_command(
            "cogs",
            subcommand=subcommand,
            user_id=owner,  # with every permission that a guild can give
            guild_id=guild_id,
            options={} if subcommand == "list" else {"name": "one"},
        )
        await result.wait_done()
        assert (result.ephemeral, result.final_content) == (True, slash.REFUSAL)
        assert dict(bot.cogs) == former


async def test_names_are_suggested_to_operators_alone(
    database: Pool, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, cogs: WrittenCogs, guild_id: int
) -> None:
    cogs.plain("other", "second")
    operator, owner = simulator.world.operator_id, simulator.world.guild(guild_id).owner_id
    extensions = [*cogs.extensions, "cogs.cogs"]
    async with running(
        database,
        simulator,
        monkeypatch,
        extensions=extensions,
        admin_guild_id=guild_id,
        admin_user_ids=frozenset((next(id for id in simulator.world.guild(guild_id).members if id != owner),)),
    ) as bot:
        named = next(iter(bot.settings.admin_user_ids))
        await bot.loader.unload("other")
        assert await suggested(simulator, "reload", "", named, guild_id) == ["cogs", "one"]
        assert await suggested(simulator, "unload", "ON", named, guild_id) == ["one"]
        assert await suggested(simulator, "load", "", named, guild_id) == ["other"]
        for subcommand in ("load", "unload", "reload"):
            assert await suggested(simulator, subcommand, "", owner, guild_id) == []
        assert await bot.operators.includes(operator)

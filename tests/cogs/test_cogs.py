"""/cogs: operators list, load, unload and reload cogs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simulator import Simulator, World
from tests.bot.running import running_bot
from tests.bot.temporary_cogs import TemporaryCogs
from utils.database import Pool
from utils.operations import slash

pytestmark = pytest.mark.guilds(10)


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemporaryCogs:
    """A package with one cog, `one`."""
    cogs = TemporaryCogs(tmp_path, monkeypatch)
    cogs.write_answering("one", "first")
    return cogs


@pytest.fixture
def guild_id(world: World) -> int:
    """The id of the one guild."""
    return next(iter(world.guilds))


async def run(simulator: Simulator, subcommand: str, user_id: int | None = None, **options: str) -> str:
    """Run /cogs in direct messages and return its final answer. The default user is an operator."""
    result = await simulator.run_command(
        "cogs", subcommand=subcommand, user_id=user_id or simulator.world.operator_id, options=options
    )
    await result.wait_done(30)
    assert (result.deferred, result.ephemeral) == (True, True)
    return result.final_content or ""


async def suggestions(
    simulator: Simulator, subcommand: str, typed: str, user_id: int, guild_id: int | None = None
) -> list[str]:
    """Return what autocompletion suggests for the option `name`."""
    result = await simulator.autocomplete(
        "cogs", user_id=user_id, guild_id=guild_id, subcommand=subcommand, focused="name", options={"name": typed}
    )
    await result.wait_done()
    return [choice["value"] for choice in result.choices or []]


async def test_operator_lists_loads_unloads_and_reloads_cogs(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs
) -> None:
    cogs.write("broken", "raise RuntimeError('not *enough*')")
    async with running_bot(database, simulator, extensions=[*cogs.extensions, "cogs.cogs"]) as bot:
        broken, cogs_cog, one = (await run(simulator, "list")).splitlines()
        assert broken == r"**broken** failed: RuntimeError: not \*enough\*"
        assert cogs_cog.startswith("**cogs** loaded in ")
        assert one.startswith("**one** loaded in ")
        assert await run(simulator, "unload", name="one") == "**one** unloaded"
        assert "one" not in [command["name"] for command in simulator.interactions.commands()]
        assert (await run(simulator, "load", name=" cogs.one ")).startswith("**one** loaded in ")
        assert "one" in [command["name"] for command in simulator.interactions.commands()]
        assert (await run(simulator, "reload", name="one")).startswith("**one** loaded in ")
        cogs.write("one", "raise RuntimeError('worse')")
        text = "Failed: one was not reloaded, the previous code was restored: RuntimeError: worse"
        assert await run(simulator, "reload", name="one") == text
        assert "(the last reload failed): RuntimeError: worse" in await run(simulator, "list")
        assert [state.state for state in bot.loader.states()] == ["failed", "loaded", "loaded"]
    rows = await database.fetch("SELECT command, arguments, result FROM ops.admin_actions ORDER BY id DESC LIMIT 2")
    assert [tuple(row) for row in rows][1] == ("cogs reload", {"name": "one"}, text)


async def test_lists_loops_with_their_last_and_next_run(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs
) -> None:
    cogs.write(
        "looping",
        """
        class Looping(BaseCog):
            @tasks.loop(seconds=60)
            async def poll(self) -> None:
                raise OSError("no answer_")

            async def start(self) -> None:
                self.every(30, self.refresh)
                self.poll.start()

            async def refresh(self) -> None: ...

        async def setup(bot: Guildbook) -> None:
            await bot.add_cog(Looping(bot))
        """,
    )
    async with running_bot(database, simulator, extensions=[cogs.module("looping"), "cogs.cogs"]):
        listed = await run(simulator, "list")
    assert re.search(r"- `Looping.poll` every 60 s: last run <t:\d+:T>, last error OSError: no answer\\_, next", listed)
    assert re.search(r"- `refresh` every 30 s: last run <t:\d+:T>, next run <t:\d+:T>", listed)


async def test_a_list_with_many_loops_is_a_file(database: Pool, simulator: Simulator, cogs: TemporaryCogs) -> None:
    cogs.write(
        "looping",
        """
        class Looping(BaseCog):
            async def start(self) -> None:
                for number in range(40):
                    self.every(3600, self.refresh, name=f"refresh {number}")

            async def refresh(self) -> None: ...

        async def setup(bot: Guildbook) -> None:
            await bot.add_cog(Looping(bot))
        """,
    )
    async with running_bot(database, simulator, extensions=[cogs.module("looping"), "cogs.cogs"]):
        result = await simulator.run_command("cogs", subcommand="list", user_id=simulator.world.operator_id)
        await result.wait_done(30)
    assert len((result.final_content or "").splitlines()) == 2, "one line for each cog"
    assert result.files["cogs.txt"].decode().count("\n- `refresh ") == 40


async def test_cogs_cog_can_be_reloaded_but_not_unloaded(database: Pool, simulator: Simulator) -> None:
    async with running_bot(database, simulator, extensions=["cogs.cogs"]) as bot:
        previous = bot.cogs["CogCommands"]
        assert (await run(simulator, "unload", name="cogs")).startswith("Failed: cogs cannot be unloaded")
        for _ in range(2):
            assert (await run(simulator, "reload", name="cogs")).startswith("**cogs** loaded in ")
        assert bot.cogs["CogCommands"] is not previous
        assert "no cog is named" in await run(simulator, "load", name="other")


@pytest.mark.parametrize("subcommand", ["list", "load", "unload", "reload"])
async def test_refuses_guild_owners(
    database: Pool,
    simulator: Simulator,
    cogs: TemporaryCogs,
    guild_id: int,
    subcommand: str,
) -> None:
    owner = simulator.world.guild(guild_id).owner_id
    extensions = [*cogs.extensions, "cogs.cogs"]
    async with running_bot(database, simulator, extensions=extensions, admin_guild_id=guild_id) as bot:
        before = dict(bot.cogs)
        result = await simulator.run_command(
            "cogs",
            subcommand=subcommand,
            user_id=owner,  # with every permission that a guild can give
            guild_id=guild_id,
            options={} if subcommand == "list" else {"name": "one"},
        )
        await result.wait_done()
        assert (result.ephemeral, result.final_content) == (True, slash.REFUSAL)
        assert dict(bot.cogs) == before


async def test_suggests_names_to_operators_only(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, guild_id: int
) -> None:
    cogs.write_answering("other", "second")
    operator, owner = simulator.world.operator_id, simulator.world.guild(guild_id).owner_id
    extensions = [*cogs.extensions, "cogs.cogs"]
    async with running_bot(
        database,
        simulator,
        extensions=extensions,
        admin_guild_id=guild_id,
        admin_user_ids=frozenset((next(id for id in simulator.world.guild(guild_id).members if id != owner),)),
    ) as bot:
        named = next(iter(bot.settings.admin_user_ids))
        await bot.loader.unload("other")
        assert await suggestions(simulator, "reload", "", named, guild_id) == ["cogs", "one"]
        assert await suggestions(simulator, "unload", "ON", named, guild_id) == ["one"]
        assert await suggestions(simulator, "load", "", named, guild_id) == ["other"]
        for subcommand in ("load", "unload", "reload"):
            assert await suggestions(simulator, subcommand, "", owner, guild_id) == []
        assert await bot.operators.includes(operator)

"""The bot with packs: their cogs load, reload and fail like its own, and one that fails stops nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import Simulator
from testing.running import running_bot
from tests.bot.running import BotProcess
from tests.packs.support import add_revision, require, using, write_pack
from utils.database import ConnectTarget, Pool
from utils.operations import migrations

pytestmark = pytest.mark.guilds(5)


async def test_cogs_of_packs_load_and_reload_under_the_name_of_the_pack(
    database: Pool, simulator: Simulator, tmp_path: Path
) -> None:
    root = write_pack(tmp_path, "economy")
    guild_id = next(iter(simulator.world.guilds))
    owner, operator = simulator.world.guild(guild_id).owner_id, simulator.world.operator_id

    async def say(command: str, guild: int | None, user: int, **options: str) -> str:
        subcommand = options.pop("subcommand", None)
        result = await simulator.run_command(
            command, user_id=user, guild_id=guild, subcommand=subcommand, options=options
        )
        return (await result.wait_done()).final_content or ""

    with using(root):
        await migrations.upgrade_packs(database)
        async with running_bot(database, simulator) as bot:
            assert await say("economy", guild_id, owner) == "Your count is 1."
            listed = await say("cogs", None, operator, subcommand="list")
            assert "**economy** (pack economy) loaded" in listed
            assert "**db** loaded" in listed
            texts, cog = root / "economy/locales/en-US.json", root / "economy/cogs/economy.py"
            texts.write_text('{"count": "{count} it is."}')
            reloaded = await say("cogs", None, operator, subcommand="reload", name="economy")
            assert reloaded.startswith("**economy** (pack economy) loaded")
            assert await say("economy", guild_id, owner) == "2 it is."
            good = cog.read_text()
            cog.write_text(good.replace("async def setup", "raise RuntimeError('broken')\n\n\nasync def setup"))
            assert "the previous code was restored" in await say(
                "cogs", None, operator, subcommand="reload", name="economy"
            )
            assert await say("economy", guild_id, owner) == "3 it is."
            cog.write_text(good)
            await bot.loader.unload("economy")
            assert "economy.cogs.economy" not in bot.extensions


async def test_a_pack_with_a_problem_is_listed_with_it_and_not_loaded(
    database: Pool, simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    economy, levels, shop = (write_pack(tmp_path, name) for name in ("economy", "levels", "shop"))
    require(economy, "0099")
    (levels / "levels/cogs/levels.py").write_text("import no_such_module\n")
    monkeypatch.setenv("SHOP_STEP", "none")
    with using(economy, levels, shop):
        await migrations.prepare_packs(database, auto_migrate=True)
        async with running_bot(database, simulator) as bot:
            states = {state.name: state for state in bot.loader.states()}
            assert {name for name, state in states.items() if state.state == "failed"} == {"economy", "levels", "shop"}
            assert "economy needs revision 0099 of Guildbook" in (states["economy"].reason or "")
            assert "No module named 'no_such_module'" in (states["levels"].reason or "")
            assert "SHOP_STEP: input should be a valid integer" in (states["shop"].reason or "")
            assert states["db"].state == "loaded"


@pytest.mark.slow
async def test_a_first_start_tries_a_failing_revision_once(
    empty_target: ConnectTarget, simulator: Simulator, tmp_path: Path
) -> None:
    root = write_pack(tmp_path, "economy")
    add_revision(root, "economy_0002", "economy_0001", 'raise RuntimeError("not yet")')
    settings = {"DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base, "COGS": str(root)}
    async with BotProcess(tmp_path, DATABASE_URL=empty_target.libpq_url(), **settings) as bot:
        await bot.wait_until_ready()
        bot.process.kill()
        await bot.wait_for_exit()
    assert bot.output.count("pack not loaded: pack economy: ") == 1, bot.output
    assert "made backup" not in bot.output

"""The bot identifies with the intents of the mirror, of INTENTS and of its cogs; what Discord refuses costs one cog."""

from __future__ import annotations

from pathlib import Path

import discord
import pytest

from simulator import Simulator
from simulator.state import PRIVILEGED, Intent
from tests.bot.running import BotProcess, running_bot, wait_until_mirrored
from tests.bot.temporary_cogs import TemporaryCogs
from tests.waiting import until
from utils.bot.client import Guildbook
from utils.database import Pool
from utils.exceptions import CogError
from utils.mirror.discord.intents import intent_names, mirror_intents

pytestmark = pytest.mark.guilds(10)

COG = """
class NAME(BaseCog, name="NAME"):
    intents = discord.Intents(INTENTS)

    async def start(self) -> None:
        self.bot.seen = self.bot.intents

async def setup(bot): await bot.add_cog(NAME(bot))
"""
FAILING = COG.replace("self.bot.seen = self.bot.intents", "raise ValueError('no')")


@pytest.fixture
def cogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TemporaryCogs:
    """An empty package for cogs."""
    return TemporaryCogs(tmp_path, monkeypatch)


def write(cogs: TemporaryCogs, name: str, intents: str, text: str = COG) -> None:
    cogs.write(name, text.replace("NAME", name).replace("INTENTS", intents))


def identified(simulator: Simulator) -> list[str]:
    """Return the intents of the last gateway session."""
    value = list(simulator.gateway.sessions.values())[-1].intents
    return intent_names(discord.Intents._from_value(value))


async def test_intents_of_cogs_and_settings_are_combined(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs
) -> None:
    write(cogs, "levels", "message_content=True, guild_reactions=True")
    write(cogs, "failing", "invites=True", FAILING)
    cogs.write(
        "plain", "class Plain(commands.Cog):\n    intents = ['mine']\nasync def setup(bot): await bot.add_cog(Plain())"
    )
    async with running_bot(database, simulator, extensions=cogs.extensions, intents=("dm_messages", "webhooks")) as bot:
        expected = {*intent_names(mirror_intents()), "message_content", "guild_reactions", "dm_messages", "webhooks"}
        assert set(identified(simulator)) == set(intent_names(bot.intents)) == expected
        assert bot.seen.message_content, "a cog sees its own intents while it starts"  # type: ignore[attr-defined]
        await wait_until_mirrored(database, simulator)


async def test_a_refused_intent_leaves_out_its_cog_alone(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.privileged_intents = int(Intent.GUILD_MEMBERS)
    write(cogs, "levels", "message_content=True")
    write(cogs, "other", "guild_reactions=True")
    async with running_bot(database, simulator, extensions=cogs.extensions, intents=("presences", "invites")) as bot:
        states = {state.name: state for state in bot.loader.states()}
        assert (states["levels"].state, states["other"].state) == ("failed", "loaded")
        assert states["levels"].reason == (
            "levels needs the intent message_content, which Discord does not grant to this application: switch on"
            " 'Message Content Intent' at https://discord.com/developers/applications > your application > Bot >"
            " Privileged Gateway Intents (bots that reach 10,000 users or more need Discord's review for it), then"
            " start again"
        )
        assert {"guild_reactions", "invites"} <= set(identified(simulator))
        assert not {"message_content", "presences"} & set(identified(simulator))
        assert "INTENTS: left out presences" in caplog.text
        await wait_until_mirrored(database, simulator)


async def test_a_cog_that_comes_later_says_that_it_needs_a_restart(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.privileged_intents = int(Intent.GUILD_MEMBERS)
    write(cogs, "levels", "guild_messages=True")
    write(cogs, "late", "guild_messages=True")
    async with running_bot(database, simulator, extensions=cogs.extensions) as bot:
        assert [state.warnings for state in bot.loader.states()] == [(), ()]
        write(cogs, "levels", "guild_reactions=True, invites=True")
        restart = "levels needs the intents invites, guild_reactions, which the bot did not connect with: restart it"
        assert (await bot.loader.reload("levels")).warnings == (restart,)
        assert f"cog levels: {restart}" in caplog.text
        await bot.loader.unload("late")
        write(cogs, "late", "presences=True")
        with pytest.raises(CogError, match="late needs the intent presences, which Discord does not grant"):
            await bot.loader.load("late")
        assert identified(simulator) == intent_names(bot.intents) == intent_names(mirror_intents())


async def test_flags_without_the_members_intent_are_not_believed(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Simulator, "application_flags", 0)
    write(cogs, "levels", "message_content=True")
    async with running_bot(database, simulator, extensions=cogs.extensions):
        assert "message_content" in identified(simulator)


@pytest.mark.slow
async def test_a_connection_closed_for_an_intent_starts_again_without_it(
    tmp_path: Path, simulator: Simulator, database: Pool, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Discord took the intent away after it was asked.
    monkeypatch.setattr(Simulator, "application_flags", 1 << 15 | 1 << 19)
    simulator.privileged_intents = int(PRIVILEGED & ~Intent.MESSAGE_CONTENT)
    settings = {"DATABASE_URL": database_url, "DISCORD_TOKEN": simulator.token, "DISCORD_API_BASE": simulator.api_base}
    async with BotProcess(tmp_path, **settings, INTENTS="message_content,dm_messages") as bot:
        await bot.wait_for_output("starting again without message_content and the cogs that need them")
        await bot.wait_until_ready()
        await wait_until_mirrored(database, simulator)
    assert "dm_messages" in identified(simulator)
    assert "message_content" not in identified(simulator)


WAITING = """
class Waiting(BaseCog):
    async def start(self) -> None:
        self.loop.start()
        self.spawn(self.wait(), "wait")

    @tasks.loop(seconds=60)
    async def loop(self) -> None:
        self.bot.turned = True

    @loop.before_loop
    async def before(self) -> None:
        await self.bot.wait_until_ready()

    async def wait(self) -> None:
        await self.bot.wait_until_ready()
        self.bot.waited = True

async def setup(bot): await bot.add_cog(Waiting(bot))
"""


async def test_waiting_for_discord_while_loading_fails_at_once(
    database: Pool, simulator: Simulator, cogs: TemporaryCogs
) -> None:
    start = "class Stuck(BaseCog):\n    async def start(self): await self.bot.{}\nasync def setup(bot): {}"
    cogs.write("starting", start.format("wait_until_ready()", "await bot.add_cog(Stuck(bot))"))
    cogs.write("setting_up", start.format("close()", "await bot.wait_until_ready()"))
    cogs.write("listening", start.format("wait_for('message')", "await bot.add_cog(Stuck(bot))"))
    cogs.write("waiting", WAITING)

    def never_time_out(bot: Guildbook) -> None:
        bot.loader.setup_timeout = 10_000.0

    async with running_bot(database, simulator, extensions=cogs.extensions, configure=never_time_out) as bot:
        reasons = {state.name: state.reason for state in bot.loader.states()}
        why = (
            " cannot be awaited here: cogs are loaded before the bot connects, so it would wait for ever; await it in a"
            " task (self.spawn) or in a loop's before_loop"
        )
        assert reasons == {
            "starting": f"wait_until_ready(){why}", "setting_up": f"wait_until_ready(){why}",
            "listening": f"wait_for('message'){why}", "waiting": None,
        }  # fmt: skip
        await until(lambda: getattr(bot, "turned", False) and getattr(bot, "waited", False))
        await bot.loader.unload("waiting")
        cogs.write("waiting", start.format("wait_until_ready()", "await bot.add_cog(Stuck(bot))"))
        assert (await bot.loader.load("waiting")).state == "loaded", "the bot is ready now"

"""The pytest plugin: a pack whose cog answers in every way that Discord knows, and its tests, which use all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks_of
from tests.operations.migrations.support import HEAD
from tests.packs.support import require, write_pack
from utils.demo.bot_process import environment

COG = """
import asyncio

import discord
from discord import app_commands, ui
from discord.ext import commands, tasks

from utils.base_cog import BaseCog


class Confirm(ui.View):
    @ui.button(label="Yes")
    async def yes(self, interaction, button):
        await interaction.response.edit_message(content="Paid.", view=None)

    @ui.button(label="No")
    async def no(self, interaction, button):
        await interaction.response.edit_message(content="Kept.", view=None)


class Reason(ui.Modal, title="Report"):
    reason = ui.TextInput(label="Reason")

    async def on_submit(self, interaction):
        await interaction.response.send_message(f"Reported: {self.reason.value}", ephemeral=True)


class Menu(ui.View):
    @ui.select(cls=ui.UserSelect)
    async def who(self, interaction, select):
        await interaction.response.send_message(f"You chose {select.values[0].id}.")


class Playground(BaseCog):
    intents = discord.Intents(message_content=True, guild_reactions=True, voice_states=True, dm_messages=True)
    shop = app_commands.Group(name="shop", description="Buy things")

    async def start(self):
        self.ticks = self.halves = 0
        self.heard = []
        self.report = app_commands.ContextMenu(name="Report", callback=self.on_report)
        self.quote = app_commands.ContextMenu(name="Quote", callback=self.on_quote)
        self.bot.tree.add_command(self.report)
        self.bot.tree.add_command(self.quote)
        self.tick.start()
        self.every(1800, self.half)

    async def half(self):
        await asyncio.sleep(0.01)
        self.halves += 1

    async def stop(self):
        self.tick.cancel()

    @tasks.loop(hours=1)
    async def tick(self):
        self.ticks += 1

    async def on_report(self, interaction: discord.Interaction, user: discord.User):
        await interaction.response.send_modal(Reason())

    async def on_quote(self, interaction: discord.Interaction, message: discord.Message):
        await interaction.response.send_message(f"{message.author.id}: {message.content}")

    @app_commands.command(description="Pay")
    async def pay(self, interaction: discord.Interaction, to: discord.User, coins: int):
        await self.db.execute("INSERT INTO economy_entries VALUES (1, $1, $2)", to.id, coins)
        await interaction.response.send_message(f"Pay {coins} coins to {to.mention}?", view=Confirm())

    @app_commands.command(description="Choose")
    async def choose(self, interaction: discord.Interaction):
        await interaction.response.send_message("Who?", view=Menu())

    @app_commands.command(description="Once an hour")
    @app_commands.checks.cooldown(1, 3600)
    async def hourly(self, interaction: discord.Interaction):
        await interaction.response.defer()
        await interaction.followup.send(f"Tick {self.ticks}.")

    @shop.command(description="Buy")
    async def buy(self, interaction: discord.Interaction, item: str):
        await interaction.response.send_message(f"Bought {item}.")
        await interaction.followup.send("Thank you.")

    @buy.autocomplete("item")
    async def items(self, interaction, typed):
        found = [name for name in ("tea", "toast", "cake") if name.startswith(typed)]
        return [app_commands.Choice(name=name, value=name) for name in found] * (26 if typed == "to" else 1)

    @commands.Cog.listener()
    async def on_message(self, message):
        if message.content == "ping":
            await message.channel.send("pong")

    @commands.Cog.listener()
    async def on_raw_reaction_add(self, payload):
        self.heard.append(f"+{payload.emoji}")

    @commands.Cog.listener()
    async def on_raw_reaction_remove(self, payload):
        self.heard.append(f"-{payload.emoji}")

    @commands.Cog.listener()
    async def on_voice_state_update(self, member, before, after):
        self.heard.append("in" if after.channel else "out")


class Plain(commands.Cog):
    def __init__(self, bot):
        self.bot = bot
        self.rounds = 0
        self.round.start()

    @tasks.loop(hours=1)
    async def round(self):
        self.rounds += 1

    @commands.command()
    async def step(self, ctx):
        await ctx.send(f"{ctx.author.display_name}: {self.bot.get_cog('Playground').settings.step}")

    @app_commands.command(description="Make a role")
    async def role(self, interaction: discord.Interaction):
        try:
            await interaction.guild.create_role(name="x")
        except discord.NotFound as exc:
            await interaction.response.send_message(exc.text)


async def setup(bot):
    await bot.add_cog(Playground(bot))
    await bot.add_cog(Plain(bot))
"""
TESTS = """
import pytest

from testing import RunningBot
from testing.people import wait_for


async def test_buttons(bot: RunningBot) -> None:
    assert bot.bot.is_ready()
    anna, ben = bot.people[:2]
    reply = await anna.slash("pay", to=ben, coins=5)
    with pytest.raises(AssertionError, match=r"no button 'Maybe' in <Reply 'Pay 5 coins to .*'; buttons Yes, No>"):
        await reply.press("Maybe")
    assert await reply.press("No", by=ben) == "Kept."
    assert reply == "Kept."


async def test_forms_menus_and_context_menus(bot: RunningBot) -> None:
    anna, ben = bot.people[:2]
    reply = await anna.menu("Report", ben)
    assert reply.form == "Report"
    answer = await reply.fill(Reason="spam")
    assert (answer, answer.is_ephemeral) == ("Reported: spam", True)
    assert await (await anna.slash("choose")).choose(ben) == f"You chose {ben.id}."
    assert await ben.menu("Quote", await anna.say("hello")) == f"{anna.id}: hello"


async def test_autocomplete_and_followups(bot: RunningBot) -> None:
    anna = bot.people[0]
    assert await anna.complete("shop buy", "item", "t") == ["tea", "toast"]
    assert await anna.complete("shop buy", "item", "to") == [], "Discord refuses more than 25"
    reply = await anna.slash("shop buy", item="tea")
    assert repr(reply) == "<Reply 'Bought tea.'; then 'Thank you.'>" or reply == "Bought tea."
    await wait_for(lambda: reply.followups == ["Thank you."], 5, "no follow-up")


async def test_messages_reactions_and_voice(bot: RunningBot) -> None:
    anna = bot.people[0]
    message = await anna.say("ping")
    assert await message.answer() == "pong"
    assert await (await anna.in_direct_messages().say("ping")).answer() == "pong"
    with pytest.raises(AssertionError, match="the bot sent nothing in answer to 'quiet'"):
        await (await anna.say("quiet")).answer(0.05)
    cog = bot.bot.get_cog("Playground")
    cog.heard.clear()
    await anna.react(message, "⭐")
    await anna.unreact(message, "⭐")
    await anna.join_voice()
    await wait_for(lambda: cog.heard[-1:] == ["in"], 5, lambda: f"heard {cog.heard}")
    await anna.leave_voice()
    await wait_for(lambda: cog.heard == ["+⭐", "-⭐", "in", "out"], 5, lambda: f"heard {cog.heard}")


async def test_time_passes_for_cooldowns_and_loops(bot: RunningBot) -> None:
    anna = bot.people[0]
    await wait_for(lambda: bot.bot.get_cog("Playground").ticks >= 1, 5, "the loop did not start")
    await wait_for(lambda: bot.bot.get_cog("Playground").halves >= 1, 5, "every did not start")
    before, halves = bot.bot.get_cog("Playground").ticks, bot.bot.get_cog("Playground").halves
    assert await anna.slash("hourly") == f"Tick {before}."
    assert "again" in str(await anna.slash("hourly"))
    rounds = bot.bot.get_cog("Plain").rounds
    await bot.clock.advance(3 * 3600 + 1)
    assert bot.bot.get_cog("Plain").rounds == rounds + 3
    assert bot.bot.get_cog("Playground").ticks == before + 3
    assert bot.bot.get_cog("Playground").halves == halves + 6
    assert await anna.slash("hourly") == f"Tick {before + 3}."


async def test_settings_are_those_of_the_project(bot: RunningBot) -> None:
    anna = bot.people[0]
    assert await (await anna.say("?step")).answer() == f"{anna.display_name}: 7"
    bot.world.update_member(bot.guild_id, anna.id, nick="Annie")
    assert anna.display_name == "Annie"
    assert await (await anna.say("?step")).answer() == "Annie: 7"


async def test_says_what_the_simulator_lacks(bot: RunningBot) -> None:
    assert "the simulator does not implement POST /api/v10/guilds/" in await bot.people[0].slash("role")


async def test_people_come_and_go_and_each_test_has_a_guild_of_its_own(bot: RunningBot) -> None:
    assert await bot.fetch("SELECT * FROM economy_entries") == []
    carol = await bot.join()
    assert await carol.slash("shop buy", item="x") == "Bought x."
    await carol.leave()
    gone = "SELECT left_at IS NOT NULL FROM members WHERE guild_id = $1 AND user_id = $2"
    await bot.until(gone, bot.guild_id, carol.id)
    with pytest.raises(LookupError, match="no command /nothing is registered"):
        await carol.slash("nothing")


"""


def configure(root: Path, *lines: str) -> None:
    """Give the settings of a pack's tests."""
    project = root / "pyproject.toml"
    text = project.read_text().replace("guildbook_packs", f"guildbook_settings = {json.dumps(lines)}\nguildbook_packs")
    project.write_text(text)


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    return subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_that_people_do_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pack(tmp_path, "economy")
    (root / "economy/cogs/playground.py").write_text(COG)
    (page,) = (block for block in blocks_of(ROOT / "docs/how-to/testing.md") if block.language == "python")
    configure(root, "COMMAND_PREFIX=?", "ECONOMY_STEP=7")
    monkeypatch.setenv("COMMAND_PREFIX", "$")
    documented = page.text.replace("accounts", "economy_entries").replace("coins FROM", "count FROM")
    (root / "tests/test_economy.py").write_text(TESTS + documented)
    done = run(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 passed" in done.stdout


@pytest.mark.slow
def test_says_in_one_line_why_a_pack_cannot_be_tested(tmp_path: Path) -> None:
    root = write_pack(tmp_path, "economy", requires="0099")
    done = run(root)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Exit: pack economy needs revision 0099 of Guildbook, which this version does not have" in done.stdout
    require(root, HEAD)
    configure(root, "COMAND_PREFIX=!")
    done = run(root)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "guildbook_settings: 'COMAND_PREFIX=!' is wrong; expected NAME=value" in done.stdout
    assert "did you mean COMMAND_PREFIX?" in done.stdout
    model = root / "economy/models.py"
    model.write_text(model.read_text() + "    level: Mapped[int] = marked(BigInteger, server_default='0')\n")
    done = run(root)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Exit: pack economy: its models are ahead of its revisions (add_column: economy_entries" in done.stdout

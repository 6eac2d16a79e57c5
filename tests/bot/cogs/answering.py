"""A cog that answers late, wrongly or never, in every kind of handler."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import discord
from discord import app_commands
from discord.ext import commands
from pydantic import BaseModel, PositiveInt

from utils.base_cog import BaseCog, Guildbook
from utils.bot.invocations import bounded
from utils.exceptions import Declined


class Payment(BaseModel):
    """What a user pays."""

    amount: PositiveInt


async def misbehave(how: str, interaction: discord.Interaction[Any] | None = None) -> None:
    """Raise, decline, hang, be slow, or be cancelled."""
    match how:
        case "raise":
            raise KeyError("the password is hunter2")
        case "decline":
            raise Declined("You have nothing:\nbuy something")
        case "invalid":
            Payment(amount=-5)
        case "cancel":
            raise asyncio.CancelledError
        case "hang":
            await asyncio.Event().wait()
        case "slow":
            await asyncio.sleep(0.6)
        case "group":
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(misbehave("hang"))
    if interaction is not None and how in ("slow", "quick"):
        await interaction.response.send_message(f"{how} answer")


class Form(discord.ui.Modal, title="Feedback"):
    """A form."""

    how: discord.ui.TextInput[Form] = discord.ui.TextInput(label="How")

    async def on_submit(self, interaction: discord.Interaction[Any]) -> None:
        await misbehave(self.how.value, interaction)


class Shop(discord.ui.View):
    """A view without an `on_error` of its own."""

    def __init__(self, does: str = "raise") -> None:
        super().__init__(timeout=None)
        self.does = does

    @discord.ui.button(label="Pay", custom_id="pay")
    async def pay(self, interaction: discord.Interaction[Any], button: discord.ui.Button[Shop]) -> None:
        await misbehave(self.does, interaction)

    @discord.ui.select(custom_id="choose", options=[discord.SelectOption(label="raise")])
    async def choose(self, interaction: discord.Interaction[Any], select: discord.ui.Select[Shop]) -> None:
        await misbehave(select.values[0], interaction)


class OwnShop(Shop):
    """A view that answers its errors itself."""

    async def on_error(self, interaction: discord.Interaction[Any], error: Exception, item: Any) -> None:
        await interaction.response.send_message("handled here")


class Ticket(discord.ui.DynamicItem[discord.ui.Button[Any]], template=r"ticket:(?P<how>\w+)"):
    """A button whose custom id holds its data."""

    def __init__(self, how: str) -> None:
        super().__init__(discord.ui.Button(label="Ticket", custom_id=f"ticket:{how}"))
        self.how = how

    @classmethod
    async def from_custom_id(
        cls, interaction: discord.Interaction[Any], item: discord.ui.Item[Any], match: re.Match[str]
    ) -> Ticket:
        return cls(match["how"])

    async def callback(self, interaction: discord.Interaction[Any]) -> None:
        await misbehave(self.how, interaction)


class Plain(commands.Cog):
    """A cog that is no BaseCog."""

    @app_commands.command()
    async def plain(self, interaction: discord.Interaction[Any], how: str) -> None:
        await misbehave(how, interaction)

    @commands.command()
    async def text(self, ctx: commands.Context[Any], how: str) -> None:
        await misbehave(how)

    @commands.hybrid_command()  # type: ignore[arg-type]
    async def both(self, ctx: commands.Context[Any], how: str) -> None:
        await misbehave(how)

    @app_commands.command()
    @app_commands.check(lambda _: 1 / 0 > 0)
    async def unchecked(self, interaction: discord.Interaction[Any]) -> None: ...

    @app_commands.command()
    async def rethrown(self, interaction: discord.Interaction[Any]) -> None:
        raise RuntimeError

    @rethrown.error
    async def rethrow(self, interaction: discord.Interaction[Any], error: Exception) -> None:
        raise error


class Answering(BaseCog):
    """A BaseCog."""

    @app_commands.command()
    async def shop(self, interaction: discord.Interaction[Guildbook], does: str, kind: str = "") -> None:
        view: discord.ui.View
        if kind == "ticket":
            view = discord.ui.View().add_item(Ticket(does))
        else:
            view = OwnShop(does) if kind == "own" else Shop(does)
        await interaction.response.send_message("the shop", view=view)

    @app_commands.command()
    async def form(self, interaction: discord.Interaction[Guildbook], late: bool = False) -> None:
        if late:
            await asyncio.sleep(0.6)
        await interaction.response.send_modal(Form())

    @app_commands.command()
    async def private(self, interaction: discord.Interaction[Guildbook]) -> None:
        await asyncio.sleep(0.6)
        await interaction.response.send_message("a secret", ephemeral=True)

    @app_commands.command()
    @bounded(ephemeral=True)
    async def published(self, interaction: discord.Interaction[Guildbook]) -> None:
        await asyncio.sleep(0.6)
        await interaction.response.send_message("for all")

    @app_commands.command()
    async def helped(self, interaction: discord.Interaction[Guildbook]) -> None:
        await asyncio.sleep(0.6)
        await defer_privately(interaction)
        await interaction.followup.send("a secret")

    @app_commands.command()
    async def forgetful(self, interaction: discord.Interaction[Guildbook]) -> None: ...

    @app_commands.command()
    async def asking(self, interaction: discord.Interaction[Guildbook]) -> None:
        await interaction.response.send_message("Which one?")
        await asyncio.sleep(1.5)
        await interaction.edit_original_response(content="You did not say")

    @app_commands.command()
    @bounded(0)
    async def patient(self, interaction: discord.Interaction[Guildbook]) -> None:
        await asyncio.sleep(1.5)
        await interaction.response.send_message("done at last")

    @app_commands.command()
    async def complete(self, interaction: discord.Interaction[Guildbook], what: str) -> None: ...

    @complete.autocomplete("what")
    async def suggest(self, interaction: discord.Interaction[Guildbook], typed: str) -> list[app_commands.Choice[str]]:
        await misbehave(typed)
        return [app_commands.Choice(name="one", value="one")]


async def defer_privately(interaction: discord.Interaction[Any]) -> None:
    """Defer in a helper, where the framework does not see that the command is private."""
    await interaction.response.defer(ephemeral=True)


async def setup(bot: Guildbook) -> None:
    """Add the cogs, two context menus, a persistent view and a dynamic item."""
    await bot.add_cog(Answering(bot))
    await bot.add_cog(Plain())
    bot.add_view(Shop())
    bot.add_dynamic_items(Ticket)

    async def inspect(interaction: discord.Interaction[Any], user: discord.User) -> None:
        raise KeyError(user.id)

    async def quote(interaction: discord.Interaction[Any], message: discord.Message) -> None:
        await misbehave(message.content, interaction)

    bot.tree.add_command(app_commands.ContextMenu(name="Inspect", callback=inspect))
    bot.tree.add_command(app_commands.ContextMenu(name="Quote", callback=quote))

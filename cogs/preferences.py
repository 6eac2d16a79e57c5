"""/preferences: what a member chooses for themselves in a guild."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import discord
from discord import app_commands

from utils.base_cog import BaseCog
from utils.bot.client import Guildbook
from utils.documents import preferences
from utils.documents.preferences import UNCHANGED, Preferences
from utils.exceptions import ValidationError

#: What takes a choice back.
DEFAULT = "default"
#: Choices that Discord shows for an option (Discord API reference, "Application Command Option Choice").
MOST_CHOICES = 25


class PreferencesCommands(BaseCog):
    """What a member chooses: whether they are notified, and in which language."""

    group = app_commands.Group(
        name="preferences",
        description="What you choose on this server",
        allowed_contexts=app_commands.AppCommandContext(guild=True),
    )

    @group.command(name="show", description="Show what you chose on this server")
    async def show(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the member's own choices."""
        await self._answer(interaction, partial(preferences.get, self.db))

    @group.command(name="set", description="Choose for yourself on this server; what you leave out stays as it is")
    @app_commands.describe(
        notifications="Whether the bot may notify you of its own accord",
        language="A language like en, de or pt-BR; default takes your choice back",
    )
    async def choose(
        self,
        interaction: discord.Interaction[Guildbook],
        notifications: Literal["on", "off", "default"] | None = None,
        language: app_commands.Range[str, 1, 30] | None = None,
    ) -> None:
        """Store the member's own choices and show all of them."""
        chosen = {"on": True, "off": False, DEFAULT: None}
        store = partial(
            preferences.put,
            self.db,
            notifications=UNCHANGED if notifications is None else chosen[notifications],
            language=UNCHANGED if language is None else None if language.strip().lower() == DEFAULT else language,
        )
        await self._answer(interaction, store)

    @choose.autocomplete("language")
    async def _languages(
        self, interaction: discord.Interaction[Guildbook], typed: str
    ) -> list[app_commands.Choice[str]]:
        return suggestions(typed)

    async def _answer(
        self, interaction: discord.Interaction[Guildbook], work: Callable[[int, int], Awaitable[Preferences]]
    ) -> None:
        """Show what `work` returns for this guild and member, to the member alone."""
        guild_id = interaction.guild_id
        assert guild_id is not None, "for guilds only"
        await interaction.response.defer(ephemeral=True, thinking=True)
        try:
            text = told(await work(guild_id, interaction.user.id))
        except ValidationError as exc:
            text = f"Nothing was changed: {exc}"
        await interaction.edit_original_response(content=text)


def told(chosen: Preferences) -> str:
    """Return the lines that show what a member chose."""
    words = {True: "on", False: "off", None: "not chosen"}
    return f"**Notifications**: {words[chosen.notifications]}\n**Language**: {chosen.language or 'not chosen'}"


def suggestions(typed: str) -> list[app_commands.Choice[str]]:
    """Return Discord's own languages that begin with, or are named like, what was typed so far."""
    wanted = typed.strip().lower()
    names = {locale.value: locale.name.replace("_", " ").title() for locale in discord.Locale}
    found = [tag for tag, name in sorted(names.items()) if tag.lower().startswith(wanted) or wanted in name.lower()]
    return [app_commands.Choice(name=f"{names[tag]} ({tag})", value=tag) for tag in found[:MOST_CHOICES]]


async def setup(bot: Guildbook) -> None:
    """Add the cog for everybody."""
    await bot.add_cog(PreferencesCommands(bot))

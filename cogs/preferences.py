"""/preferences: members choose their notifications and language in a guild."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import discord
from discord import app_commands

from utils.base_cog import BaseCog, Guildbook
from utils.db import preferences
from utils.exceptions import ValidationError

#: The option that clears a choice.
DEFAULT = "default"
#: The maximum number of choices (Discord API reference, "Application Command Option Choice").
MAX_CHOICES = 25


class PreferencesCommands(BaseCog):
    """Shows and stores a member's preferences: notifications and language."""

    group = app_commands.Group(
        name="preferences",
        description="Your preferences on this server",
        allowed_contexts=app_commands.AppCommandContext(guild=True),
    )

    @group.command(name="show", description="Show your preferences on this server")
    async def show(self, interaction: discord.Interaction[Guildbook]) -> None:
        """Show the member's preferences."""
        await self._answer(interaction, partial(preferences.get, self.db))

    @group.command(name="set", description="Change your preferences on this server; omitted options stay unchanged")
    @app_commands.describe(
        notifications="Whether the bot may send you notifications",
        language="A language such as en, de or pt-BR; default clears your choice",
    )
    async def set_(
        self,
        interaction: discord.Interaction[Guildbook],
        notifications: Literal["on", "off", "default"] | None = None,
        language: app_commands.Range[str, 1, 30] | None = None,
    ) -> None:
        """Store the member's choices and show all preferences."""
        values = {"on": True, "off": False, DEFAULT: None}
        unchanged = preferences.UNCHANGED
        store = partial(
            preferences.put,
            self.db,
            notifications=unchanged if notifications is None else values[notifications],
            language=unchanged if language is None else None if language.strip().lower() == DEFAULT else language,
        )
        await self._answer(interaction, store)

    @set_.autocomplete("language")
    async def _languages(
        self, interaction: discord.Interaction[Guildbook], current: str
    ) -> list[app_commands.Choice[str]]:
        return language_choices(current)

    async def _answer(
        self,
        interaction: discord.Interaction[Guildbook],
        action: Callable[[int, int], Awaitable[preferences.Preferences]],
    ) -> None:
        """Run an action with the guild's and the member's id, and show the preferences that it returns."""
        guild_id = interaction.guild_id
        assert guild_id is not None, "the command exists only in guilds"
        await interaction.response.defer(ephemeral=True, thinking=True)
        try:
            text = format_preferences(await action(guild_id, interaction.user.id))
        except ValidationError as exc:
            text = f"Nothing was changed: {exc}"
        await interaction.edit_original_response(content=text)


def format_preferences(chosen: preferences.Preferences) -> str:
    """Return a member's preferences as lines of text."""
    words = {True: "on", False: "off", None: "not set"}
    return f"**Notifications**: {words[chosen.notifications]}\n**Language**: {chosen.language or 'not set'}"


def language_choices(current: str) -> list[app_commands.Choice[str]]:
    """Return Discord's languages whose tag starts with the text typed so far, or whose name contains it."""
    prefix = current.strip().lower()
    names = {locale.value: locale.name.replace("_", " ").title() for locale in discord.Locale}
    found = [tag for tag, name in sorted(names.items()) if tag.lower().startswith(prefix) or prefix in name.lower()]
    return [app_commands.Choice(name=f"{names[tag]} ({tag})", value=tag) for tag in found[:MAX_CHOICES]]


async def setup(bot: Guildbook) -> None:
    """Add the cog."""
    await bot.add_cog(PreferencesCommands(bot))

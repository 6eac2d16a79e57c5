"""Buttons that ask whether it is meant: only whoever gave the command can press them, and they expire."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from typing import Any

import discord

from utils.exceptions import NotConfirmed

_log = logging.getLogger(__name__)

#: Seconds for which a question stands.
CONFIRM_SECONDS = 60.0
#: Seconds for an answer to a press to reach Discord, which waits three.
ANSWER_SECONDS = 10.0

_PREFIX = "guildbook-confirm"
_PRESSED = re.compile(rf"{_PREFIX}:([0-9a-f]{{16}}):(yes|no)")

OTHERS = "Only whoever gave the command can answer that."
EXPIRED = "This question has expired: give the command again."


class Confirmations:
    """The questions of one bot that wait for an answer.

    Buttons are told apart by their ids alone, so that one whose question is gone, by expiry or by a restart, is
    answered as well.
    """

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, asyncio.Future[bool]]] = {}

    async def ask(
        self, interaction: discord.Interaction[Any], text: str, label: str, *, timeout: float = CONFIRM_SECONDS
    ) -> None:
        """Put a question under the reply, with a button that says `label`, and return once it was pressed.

        `timeout`: seconds. Raises `NotConfirmed`.
        """
        token = secrets.token_hex(8)
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._open[token] = interaction.user.id, answered
        try:
            async with asyncio.timeout(timeout):
                await interaction.edit_original_response(content=text, view=_buttons(token, label))
                is_meant = await answered
        except TimeoutError:
            raise NotConfirmed(f"not confirmed within {timeout:g} s: nothing was done") from None
        except (discord.DiscordException, OSError) as exc:
            raise NotConfirmed(f"the question could not be asked, nothing was done: {exc}") from exc
        finally:
            del self._open[token]
        if not is_meant:
            raise NotConfirmed("called off: nothing was done")

    async def on_interaction(self, interaction: discord.Interaction[Any]) -> None:
        """Answer a press of one of these buttons; everything else is left alone. A listener of the bot's."""
        if interaction.type is not discord.InteractionType.component:
            return
        data: Any = interaction.data or {}
        found = _PRESSED.fullmatch(str(data.get("custom_id", "")))
        if found is None:
            return
        user_id, answered = self._open.get(found[1], (None, None))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if answered is None or answered.done():
                    await interaction.response.send_message(EXPIRED, ephemeral=True)
                elif interaction.user.id != user_id:
                    await interaction.response.send_message(OTHERS, ephemeral=True)
                else:
                    answered.set_result(found[2] == "yes")
                    await interaction.response.defer()
        except (discord.DiscordException, OSError, TimeoutError) as exc:
            _log.warning("a press of a button was not answered: %r", exc)


def _buttons(token: str, label: str) -> discord.ui.View:
    view = discord.ui.View(timeout=None)
    danger = discord.ButtonStyle.danger
    view.add_item(discord.ui.Button[Any](label=label, style=danger, custom_id=f"{_PREFIX}:{token}:yes"))
    view.add_item(discord.ui.Button[Any](label="Cancel", custom_id=f"{_PREFIX}:{token}:no"))
    view.stop()  # presses come to `on_interaction`: discord.py would drop those of questions that it has forgotten
    return view

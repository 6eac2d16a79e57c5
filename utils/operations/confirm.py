"""Asks for confirmation with buttons, which expire and which only the user who ran the command can press."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from typing import Any

import discord

from utils.exceptions import NotConfirmed

_log = logging.getLogger(__name__)

#: Seconds after which a question expires.
CONFIRM_TIMEOUT = 60.0
#: Seconds to respond to a pressed button. Discord expects a response within 3 seconds.
RESPONSE_TIMEOUT = 10.0

_PREFIX = "guildbook-confirm"
_CUSTOM_ID = re.compile(rf"{_PREFIX}:([0-9a-f]{{16}}):(yes|no)")

NOT_YOURS = "Only the user who ran the command can answer this."
EXPIRED = "This question has expired. Run the command again."


class Confirmations:
    """The open questions of one bot. `timeout` is in seconds and applies to questions asked after it is set.

    A button is recognised by its custom id alone, so one of an expired question, or from before a restart, gets a
    response too.
    """

    def __init__(self, *, timeout: float = CONFIRM_TIMEOUT) -> None:
        self.timeout: float = timeout
        self._open: dict[str, tuple[int, asyncio.Future[bool]]] = {}

    async def ask(self, interaction: discord.Interaction[Any], text: str, label: str) -> None:
        """Ask a question in the command's reply and return once the button named `label` was pressed.

        Raises `NotConfirmed` if the user cancels or does not answer in time.
        """
        token, timeout = secrets.token_hex(8), self.timeout
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._open[token] = interaction.user.id, answer
        try:
            async with asyncio.timeout(timeout):
                await interaction.edit_original_response(content=text, view=_buttons(token, label))
                is_confirmed = await answer
        except TimeoutError:
            raise NotConfirmed(f"Not confirmed within {timeout:g} s: nothing was done") from None
        except (discord.DiscordException, OSError) as exc:
            raise NotConfirmed(f"The question could not be shown, so nothing was done: {exc}") from exc
        finally:
            del self._open[token]
        if not is_confirmed:
            raise NotConfirmed("Cancelled: nothing was done")

    async def on_interaction(self, interaction: discord.Interaction[Any]) -> None:
        """Respond to a press of one of these buttons and ignore all other interactions. The bot's listener."""
        if interaction.type is not discord.InteractionType.component:
            return
        data: Any = interaction.data or {}
        match = _CUSTOM_ID.fullmatch(str(data.get("custom_id", "")))
        if match is None:
            return
        user_id, answer = self._open.get(match[1], (None, None))
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT):
                if answer is None or answer.done():
                    await interaction.response.send_message(EXPIRED, ephemeral=True)
                elif interaction.user.id != user_id:
                    await interaction.response.send_message(NOT_YOURS, ephemeral=True)
                else:
                    answer.set_result(match[2] == "yes")
                    await interaction.response.defer()
        except (discord.DiscordException, OSError, TimeoutError) as exc:
            _log.warning("could not respond to a pressed button: %r", exc)


def _buttons(token: str, label: str) -> discord.ui.View:
    view = discord.ui.View(timeout=None)
    danger = discord.ButtonStyle.danger
    view.add_item(discord.ui.Button[Any](label=label, style=danger, custom_id=f"{_PREFIX}:{token}:yes"))
    view.add_item(discord.ui.Button[Any](label="Cancel", custom_id=f"{_PREFIX}:{token}:no"))
    view.stop()  # `on_interaction` gets the presses: discord.py ignores those of views that it no longer knows
    return view

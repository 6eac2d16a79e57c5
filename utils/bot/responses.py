"""The first response to an interaction: given in time by itself, and still possible afterwards.

Discord shows a failure unless it gets a response within 3 seconds. `FirstResponse` defers before that; what the author
sends as a first response later then replaces the deferral.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import discord
from discord import app_commands

from utils.exceptions import GuildbookError

_Kind = discord.InteractionResponseType


class TooLate(GuildbookError):
    """Something that only a first response can do was asked for after the interaction had been deferred."""


class FollowUps(discord.Webhook):
    """The follow-up messages of an interaction."""

    __slots__ = ("first",)

    first: FirstResponse

    async def send(self, content: str = discord.utils.MISSING, **options: Any) -> Any:
        """Send a follow-up message; it is private if the author wanted the deferral to be."""
        if self.first.is_private:
            options["ephemeral"] = True
        message = await super().send(content, **options)
        self.first.is_answered = True
        return message


class FirstResponse(discord.InteractionResponse[Any]):
    """The first response to one interaction; `install` puts it in place of discord.py's."""

    __slots__ = ("_is_open", "_is_private_deferral", "_sending", "is_answered", "is_private")

    def __init__(self, interaction: discord.Interaction[Any]) -> None:
        super().__init__(interaction)
        #: Whether the user was shown something: a message, a form, choices, or a change of the message.
        self.is_answered: bool = False
        #: Whether every follow-up must be private, because the author deferred privately too late.
        self.is_private: bool = False
        self._sending = asyncio.Lock()
        #: Whether it was deferred by itself, and the author's first response is still to come.
        self._is_open = False
        self._is_private_deferral = False

    @classmethod
    def install(cls, interaction: discord.Interaction[Any]) -> FirstResponse:
        """Return the first response of an interaction that nobody has responded to yet."""
        interaction._cs_response = first = cls(interaction)  # type: ignore[attr-defined]
        data: Any = {"id": interaction.application_id, "type": 3, "token": interaction.token}
        interaction._cs_followup = follow_ups = FollowUps.from_state(data=data, state=interaction._state)  # type: ignore[attr-defined]
        follow_ups.first = first
        return first

    @property
    def is_open(self) -> bool:
        """Whether it was deferred by itself, and the author has not responded yet."""
        return self._is_open

    async def defer_in_time(self, *, ephemeral: bool) -> bool:
        """Defer unless there is a response, and return whether that was done. An autocomplete gets no choices.

        A component is deferred as an update of its message, which shows nothing.
        """
        async with self._sending:
            interaction = self._parent
            if self.is_done():
                return False
            if interaction.type is discord.InteractionType.autocomplete:
                await super().autocomplete([])
                self.is_answered = True
            else:
                thinking = interaction.type is not discord.InteractionType.component and interaction.message is None
                await super().defer(ephemeral=ephemeral, thinking=thinking)
                self._is_private_deferral = ephemeral
            self._is_open = True
            return True

    # --- what authors call

    async def defer(self, *, ephemeral: bool = False, thinking: bool = False) -> Any:
        """Defer; after a deferral by itself this only makes sure that the answer is private if it is to be."""
        async with self._sending:
            if not self._take_late():
                return await super().defer(ephemeral=ephemeral, thinking=thinking)
            if ephemeral and self.type is _Kind.deferred_channel_message and not self._is_private_deferral:
                await self._parent.delete_original_response()
            self.is_private = ephemeral
            return self._callback(None)

    async def send_message(
        self, content: Any = None, *, ephemeral: bool = False, delete_after: float | None = None, **options: Any
    ) -> Any:
        """Send a message; after a deferral by itself, as the follow-up that replaces it."""
        async with self._sending:
            if not self._take_late():
                response = await super().send_message(
                    content, ephemeral=ephemeral, delete_after=delete_after, **options
                )
                self.is_answered = True
                return response
            interaction = self._parent
            if self.type is _Kind.deferred_channel_message and ephemeral is not self._is_private_deferral:
                # The follow-up that replaces the deferral would be as private or public as that is.
                await interaction.delete_original_response()
            if content is not None:
                options["content"] = str(content)
            message = await interaction.followup.send(ephemeral=ephemeral, wait=True, **options)
            if delete_after is not None:
                await message.delete(delay=delete_after)
            return self._callback(message)

    async def edit_message(self, *, delete_after: float | None = None, **options: Any) -> Any:
        """Change the component's message; after a deferral by itself too."""
        async with self._sending:
            if not self._take_late():
                response = await super().edit_message(delete_after=delete_after, **options)
                self.is_answered = True
                return response
            options.pop("suppress_embeds", None)
            message = await self._parent.edit_original_response(**options)
            self.is_answered = True
            if delete_after is not None:
                await message.delete(delay=delete_after)
            return self._callback(message)

    async def send_modal(self, modal: Any, /) -> Any:
        """Open a form. Raises `TooLate` after a deferral by itself: only a first response can open one."""
        async with self._sending:
            if self._take_late():
                raise TooLate(
                    f"the form {getattr(modal, 'title', '')!r} cannot be opened any more: Discord takes it as the first"
                    " response within 3 seconds only; open it before anything slow"
                )
            response = await super().send_modal(modal)
            self.is_answered = True
            return response

    async def launch_activity(self) -> Any:
        """Launch the application's activity. Raises `TooLate` after a deferral by itself."""
        async with self._sending:
            if self._take_late():
                raise TooLate("an activity can only be launched as the first response, within 3 seconds")
            response = await super().launch_activity()
            self.is_answered = True
            return response

    async def autocomplete(self, choices: Sequence[app_commands.Choice[Any]]) -> None:
        """Suggest choices; after 2.5 seconds nobody waits for them any more."""
        async with self._sending:
            if not self._take_late():
                await super().autocomplete(choices)
                self.is_answered = True

    def _take_late(self) -> bool:
        """Return whether this is the author's first response after a deferral by itself; true only once."""
        is_late, self._is_open = self._is_open, False
        return is_late

    def _callback(self, message: Any) -> discord.InteractionCallbackResponse[Any]:
        """Return what discord.py returns for a first response."""
        interaction = self._parent
        about = {"id": str(interaction.id), "response_message_loading": message is None}
        if message is not None:
            about |= {"response_message_id": str(message.id), "response_message_ephemeral": message.flags.ephemeral}
        kind = self.type if message is None else _Kind.channel_message
        data: Any = {"interaction": about}
        response: discord.InteractionCallbackResponse[Any] = discord.InteractionCallbackResponse(
            data=data, parent=interaction, state=interaction._state, type=kind or _Kind.channel_message
        )
        response.resource = message
        return response

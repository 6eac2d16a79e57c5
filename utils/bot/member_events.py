"""`on_member_update`, `on_member_remove` and `on_user_update` from the mirror, for EVENTS_FROM_MIRROR=1."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import discord

from utils.bot.listeners import FROM_MIRROR
from utils.database import Pool
from utils.mirror.discord.people import build_member, build_user
from utils.mirror.write.live_events import LiveEvents, MemberChange, UserChange

if TYPE_CHECKING:
    from utils.bot.client import Guildbook


class MemberEvents:
    """Dispatches what changed members and users once it is committed, whether discord.py has them in memory or not.

    discord.py's own dispatch of these events is dropped. A join that follows a leave of the same member waits for it.
    """

    def __init__(self, bot: Guildbook, pool: Pool, dispatch: Callable[..., None]) -> None:
        """`dispatch` calls the listeners of an event, as `Client.dispatch` does."""
        self._bot = bot
        self._dispatch = dispatch
        self.live: LiveEvents = LiveEvents(
            pool,
            self._on_change,
            has_listeners=self._has_listeners,
            max_waiting=bot.settings.buffer_max_rows,
        )

    def intercept(self, event: str, *args: Any) -> bool:
        """Return whether an event of discord.py's must not be dispatched now; joins may be dispatched later."""
        if event in FROM_MIRROR:
            return True
        if event == "member_join" and args and isinstance(args[0], discord.Member):
            member = args[0]
            return self.live.defer(member.guild.id, member.id, partial(self._dispatch, event, *args))
        return False

    def _has_listeners(self) -> bool:
        bot = self._bot
        return any(
            bot.extra_events.get(f"on_{event}") or bot._listeners.get(event) or hasattr(bot, f"on_{event}")
            for event in FROM_MIRROR
        )

    def _on_change(self, change: MemberChange | UserChange) -> None:
        state = self._bot._connection
        if isinstance(change, UserChange):
            self._dispatch("user_update", build_user(state, change.before), build_user(state, change.after))
            return
        guild = self._bot.get_guild(change.guild_id)
        if guild is None:  # the bot has left it
            return
        user = build_user(state, change.user or {"id": change.user_id})
        before = build_member(guild, change.before, user)
        if change.after is None:
            self._dispatch("member_remove", before)
        else:
            self._dispatch("member_update", before, build_member(guild, change.after, user))

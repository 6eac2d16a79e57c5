"""Messages in guilds and direct messages, and what happens to them: edits, reactions, votes, pins, typing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .entities import Channel, Guild, Json, Thread
from .ids import iso
from .payloads import member_payload, user_payload
from .state import Intent, WorldState

_MENTION = re.compile(r"<@!?(\d+)>")
#: What Discord empties without the message content intent.
_CONTENT: Json = {"content": "", "attachments": [], "embeds": [], "components": []}


def direct_channel_id(user_id: int) -> int:
    """Return the id of the direct-message channel between the bot and a user; it is derived from the user's."""
    return user_id ^ 1 << 62


class MessageMutations(WorldState):
    """Messages and what happens to them, each with the gateway events Discord sends for it.

    The world keeps no messages: edits, deletions and reactions are given the ids. Where `guild_id` is None, the channel
    is that of direct messages with `user_id`.
    """

    def message(self, guild_id: int, channel_id: int, user_id: int, content: str, **fields: Any) -> int:
        """Send a message as a member and return its id; `fields` are further ones of the message object.

        Bots without the message content intent get the content only of their own messages and of those that mention
        them.
        """
        guild = self.guild(guild_id)
        place: Channel | Thread = guild.threads.get(channel_id) or self.channel(guild_id, channel_id)
        self.member(guild_id, user_id)
        self.tick()
        message_id = place.last_message_id = self.new_id()
        if isinstance(place, Thread):
            place.message_count += 1
        if self._emit_message("MESSAGE_CREATE", guild, channel_id, user_id, message_id, content, fields):
            self.ledger.record_message(message_id, guild_id, user_id)
        return message_id

    def direct_message(self, user_id: int, content: str, *, is_from_bot: bool = False, **fields: Any) -> int:
        """Send the bot a direct message as a user, or, with `is_from_bot`, the user one of the bot's; return its id."""
        self.tick()
        message_id, author = self.new_id(), self.user(self.bot.id if is_from_bot else user_id)
        payload = self._message(self.open_direct(user_id), author.id, message_id, content) | fields
        self.emit_direct("MESSAGE_CREATE", payload | {"channel_type": 1}, Intent.DIRECT_MESSAGES)
        return message_id

    def open_direct(self, user_id: int) -> int:
        """Open the channel of direct messages with a user, if it is not, and return its id."""
        channel_id = direct_channel_id(self.user(user_id).id)
        self.direct_channels[channel_id] = user_id
        return channel_id

    def edit_message(
        self, guild_id: int | None, channel_id: int, message_id: int, user_id: int, content: str, **fields: Any
    ) -> None:
        """Edit a message of a user."""
        fields = {"edited_timestamp": iso(self.tick()), **fields}
        if guild_id is not None:
            guild = self.guild(guild_id)
            self._emit_message("MESSAGE_UPDATE", guild, channel_id, user_id, message_id, content, fields)
        else:
            payload = self._message(channel_id, user_id, message_id, content) | fields
            self.emit_direct("MESSAGE_UPDATE", payload, Intent.DIRECT_MESSAGES)

    def delete_message(self, guild_id: int | None, channel_id: int, message_id: int) -> None:
        """Delete a message."""
        self.tick()
        payload = {"id": str(message_id), "channel_id": str(channel_id)}
        self._emit(guild_id, channel_id, "MESSAGE_DELETE", payload, Intent.GUILD_MESSAGES, Intent.DIRECT_MESSAGES)

    def delete_messages(self, guild_id: int, channel_id: int, message_ids: Sequence[int]) -> None:
        """Delete several messages of a guild at once."""
        self.tick()
        payload: Json = {"ids": [str(id) for id in message_ids], "channel_id": str(channel_id)}
        self._emit(guild_id, channel_id, "MESSAGE_DELETE_BULK", payload, Intent.GUILD_MESSAGES)

    def react(
        self, guild_id: int | None, channel_id: int, message_id: int, user_id: int, emoji: str = "👍", **fields: Any
    ) -> None:
        """Add a user's reaction with a Unicode emoji; `fields` such as `burst` are further ones of the event."""
        payload = self._reaction(channel_id, message_id, emoji) | {"user_id": str(user_id), "type": 0, "burst": False}
        if guild_id is not None:
            payload["member"] = member_payload(self.member(guild_id, user_id))
        self._emit_reaction(guild_id, channel_id, "MESSAGE_REACTION_ADD", payload | fields)

    def unreact(self, guild_id: int | None, channel_id: int, message_id: int, user_id: int, emoji: str = "👍") -> None:
        """Remove a user's reaction."""
        payload = self._reaction(channel_id, message_id, emoji) | {"user_id": str(user_id), "type": 0, "burst": False}
        self._emit_reaction(guild_id, channel_id, "MESSAGE_REACTION_REMOVE", payload)

    def clear_reactions(self, guild_id: int, channel_id: int, message_id: int, emoji: str | None = None) -> None:
        """Remove all reactions of a message, or those with one emoji."""
        payload = self._reaction(channel_id, message_id, emoji or "")
        if emoji is None:
            del payload["emoji"]
        kind = "MESSAGE_REACTION_REMOVE_ALL" if emoji is None else "MESSAGE_REACTION_REMOVE_EMOJI"
        self._emit_reaction(guild_id, channel_id, kind, payload)

    def vote(
        self,
        guild_id: int | None,
        channel_id: int,
        message_id: int,
        user_id: int,
        answer_id: int = 1,
        *,
        is_removed: bool = False,
    ) -> None:
        """Add or remove a user's vote in a poll."""
        self.tick()
        payload: Json = {"channel_id": str(channel_id), "message_id": str(message_id), "user_id": str(user_id)}
        kind = "MESSAGE_POLL_VOTE_REMOVE" if is_removed else "MESSAGE_POLL_VOTE_ADD"
        intents = Intent.GUILD_MESSAGE_POLLS, Intent.DIRECT_MESSAGE_POLLS
        self._emit(guild_id, channel_id, kind, payload | {"answer_id": answer_id}, *intents)

    def start_typing(self, guild_id: int | None, channel_id: int, user_id: int) -> None:
        """Show that a user is typing."""
        seconds = self.tick() // 1_000_000
        payload: Json = {"channel_id": str(channel_id), "user_id": str(user_id), "timestamp": seconds}
        if guild_id is not None:
            payload["member"] = member_payload(self.member(guild_id, user_id))
        intents = Intent.GUILD_MESSAGE_TYPING, Intent.DIRECT_MESSAGE_TYPING
        self._emit(guild_id, channel_id, "TYPING_START", payload, *intents)

    def pin(self, guild_id: int | None, channel_id: int) -> None:
        """Pin a message of a channel."""
        payload: Json = {"channel_id": str(channel_id), "last_pin_timestamp": iso(self.tick())}
        self._emit(guild_id, channel_id, "CHANNEL_PINS_UPDATE", payload, Intent.GUILDS, Intent.DIRECT_MESSAGES)

    def _emit_message(
        self, name: str, guild: Guild, channel_id: int, user_id: int, message_id: int, content: str, fields: Json
    ) -> bool:
        if not guild.sees(channel_id):
            return False
        payload = self._message(channel_id, user_id, message_id, content, guild) | fields
        is_for_bot = user_id == self.bot.id or self.bot.id in _mentioned(content)
        redacted = None if is_for_bot else {key: value for key, value in (payload | _CONTENT).items() if key != "poll"}
        return self.emit(name, guild, payload, Intent.GUILD_MESSAGES, redacted=redacted)

    def _message(
        self, channel_id: int, user_id: int, message_id: int, content: str, guild: Guild | None = None
    ) -> Json:
        author = self.user(user_id)
        payload: Json = {"id": str(message_id), "channel_id": str(channel_id), "type": 0}
        payload |= {"author": user_payload(author), "content": content, "timestamp": iso(self.now_us)}
        payload |= {"edited_timestamp": None, "tts": False, "mention_everyone": False, "mention_roles": []}
        payload |= {"attachments": [], "embeds": [], "components": [], "pinned": False, "flags": 0, "nonce": None}
        mentioned = [self.users[id] for id in _mentioned(content) if id in self.users]
        payload["mentions"] = [user_payload(user) for user in mentioned]
        if guild is None:
            return payload
        payload["guild_id"] = str(guild.id)
        if user_id in guild.members:
            payload["member"] = _partial_member(guild, user_id)
        for user, shown in zip(mentioned, payload["mentions"], strict=True):
            if user.id in guild.members:
                shown["member"] = _partial_member(guild, user.id)
        return payload

    def _reaction(self, channel_id: int, message_id: int, emoji: str) -> Json:
        self.tick()
        shown = {"id": None, "name": emoji}
        return {"channel_id": str(channel_id), "message_id": str(message_id), "emoji": shown}

    def _emit_reaction(self, guild_id: int | None, channel_id: int, name: str, payload: Json) -> None:
        intents = Intent.GUILD_MESSAGE_REACTIONS, Intent.DIRECT_MESSAGE_REACTIONS
        self._emit(guild_id, channel_id, name, payload, *intents)

    def _emit(
        self, guild_id: int | None, channel_id: int, name: str, payload: Json, intent: int, direct_intent: int = 0
    ) -> None:
        """Emit an event of a channel, if the bot can view it, or of direct messages."""
        if guild_id is None:
            self.emit_direct(name, payload, direct_intent)
        elif (guild := self.guild(guild_id)).sees(channel_id):
            self.emit(name, guild, payload | {"guild_id": str(guild_id)}, intent)


def _mentioned(content: str) -> list[int]:
    return [int(id) for id in dict.fromkeys(_MENTION.findall(content))]


def _partial_member(guild: Guild, user_id: int) -> Json:
    member = member_payload(guild.members[user_id])
    del member["user"]
    return member

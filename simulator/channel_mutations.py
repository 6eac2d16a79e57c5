"""Mutations of channels and threads."""

from __future__ import annotations

from typing import Any

from .entities import ChannelType, Guild, Json, Thread
from .guild_mutations import reject_unknown_fields
from .payloads import (
    channel_payload,
    guild_payload,
    thread_member_payload,
    thread_payload,
)
from .populate import draw_channel, draw_thread
from .state import WorldState

_CHANNEL_FIELDS = frozenset(
    [
        "name",
        "type",
        "position",
        "parent_id",
        "topic",
        "nsfw",
        "slowmode",
        "permission_overwrites",
        "bitrate",
        "user_limit",
        "rtc_region",
        "default_auto_archive_duration",
        "flags",
        "available_tags",
    ]
)
_THREAD_FIELDS = frozenset(
    ["name", "locked", "invitable", "auto_archive_duration", "slowmode", "flags", "applied_tags", "owner_id", "joined"]
)
_CHANNEL_SETTINGS = ("afk_channel_id", "system_channel_id", "rules_channel_id", "public_updates_channel_id")


class ChannelMutations(WorldState):
    """Changes to channels and threads, each with the gateway events Discord sends for it."""

    def create_channel(
        self, guild_id: int, name: str | None = None, type: int = ChannelType.TEXT, **fields: Any
    ) -> int:
        """Create a channel and return its id; settings not given are random."""
        reject_unknown_fields("channel", fields, _CHANNEL_FIELDS)
        guild = self.guild(guild_id)
        self.tick()
        channel = draw_channel(self.rng, guild, self.new_id(), type, len(guild.channels))
        for field, value in {**fields, "name": channel.name if name is None else name}.items():
            setattr(channel, field, value)
        guild.channels[channel.id] = channel
        self.emit("CHANNEL_CREATE", guild, channel_payload(channel))
        return channel.id

    def update_channel(self, guild_id: int, channel_id: int, **fields: Any) -> None:
        """Update a channel; for a hidden one, an event is sent only if position or type changes."""
        reject_unknown_fields("channel", fields, _CHANNEL_FIELDS)
        guild, channel = self.guild(guild_id), self.channel(guild_id, channel_id)
        self.tick()
        before = (channel.position, channel.type)
        for name, value in fields.items():
            setattr(channel, name, value)
        if not channel.hidden or before != (channel.position, channel.type):
            self.emit("CHANNEL_UPDATE", guild, channel_payload(channel))

    def delete_channel(self, guild_id: int, channel_id: int) -> None:
        """Delete a channel, its threads (without events), and references from child channels and guild settings."""
        guild, channel = self.guild(guild_id), self.channel(guild_id, channel_id)
        self.tick()
        payload = channel_payload(channel)
        del guild.channels[channel_id]
        guild.threads = {key: thread for key, thread in guild.threads.items() if thread.parent_id != channel_id}
        guild.voice = {user: place for user, place in guild.voice.items() if place != channel_id}
        self.emit("CHANNEL_DELETE", guild, payload)
        for child in guild.channels.values():
            if child.parent_id == channel_id:
                child.parent_id = None
                if not child.hidden:
                    self.emit("CHANNEL_UPDATE", guild, channel_payload(child))
        references = [name for name in _CHANNEL_SETTINGS if getattr(guild, name) == channel_id]
        for name in references:
            setattr(guild, name, None)
        if references:
            self.emit("GUILD_UPDATE", guild, guild_payload(guild))

    def hide_channel(self, guild_id: int, channel_id: int) -> None:
        """Hide a channel from the bot: CHANNEL_UPDATE with the obfuscated channel."""
        guild, channel = self.guild(guild_id), self.channel(guild_id, channel_id)
        if channel.hidden:
            return
        self.tick()
        channel.hidden = True
        self.emit("CHANNEL_UPDATE", guild, channel_payload(channel))

    def reveal_channel(self, guild_id: int, channel_id: int) -> None:
        """Make a channel visible to the bot: CHANNEL_UPDATE in full, then THREAD_LIST_SYNC with its active threads."""
        guild, channel = self.guild(guild_id), self.channel(guild_id, channel_id)
        if not channel.hidden:
            return
        self.tick()
        channel.hidden = False
        self.emit("CHANNEL_UPDATE", guild, channel_payload(channel))
        active = [
            t for t in guild.threads.values() if t.parent_id == channel_id and not t.archived and guild.sees(t.id)
        ]
        threads = [thread_payload(thread, self.bot.id) for thread in active]
        # https://docs.discord.com/developers/topics/threads#gaining-access-to-channels
        sync: Json = {"guild_id": str(guild_id), "channel_ids": [str(channel_id)], "threads": threads}
        sync["members"] = [payload["member"] for payload in threads if "member" in payload]
        self.emit("THREAD_LIST_SYNC", guild, sync)

    def create_thread(self, guild_id: int, channel_id: int, name: str | None = None, **fields: Any) -> int:
        """Create a thread in a channel and return its id."""
        reject_unknown_fields("thread", fields, _THREAD_FIELDS)
        guild, channel = self.guild(guild_id), self.channel(guild_id, channel_id)
        now = self.tick()
        thread = draw_thread(self.rng, channel, self.new_id(), guild.owner_id, now)
        for field, value in {**fields, "name": thread.name if name is None else name}.items():
            setattr(thread, field, value)
        guild.threads[thread.id] = thread
        self._thread_event("THREAD_CREATE", guild, thread, {"newly_created": True})
        return thread.id

    def update_thread(self, guild_id: int, thread_id: int, **fields: Any) -> None:
        """Update a thread."""
        reject_unknown_fields("thread", fields, _THREAD_FIELDS)
        guild, thread = self.guild(guild_id), self.thread(guild_id, thread_id)
        now = self.tick()
        for name, value in fields.items():
            setattr(thread, name, value)
        if "auto_archive_duration" in fields:
            thread.archive_timestamp = now
        self._thread_event("THREAD_UPDATE", guild, thread)

    def archive_thread(
        self, guild_id: int, thread_id: int, *, archived: bool = True, locked: bool | None = None
    ) -> None:
        """Archive a thread or, with `archived=False`, unarchive it; archiving unpins a forum post."""
        guild, thread = self.guild(guild_id), self.thread(guild_id, thread_id)
        thread.archive_timestamp = self.tick()
        thread.archived = archived
        if locked is not None:
            thread.locked = locked
        if archived:
            thread.flags &= ~(1 << 1)
        self._thread_event("THREAD_UPDATE", guild, thread)
        if thread.joined and not archived and guild.sees(thread_id):
            # https://docs.discord.com/developers/topics/threads#unarchiving-a-thread
            joined = thread_member_payload(thread, self.bot.id) | {"guild_id": str(guild_id)}
            self.emit("THREAD_MEMBER_UPDATE", guild, joined)

    def delete_thread(self, guild_id: int, thread_id: int) -> None:
        """Delete a thread."""
        guild, thread = self.guild(guild_id), self.thread(guild_id, thread_id)
        self.tick()
        seen = guild.sees(thread_id)
        del guild.threads[thread_id]
        if seen:
            ids = {"id": str(thread_id), "guild_id": str(guild_id), "parent_id": str(thread.parent_id)}
            self.emit("THREAD_DELETE", guild, ids | {"type": thread.type})

    def _thread_event(self, name: str, guild: Guild, thread: Thread, extra: Json | None = None) -> None:
        if guild.sees(thread.id):
            self.emit(name, guild, thread_payload(thread, self.bot.id) | (extra or {}))

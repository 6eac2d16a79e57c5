"""What happens in a guild besides messages: presences, voice, invites, expressions, events, automod, integrations.

Of all this the world keeps only who is in which voice channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .entities import Guild, Json
from .ids import iso
from .payloads import member_payload, user_payload
from .state import Intent, WorldState

Change = Literal["CREATE", "UPDATE", "DELETE"]
_DAY_US = 86_400 * 1_000_000


class ActivityMutations(WorldState):
    """Further changes in a guild, each with the gateway events Discord sends for it.

    `fields` are added to the object that an event contains. Where `id` is None, a new object is created; its id is
    returned.
    """

    def set_presence(self, user_id: int, status: str = "online", **fields: Any) -> None:
        """Change a user's status: one event in each guild that the bot shares with the user."""
        self.tick()
        for guild_id in self.user(user_id).guild_ids:
            payload: Json = {"user": {"id": str(user_id)}, "guild_id": str(guild_id), "status": status}
            payload |= {"activities": [], "client_status": {} if status == "offline" else {"desktop": status}}
            self.emit("PRESENCE_UPDATE", self.guild(guild_id), payload | fields, Intent.GUILD_PRESENCES)

    def set_voice(self, guild_id: int, user_id: int, channel_id: int | None, **fields: Any) -> None:
        """Move a member into a voice channel, or, with None, out of voice."""
        guild, member = self.guild(guild_id), self.member(guild_id, user_id)
        self.tick()
        if channel_id is None:
            guild.voice.pop(user_id, None)
        else:
            guild.voice[user_id] = self.channel(guild_id, channel_id).id
        payload: Json = {"guild_id": str(guild_id), "channel_id": None if channel_id is None else str(channel_id)}
        payload |= {"user_id": str(user_id), "session_id": f"{user_id:x}", "member": member_payload(member)}
        payload |= dict.fromkeys(("deaf", "mute", "self_deaf", "self_mute", "self_video", "suppress"), False)
        payload["request_to_speak_timestamp"] = None
        self.emit("VOICE_STATE_UPDATE", guild, payload | fields, Intent.GUILD_VOICE_STATES)

    def send_voice_effect(self, guild_id: int, channel_id: int, user_id: int, emoji: str = "👍") -> None:
        """Play an emoji in a voice channel."""
        self.tick()
        payload: Json = {"channel_id": str(channel_id), "guild_id": str(guild_id), "user_id": str(user_id)}
        payload |= {"emoji": {"id": None, "name": emoji}, "animation_type": 0, "animation_id": 1}
        self.emit("VOICE_CHANNEL_EFFECT_SEND", self.guild(guild_id), payload, Intent.GUILD_VOICE_STATES)

    def create_invite(self, guild_id: int, channel_id: int, code: str = "abcdef", **fields: Any) -> None:
        """Create an invite."""
        now = self.tick()
        payload: Json = {"guild_id": str(guild_id), "channel_id": str(channel_id), "code": code, "type": 0}
        payload |= {"created_at": iso(now), "max_age": 86_400, "max_uses": 0, "temporary": False, "uses": 0}
        payload |= {"expires_at": iso(now + _DAY_US), "inviter": user_payload(self.user(self.guild(guild_id).owner_id))}
        self.emit("INVITE_CREATE", self.guild(guild_id), payload | fields, Intent.GUILD_INVITES)

    def delete_invite(self, guild_id: int, channel_id: int, code: str = "abcdef") -> None:
        """Delete an invite."""
        self.tick()
        payload = {"guild_id": str(guild_id), "channel_id": str(channel_id), "code": code}
        self.emit("INVITE_DELETE", self.guild(guild_id), payload, Intent.GUILD_INVITES)

    def set_emojis(self, guild_id: int, *names: str) -> None:
        """Replace the guild's emojis."""
        self.tick()
        emojis = [
            {"id": str(self.new_id()), "name": name, "roles": [], "require_colons": True}
            | {"managed": False, "animated": False, "available": True}
            for name in names
        ]
        payload: Json = {"guild_id": str(guild_id), "emojis": emojis}
        self.emit("GUILD_EMOJIS_UPDATE", self.guild(guild_id), payload, Intent.GUILD_EXPRESSIONS)

    def set_stickers(self, guild_id: int, *names: str) -> None:
        """Replace the guild's stickers."""
        self.tick()
        stickers = [
            {"id": str(self.new_id()), "name": name, "description": None, "tags": "", "type": 2}
            | {"format_type": 1, "available": True, "guild_id": str(guild_id)}
            for name in names
        ]
        payload: Json = {"guild_id": str(guild_id), "stickers": stickers}
        self.emit("GUILD_STICKERS_UPDATE", self.guild(guild_id), payload, Intent.GUILD_EXPRESSIONS)

    def change_sound(self, guild_id: int, change: Change, id: int | None = None, **fields: Any) -> int:
        """Create, update or delete a sound of the soundboard."""
        self.tick()
        sound_id = id or self.new_id()
        payload: Json = {"guild_id": str(guild_id), "sound_id": str(sound_id)}
        if change != "DELETE":
            payload |= {"name": "horn", "volume": 1.0, "emoji_id": None, "emoji_name": None, "available": True}
        event = f"GUILD_SOUNDBOARD_SOUND_{change}"
        self.emit(event, self.guild(guild_id), payload | fields, Intent.GUILD_EXPRESSIONS)
        return sound_id

    def change_event(self, guild_id: int, change: Change, id: int | None = None, **fields: Any) -> int:
        """Create, update or delete a scheduled event."""
        now = self.tick()
        event_id = id or self.new_id()
        payload: Json = {"id": str(event_id), "guild_id": str(guild_id), "channel_id": None, "name": "Meeting"}
        payload |= {"creator_id": str(self.guild(guild_id).owner_id), "description": None, "privacy_level": 2}
        payload |= {"scheduled_start_time": iso(now + _DAY_US), "scheduled_end_time": iso(now + 2 * _DAY_US)}
        payload |= {"status": 1, "entity_type": 3, "entity_id": None, "entity_metadata": {"location": "here"}}
        payload |= {"user_count": 0, "image": None, "recurrence_rule": None}
        event = f"GUILD_SCHEDULED_EVENT_{change}"
        self.emit(event, self.guild(guild_id), payload | fields, Intent.GUILD_SCHEDULED_EVENTS)
        return event_id

    def subscribe(self, guild_id: int, event_id: int, user_id: int, *, is_removed: bool = False) -> None:
        """Add or remove a user's interest in a scheduled event."""
        self.tick()
        payload = {"guild_scheduled_event_id": str(event_id), "user_id": str(user_id), "guild_id": str(guild_id)}
        event = f"GUILD_SCHEDULED_EVENT_USER_{'REMOVE' if is_removed else 'ADD'}"
        self.emit(event, self.guild(guild_id), payload, Intent.GUILD_SCHEDULED_EVENTS)

    def change_stage(self, guild_id: int, channel_id: int, change: Change, id: int | None = None) -> int:
        """Start, update or end a stage."""
        self.tick()
        stage_id = id or self.new_id()
        payload: Json = {"id": str(stage_id), "guild_id": str(guild_id), "channel_id": str(channel_id)}
        payload |= {"topic": "Talk", "privacy_level": 2, "discoverable_disabled": True}
        self.emit(f"STAGE_INSTANCE_{change}", self.guild(guild_id), payload | {"guild_scheduled_event_id": None})
        return stage_id

    def change_rule(self, guild_id: int, change: Change, id: int | None = None, **fields: Any) -> int:
        """Create, update or delete a rule of automod."""
        self.tick()
        guild = self.guild(guild_id)
        rule_id = id or self.new_id()
        intent = Intent.AUTO_MODERATION_CONFIGURATION
        self.emit(f"AUTO_MODERATION_RULE_{change}", guild, self._rule(guild, rule_id) | fields, intent)
        return rule_id

    def execute_rule(self, guild_id: int, channel_id: int, user_id: int, rule_id: int, content: str = "") -> None:
        """Let a rule of automod block a message."""
        self.tick()
        payload: Json = {"guild_id": str(guild_id), "action": {"type": 1, "metadata": {}}, "rule_id": str(rule_id)}
        payload |= {"rule_trigger_type": 1, "user_id": str(user_id), "channel_id": str(channel_id)}
        payload |= {"content": content, "matched_keyword": "bad", "matched_content": content}
        guild, intent = self.guild(guild_id), Intent.AUTO_MODERATION_EXECUTION
        redacted = payload | {"content": "", "matched_content": ""}
        self.emit("AUTO_MODERATION_ACTION_EXECUTION", guild, payload, intent, redacted=redacted)

    def change_webhooks(self, guild_id: int, channel_id: int) -> None:
        """Change a webhook of a channel."""
        self.tick()
        payload = {"guild_id": str(guild_id), "channel_id": str(channel_id)}
        self.emit("WEBHOOKS_UPDATE", self.guild(guild_id), payload, Intent.GUILD_WEBHOOKS)

    def change_integration(self, guild_id: int, change: Change, id: int | None = None, **fields: Any) -> int:
        """Add, update or remove an integration, here a bot; GUILD_INTEGRATIONS_UPDATE follows."""
        self.tick()
        guild, integration_id = self.guild(guild_id), id or self.new_id()
        payload: Json = {"id": str(integration_id), "guild_id": str(guild_id)}
        if change == "DELETE":
            payload["application_id"] = str(self.application_id)
        else:
            account = {"id": str(self.application_id), "name": "Bot"}
            application = account | {"icon": None, "description": "", "summary": ""}
            payload |= {"name": "Bot", "type": "discord", "enabled": True, "account": account}
            payload |= {"application": application, "user": user_payload(self.user(guild.owner_id)), "scopes": ["bot"]}
        self.emit(f"INTEGRATION_{change}", guild, payload | fields, Intent.GUILD_INTEGRATIONS)
        self.emit("GUILD_INTEGRATIONS_UPDATE", guild, {"guild_id": str(guild_id)}, Intent.GUILD_INTEGRATIONS)
        return integration_id

    def log_audit(self, guild_id: int, user_id: int, action: int, target_id: int | None = None, **fields: Any) -> int:
        """Write an entry of the audit log; `action` is Discord's number of it."""
        self.tick()
        entry_id = self.new_id()
        payload: Json = {"id": str(entry_id), "guild_id": str(guild_id), "user_id": str(user_id), "action_type": action}
        payload |= {"target_id": None if target_id is None else str(target_id), "changes": []}
        guild = self.guild(guild_id)
        self.emit("GUILD_AUDIT_LOG_ENTRY_CREATE", guild, payload | fields, Intent.GUILD_MODERATION)
        return entry_id

    def change_thread_members(
        self, guild_id: int, thread_id: int, *, added: Sequence[int] = (), removed: Sequence[int] = ()
    ) -> None:
        """Add users to a thread or remove them."""
        now = self.tick()
        joined = [{"id": str(thread_id), "user_id": str(id), "join_timestamp": iso(now), "flags": 0} for id in added]
        payload: Json = {"id": str(thread_id), "guild_id": str(guild_id), "member_count": len(joined) + 1}
        payload |= {"added_members": joined, "removed_member_ids": [str(id) for id in removed]}
        if self.guild(guild_id).sees(thread_id):
            self.emit("THREAD_MEMBERS_UPDATE", self.guild(guild_id), payload, Intent.GUILD_MEMBERS)

    def _rule(self, guild: Guild, rule_id: int) -> Json:
        rule: Json = {"id": str(rule_id), "guild_id": str(guild.id), "name": "No bad words", "event_type": 1}
        rule |= {"creator_id": str(guild.owner_id), "trigger_type": 1, "enabled": True}
        rule |= {"trigger_metadata": {"keyword_filter": ["bad"], "regex_patterns": [], "allow_list": []}}
        return rule | {"actions": [{"type": 1, "metadata": {}}], "exempt_roles": [], "exempt_channels": []}

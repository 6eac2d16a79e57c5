"""Mutations of guilds, roles and the bot's membership."""

from __future__ import annotations

from typing import Any

from .entities import GUILD_SETTINGS, Guild, Role
from .payloads import guild_payload, role_payload, to_bytes
from .populate import draw_member
from .state import Emission, Intent, UnknownEntity, WorldState

LARGE_THRESHOLD = 250
_ROLE_FIELDS = frozenset(
    [
        "name",
        "color",
        "hoist",
        "icon",
        "unicode_emoji",
        "position",
        "permissions",
        "managed",
        "mentionable",
        "tags",
        "flags",
    ]
)


def reject_unknown_fields(kind: str, given: dict[str, Any], known: frozenset[str]) -> None:
    """Raise TypeError for fields that an object of this kind does not have."""
    unknown = sorted(given.keys() - known)
    if unknown:
        raise TypeError(f"a {kind} has no field {', '.join(unknown)}: choose from {', '.join(sorted(known))}")


class GuildMutations(WorldState):
    """Changes to guilds and roles, each with the gateway events Discord sends for it."""

    def update_guild(self, guild_id: int, **fields: Any) -> None:
        """Update guild settings (GUILD_UPDATE)."""
        reject_unknown_fields("guild", fields, GUILD_SETTINGS)
        guild = self.guild(guild_id)
        self.tick()
        for name, value in fields.items():
            setattr(guild, name, value)
        self.emit("GUILD_UPDATE", guild, guild_payload(guild))

    def create_role(self, guild_id: int, name: str = "new role", **fields: Any) -> int:
        """Create a role and return its id."""
        reject_unknown_fields("role", fields, _ROLE_FIELDS)
        guild = self.guild(guild_id)
        self.tick()
        role = Role(self.new_id(), name, **fields)
        guild.roles[role.id] = role
        self.emit("GUILD_ROLE_CREATE", guild, {"guild_id": str(guild_id), "role": role_payload(role)})
        return role.id

    def update_role(self, guild_id: int, role_id: int, **fields: Any) -> None:
        """Update a role."""
        reject_unknown_fields("role", fields, _ROLE_FIELDS)
        guild, role = self.guild(guild_id), self._role(guild_id, role_id)
        self.tick()
        for name, value in fields.items():
            setattr(role, name, value)
        self.emit("GUILD_ROLE_UPDATE", guild, {"guild_id": str(guild_id), "role": role_payload(role)})

    def grant(self, guild_id: int, permissions: int) -> None:
        """Grant the bot exactly these permissions in a guild: @everyone gets them, and the bot's other roles none."""
        roles = self.member(guild_id, self.bot.id).roles
        for role_id in roles:
            self.update_role(guild_id, role_id, permissions=0)
        self.update_role(guild_id, guild_id, permissions=int(permissions))

    def delete_role(self, guild_id: int, role_id: int) -> None:
        """Delete a role and remove it from its members, for which Discord sends no events."""
        guild = self.guild(guild_id)
        self._role(guild_id, role_id)
        if role_id == guild_id:
            raise ValueError("@everyone cannot be deleted")
        self.tick()
        del guild.roles[role_id]
        for member in guild.members.values():
            if role_id in member.roles:
                member.roles = tuple(r for r in member.roles if r != role_id)
                member.rendered = None
        self.emit("GUILD_ROLE_DELETE", guild, {"guild_id": str(guild_id), "role_id": str(role_id)})

    def guild_outage(self, guild_id: int) -> None:
        """Make a guild unavailable: it sends no events, but it can still change."""
        guild = self.guild(guild_id)
        if not guild.available:
            return
        self.tick()
        guild.available = False
        self._emit_guild(guild, "GUILD_DELETE", {"id": str(guild_id), "unavailable": True})

    def guild_restore(self, guild_id: int) -> None:
        """End an outage: GUILD_CREATE with the guild's current state."""
        guild = self.guild(guild_id)
        if guild.available:
            return
        self.tick()
        guild.available = True
        guild.large = len(guild.members) > LARGE_THRESHOLD
        self._emit_guild(guild, "GUILD_CREATE", {})

    def remove_bot(self, guild_id: int) -> None:
        """Remove the bot from a guild: GUILD_DELETE without `unavailable`."""
        guild = self.guild(guild_id)
        if not guild.present:
            raise ValueError(f"the bot is not in guild {guild_id}")
        self.tick()
        guild.pop_member(self.bot.id)
        self.bot.guild_ids.remove(guild_id)
        self._emit_guild(guild, "GUILD_DELETE", {"id": str(guild_id)})
        guild.present = False

    def add_bot_back(self, guild_id: int) -> None:
        """Add the bot to a guild again, as a newly joined guild."""
        guild = self.guild(guild_id)
        if guild.present:
            raise ValueError(f"the bot is already in guild {guild_id}")
        guild.joined_at = self.tick()
        guild.present = guild.available = True
        self.add_bot_member(guild)
        guild.large = len(guild.members) > LARGE_THRESHOLD
        self._emit_guild(guild, "GUILD_CREATE", {}, newly_joined=True)

    def add_bot_member(self, guild: Guild) -> None:
        """Make the bot a member of a guild, with its managed role if there is one."""
        guild.bot_id = self.bot.id
        own = tuple(r.id for r in guild.roles.values() if r.tags and r.tags.get("bot_id") == str(self.bot.id))
        member = draw_member(self.rng, self.bot, guild.id, [own], self.now_us, self.now_us)
        member.nick, member.joined_at, member.flags, member.pending = None, guild.joined_at, 0, False
        member.premium_since = member.timed_out_until = None
        self.bot.guild_ids.append(guild.id)
        guild.add_member(member)

    def _role(self, guild_id: int, role_id: int) -> Role:
        try:
            return self.guild(guild_id).roles[role_id]
        except KeyError:
            raise UnknownEntity(f"guild {guild_id} has no role {role_id}") from None

    def _emit_guild(self, guild: Guild, name: str, payload: dict[str, Any], *, newly_joined: bool = False) -> None:
        if guild.present:
            body = to_bytes(payload)
            self.publish(Emission(name, guild.id, body, int(Intent.GUILDS), newly_joined=newly_joined))

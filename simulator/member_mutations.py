"""Mutations of users and members: joins, leaves, bans, renames, member updates."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from .entities import Guild, Json, Member, Permission, User
from .ids import iso, to_micros
from .payloads import member_payload, own_user_payload, user_payload
from .populate import draw_member, draw_user
from .state import Intent, UnknownEntity, WorldState


class Unset:
    """The type of `UNSET`, the mark of an argument that was not given."""

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()


class MemberMutations(WorldState):
    """Changes to users and members, each with the gateway events Discord sends for it."""

    def join(self, guild_id: int, user_id: int | None = None) -> int:
        """Add a user, or a new account if no id is given, to a guild; return the user's id."""
        guild = self.guild(guild_id)
        now = self.tick()
        if user_id is None:
            user = draw_user(self.rng, self.new_user_id())
            self._register_user(user)
        else:
            user = self.users.get(user_id) or draw_user(self.rng, user_id)
            self._register_user(user)
        if user.id in guild.members:
            raise ValueError(f"user {user.id} is already a member of guild {guild_id}")
        guild.bans.discard(user.id)
        member = draw_member(self.rng, user, guild.id, [()], now, now)
        member.joined_at, member.premium_since, member.timed_out_until, member.nick = now, None, None, None
        user.guild_ids.append(guild.id)
        guild.add_member(member)
        payload = member_payload(member) | {"guild_id": str(guild.id)}
        if self.emit("GUILD_MEMBER_ADD", guild, payload, Intent.GUILD_MEMBERS):
            self.ledger.record_member_event(guild.id, user.id, "join", now)
        return user.id

    def leave(self, guild_id: int, user_id: int) -> None:
        """Remove a member who leaves."""
        guild = self.guild(guild_id)
        if user_id == self.bot.id:
            raise ValueError("use remove_bot() to remove the bot")
        self.member(guild_id, user_id)
        self.tick()
        self._remove(guild, user_id)

    def ban(self, guild_id: int, user_id: int) -> None:
        """Ban a user, member or not; GUILD_BAN_ADD precedes GUILD_MEMBER_REMOVE."""
        guild, user = self.guild(guild_id), self.user(user_id)
        if user_id == self.bot.id:
            raise ValueError("use remove_bot() to remove the bot")
        self.tick()
        guild.bans.add(user_id)
        self._emit_ban("GUILD_BAN_ADD", guild, user, "ban")
        if user_id in guild.members:
            self._remove(guild, user_id)

    def unban(self, guild_id: int, user_id: int) -> None:
        """Remove a ban."""
        guild, user = self.guild(guild_id), self.user(user_id)
        if user_id not in guild.bans:
            raise UnknownEntity(f"user {user_id} is not banned from guild {guild_id}")
        self.tick()
        guild.bans.discard(user_id)
        self._emit_ban("GUILD_BAN_REMOVE", guild, user, "unban")

    def rename_user(
        self,
        user_id: int,
        *,
        username: str | Unset = UNSET,
        global_name: str | Unset | None = UNSET,
        avatar: str | Unset | None = UNSET,
        public_flags: int | Unset = UNSET,
    ) -> None:
        """Update a user: the bot gets GUILD_MEMBER_UPDATE in each shared guild."""
        user = self.user(user_id)
        if user is self.bot:
            self.update_own_user(username=username, avatar=avatar)
            return
        self.tick()
        self._change_user(user, username=username, global_name=global_name, avatar=avatar, public_flags=public_flags)
        for guild_id in user.guild_ids:
            self._member_update(self.guilds[guild_id], self.guilds[guild_id].members[user_id])

    def update_own_user(self, *, username: str | Unset = UNSET, avatar: str | Unset | None = UNSET) -> None:
        """Update the bot's own account (USER_UPDATE)."""
        self.tick()
        self._change_user(self.bot, username=username, avatar=avatar)
        self.emit("USER_UPDATE", None, own_user_payload(self.bot), 0)

    def update_member(
        self,
        guild_id: int,
        user_id: int,
        *,
        nick: str | Unset | None = UNSET,
        avatar: str | Unset | None = UNSET,
        roles: Iterable[int] | Unset = UNSET,
        timed_out_until: datetime | Unset | None = UNSET,
        premium_since: datetime | Unset | None = UNSET,
        pending: bool | Unset = UNSET,
        flags: int | Unset = UNSET,
    ) -> None:
        """Update a member; fields not given are unchanged."""
        guild, member = self.guild(guild_id), self.member(guild_id, user_id)
        self.tick()
        if not isinstance(nick, Unset):
            member.nick = nick
        if not isinstance(avatar, Unset):
            member.avatar = avatar
        if not isinstance(roles, Unset):
            member.roles = self._known_roles(guild, roles)
        if not isinstance(timed_out_until, Unset):
            member.timed_out_until = None if timed_out_until is None else to_micros(timed_out_until)
        if not isinstance(premium_since, Unset):
            member.premium_since = None if premium_since is None else to_micros(premium_since)
        if not isinstance(pending, Unset):
            member.pending = pending
        if not isinstance(flags, Unset):
            member.flags = flags
        member.rendered = None
        changed = {"nick": not isinstance(nick, Unset), "pending": not isinstance(pending, Unset)}
        self._member_update(guild, member, changed)

    def _emit_ban(self, name: str, guild: Guild, user: User, kind: str) -> None:
        # https://docs.discord.com/developers/events/gateway-events#guild-ban-add
        if not guild.granted() & (Permission.BAN_MEMBERS | Permission.VIEW_AUDIT_LOG):
            return
        payload = {"guild_id": str(guild.id), "user": user_payload(user)}
        if self.emit(name, guild, payload, Intent.GUILD_MODERATION):
            self.ledger.record_member_event(guild.id, user.id, kind)

    def _known_roles(self, guild: Guild, roles: Iterable[int]) -> tuple[int, ...]:
        role_ids = tuple(dict.fromkeys(roles))
        for role_id in role_ids:
            if role_id not in guild.roles or role_id == guild.id:
                raise UnknownEntity(f"guild {guild.id} has no role {role_id} that can be assigned")
        return role_ids

    def _register_user(self, user: User) -> None:
        if user.id not in self.users:
            self.users[user.id] = user
            self.user_ids.append(user.id)

    def _change_user(self, user: User, **fields: object) -> None:
        for name, value in fields.items():
            if value is not UNSET:
                setattr(user, name, value)
        user.rendered = None
        for guild_id in user.guild_ids:
            self.guilds[guild_id].members[user.id].rendered = None

    def _remove(self, guild: Guild, user_id: int) -> None:
        member = guild.pop_member(user_id)
        guild.voice.pop(user_id, None)
        member.user.guild_ids.remove(guild.id)
        payload = {"guild_id": str(guild.id), "user": user_payload(member.user)}
        if self.emit("GUILD_MEMBER_REMOVE", guild, payload, Intent.GUILD_MEMBERS):
            self.ledger.record_member_event(guild.id, user_id, "leave")

    def _member_update(self, guild: Guild, member: Member, changed: dict[str, bool] | None = None) -> None:
        payload: Json = member_payload(member) | {"guild_id": str(guild.id)}
        # Discord may omit `nick` and `pending` if they did not change. Absent does not mean null.
        for name in ("nick", "pending"):
            if not (changed or {}).get(name) and self.rng.getrandbits(1):
                del payload[name]
        payload["joined_at"] = iso(member.joined_at)
        own = member.user is self.bot
        self.emit("GUILD_MEMBER_UPDATE", guild, payload, 0 if own else Intent.GUILD_MEMBERS)

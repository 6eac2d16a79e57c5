"""What happens to people: joins, leaves, bans, renames, member changes."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final

from .entities import Guild, Json, Member, User
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
        """Let a user join a guild, a brand-new account when no id is given; returns the user's id."""
        guild = self.guild(guild_id)
        now = self.tick()
        if user_id is None:
            user = draw_user(self.rng, self.new_user_id())
            self._know(user)
        else:
            user = self.users.get(user_id) or draw_user(self.rng, user_id)
            self._know(user)
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
        """Let a member leave."""
        guild = self.guild(guild_id)
        if user_id == self.bot.id:
            raise ValueError("the bot itself leaves by `remove_bot`")
        self.member(guild_id, user_id)
        self.tick()
        self._remove(guild, user_id)

    def ban(self, guild_id: int, user_id: int) -> None:
        """Ban a user, member or not: GUILD_BAN_ADD comes before GUILD_MEMBER_REMOVE."""
        guild, user = self.guild(guild_id), self.user(user_id)
        if user_id == self.bot.id:
            raise ValueError("the bot itself leaves by `remove_bot`")
        self.tick()
        guild.bans.add(user_id)
        payload = {"guild_id": str(guild_id), "user": user_payload(user)}
        if self.emit("GUILD_BAN_ADD", guild, payload, Intent.GUILD_MODERATION):
            self.ledger.record_member_event(guild_id, user_id, "ban")
        if user_id in guild.members:
            self._remove(guild, user_id)

    def unban(self, guild_id: int, user_id: int) -> None:
        """Lift a ban."""
        guild, user = self.guild(guild_id), self.user(user_id)
        if user_id not in guild.bans:
            raise UnknownEntity(f"user {user_id} is not banned from guild {guild_id}")
        self.tick()
        guild.bans.discard(user_id)
        payload = {"guild_id": str(guild_id), "user": user_payload(user)}
        if self.emit("GUILD_BAN_REMOVE", guild, payload, Intent.GUILD_MODERATION):
            self.ledger.record_member_event(guild_id, user_id, "unban")

    def rename_user(
        self,
        user_id: int,
        *,
        username: str | Unset = UNSET,
        global_name: str | Unset | None = UNSET,
        avatar: str | Unset | None = UNSET,
        public_flags: int | Unset = UNSET,
    ) -> None:
        """Change an account: bots hear of it as GUILD_MEMBER_UPDATE in each guild they share with it."""
        user = self.user(user_id)
        if user is self.bot:
            self.update_own_user(username=username, avatar=avatar)
            return
        self.tick()
        self._change_user(user, username=username, global_name=global_name, avatar=avatar, public_flags=public_flags)
        for guild_id in user.guild_ids:
            self._member_update(self.guilds[guild_id], self.guilds[guild_id].members[user_id])

    def update_own_user(self, *, username: str | Unset = UNSET, avatar: str | Unset | None = UNSET) -> None:
        """Change the bot's own account, told by USER_UPDATE."""
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
        """Change a membership; what is not given stays."""
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
        told = {"nick": not isinstance(nick, Unset), "pending": not isinstance(pending, Unset)}
        self._member_update(guild, member, told)

    def _known_roles(self, guild: Guild, roles: Iterable[int]) -> tuple[int, ...]:
        wanted = tuple(dict.fromkeys(roles))
        for role_id in wanted:
            if role_id not in guild.roles or role_id == guild.id:
                raise UnknownEntity(f"guild {guild.id} has no role {role_id} that a member could be given")
        return wanted

    def _know(self, user: User) -> None:
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

    def _member_update(self, guild: Guild, member: Member, told: dict[str, bool] | None = None) -> None:
        payload: Json = member_payload(member) | {"guild_id": str(guild.id)}
        # Discord may leave out `nick` and `pending` when they did not change: absent is not null.
        for name in ("nick", "pending"):
            if not (told or {}).get(name) and self.rng.getrandbits(1):
                del payload[name]
        payload["joined_at"] = iso(member.joined_at)
        own = member.user is self.bot
        self.emit("GUILD_MEMBER_UPDATE", guild, payload, 0 if own else Intent.GUILD_MEMBERS)

"""Repositories of users, members and member statistics."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, Literal

import discord
from sqlalchemy import BigInteger, ColumnElement, and_, func, or_, select, type_coerce, union
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import contains_eager

from models import Guild, Member, MemberStats, User
from utils.exceptions import ValidationError
from utils.mirror.discord.people import build_member
from utils.repositories.base import MAX_PAGE, Load, Page, Repository
from utils.repositories.guilds import GuildRepository

Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class UserTotals:
    """Totals over the users that the bot has seen, also those who have left every guild."""

    total: int
    bots: int
    #: Accounts with a verified e-mail address. Discord shows that of the bot's own account only.
    verified: int
    #: Mean age of the accounts in days; None without users.
    average_age_days: float | None


class UserRepository(Repository[User, int]):
    """Reads and writes users; the key is the user id. A user remains after leaving the last shared guild."""

    model = User

    async def by_name(self, name: str, discriminator: str | int | None = None, *, limit: int = 100) -> Sequence[User]:
        """Return the users with this username or display name, ignoring case; matches by username come first.

        discriminator: only usernames that have it: four digits of a bot, such as `"0042"` or 42, or `"0"` of users.
            None: any.

        Case folding follows the database's locale: with `C`, only A to Z are folded.
        """
        username, lowered = func.lower(User.username), func.lower(name)
        query = self._select(or_(username == lowered, func.lower(User.global_name) == lowered))
        if discriminator is not None:
            query = query.where(username == lowered, func.coalesce(User.discriminator, "0") == _digits(discriminator))
        return await self._fetch(
            query.order_by((username == lowered).desc().nulls_last(), User.id).limit(_check_limit(limit))
        )

    async def search(self, prefix: str, *, limit: int = 25) -> Sequence[User]:
        """Return the users whose username or display name starts with `prefix`, ignoring case, ordered by username."""
        by_global_name = and_(User.global_name.is_not(None), _starts_with(prefix, User.global_name))
        query = self._select(or_(_starts_with(prefix, User.username), by_global_name))
        return await self._fetch(query.order_by(func.lower(User.username), User.id).limit(_check_limit(limit)))

    async def statistics(self) -> UserTotals:
        """Return totals over all users."""
        query = select(
            func.count(),
            func.count().filter(User.bot.is_(True)),
            func.count().filter(User.verified.is_(True)),
            func.avg(func.extract("epoch", func.now() - User.created_at) / 86_400),
        )
        async with self.session() as session:
            total, bots, verified, days = (await session.execute(query)).one()
        return UserTotals(total, bots, verified, None if days is None else float(days))

    async def guilds_of(self, user_id: int, *, load: Load = ()) -> Sequence[Guild]:
        """Return the guilds that the bot shares with a user, ordered by id, with their relationships `load`."""
        return await GuildRepository(self._get_session).shared_with(user_id, load=load)


class MemberRepository(Repository[Member, Key]):
    """Reads and writes members; the key is (guild id, user id)."""

    model = Member

    async def of_guild(
        self, guild_id: int, *, after: Key | None = None, limit: int = 100, load: Load = (),
        include_deleted: bool = False,
    ) -> Page[Member, Key]:  # fmt: skip
        """Return a page of a guild's members, ordered by user id."""
        where = Member.guild_id == guild_id
        return await self.list(where, after=after, limit=limit, load=load, include_deleted=include_deleted)

    async def with_role(
        self, guild_id: int, role_id: int, *, after: Key | None = None, limit: int = 100, load: Load = ()
    ) -> Page[Member, Key]:
        """Return a page of a role's members, ordered by user id; for @everyone (the guild's id), all members."""
        return await self.list(*has_role(guild_id, role_id), after=after, limit=limit, load=load)

    async def boosters(
        self, guild_id: int, *, after: Key | None = None, limit: int = 100, load: Load = ()
    ) -> Page[Member, Key]:
        """Return a page of the members who boost a guild, ordered by user id."""
        where = (Member.guild_id == guild_id, Member.premium_since.is_not(None))
        return await self.list(*where, after=after, limit=limit, load=load)

    async def joined_between(
        self, guild_id: int, start: datetime, end: datetime, *, after: Key | None = None, limit: int = 100,
        load: Load = (),
    ) -> Page[Member, Key]:  # fmt: skip
        """Return a page of the present members who joined at or after `start` and before `end`, ordered by user id.

        Raises `ValidationError` for a time without a time zone.
        """
        for name, moment in (("start", start), ("end", end)):
            if moment.tzinfo is None:
                raise ValidationError(
                    f"{name}={moment} has no time zone: use discord.utils.utcnow() or datetime.now(UTC)"
                )
        where = (Member.guild_id == guild_id, Member.joined_at >= start, Member.joined_at < end)
        return await self.list(*where, after=after, limit=limit, load=load)

    async def as_discord(self, guild: discord.Guild, user_id: int) -> discord.Member | None:
        """Return a present member as discord.py's object: roles, permissions, display name, avatar, time-out and so on.

        It is made from the row and the guild's roles, whether discord.py has the member in memory or not, and enters
        no cache: it shows the member as they were, and has no presence. None if the mirror knows no such member.

        Example::

            member = await self.members.as_discord(interaction.guild, user_id)
            if member is not None and member.guild_permissions.ban_members:
                ...
        """
        row = await self.find((guild.id, user_id), load="user")
        return None if row is None else _as_discord(guild, row)

    async def search(self, guild: discord.Guild, prefix: str, *, limit: int = 25) -> Sequence[discord.Member]:
        """Return the present members whose nick, display name or username starts with `prefix`, ignoring case.

        They are ordered by username, or by id if `prefix` is empty, and made as `as_discord` makes them. Every
        character of `prefix` means itself. Case folding follows the database's locale.

        Example::

            found = await self.members.search(interaction.guild, current)
            return [app_commands.Choice(name=member.display_name, value=str(member.id)) for member in found]
        """
        if not prefix:
            page = await self.list(Member.guild_id == guild.id, limit=_check_limit(limit), load="user")
            return [_as_discord(guild, row) for row in page.items]
        return await self._named(guild, partial(_starts_with, prefix), _check_limit(limit))

    async def by_name(
        self, guild: discord.Guild, name: str, discriminator: str | int | None = None
    ) -> discord.Member | None:
        """Return the present member whom a name means, made as `as_discord` makes them; None if nobody has it.

        A username comes before a display name, a display name before a nick, and each in the same case before another
        case; among equals the oldest account. `discriminator` as in `UserRepository.by_name`; None: any.
        """
        found = await self._named(guild, partial(_equals, name), MAX_PAGE)
        if discriminator is not None:
            digits = _digits(discriminator)
            found = [member for member in found if member.discriminator == digits and _is_named(member.name, name)]

        def rank(member: discord.Member) -> tuple[int, int]:
            names = (member.name, member.global_name, member.nick)
            same = [number for number, known in enumerate(names) if known == name]
            folded = [number + len(names) for number, known in enumerate(names) if _is_named(known, name)]
            return min([*same, *folded], default=2 * len(names)), member.id

        return min(found, key=rank, default=None)

    async def _named(
        self, guild: discord.Guild, matches: Callable[[Any], ColumnElement[bool]], limit: int
    ) -> Sequence[discord.Member]:
        """Return the present members of whom any name matches, by an index for each name."""
        of_guild = select(Member.user_id).where(Member.guild_id == guild.id)
        by_nick = of_guild.where(Member.nick.is_not(None), matches(Member.nick))
        by_username = select(User.id).where(matches(User.username))
        by_global_name = select(User.id).where(User.global_name.is_not(None), matches(User.global_name))
        ids = union(by_nick, by_username, by_global_name).subquery()
        query = (
            self._select(Member.guild_id == guild.id, Member.user_id.in_(select(ids.c[0])))
            .outerjoin(User, User.id == Member.user_id)
            .options(contains_eager(Member.user))
            .order_by(func.lower(User.username), Member.user_id)
            .limit(limit)
        )
        return [_as_discord(guild, row) for row in await self._fetch(query)]

    async def count_present(self, guild_id: int) -> int:
        """Count the present members of a guild."""
        return await self.count(Member.guild_id == guild_id)


class MemberStatsRepository(Repository[MemberStats, Key]):
    """Reads and writes member statistics, which remain when a member leaves; the key is (guild id, user id)."""

    model = MemberStats

    async def top(
        self, guild_id: int, by: Literal["xp", "message_count"] = "xp", *, limit: int = 10, load: Load = ()
    ) -> Sequence[MemberStats]:
        """Return the `limit` present members with the highest value of `by`, highest first."""
        if by not in ("xp", "message_count"):
            raise ValidationError(f"by must be 'xp' or 'message_count', not {by!r}")
        column = MemberStats.xp if by == "xp" else MemberStats.message_count
        membership = select(Member.user_id).where(
            Member.guild_id == guild_id, Member.user_id == MemberStats.user_id, Member.left_at.is_(None)
        )
        query = self._select(MemberStats.guild_id == guild_id, membership.exists(), load=load)
        return await self._fetch(query.order_by(column.desc(), MemberStats.user_id).limit(_check_limit(limit)))

    async def add_xp(self, guild_id: int, user_id: int, xp: int) -> int:
        """Add `xp`, which may be negative, to a member's points and return the new total; create the row if needed."""
        row = insert(MemberStats).values(guild_id=guild_id, user_id=user_id, xp=xp)
        query = row.on_conflict_do_update(
            index_elements=["guild_id", "user_id"], set_={"xp": MemberStats.xp + row.excluded.xp}
        ).returning(MemberStats.xp)
        async with self.session() as session:
            return (await session.execute(query)).scalar_one()


def has_role(guild_id: int, role_id: int) -> tuple[ColumnElement[bool], ...]:
    """Return conditions for the members with a role, in a form that can use the GIN index on `members.roles`."""
    in_guild = Member.guild_id == guild_id
    if role_id == guild_id:
        return (in_guild,)
    return in_guild, type_coerce(Member.roles, ARRAY(BigInteger)).contains([role_id])


def _as_discord(guild: discord.Guild, row: Member) -> discord.Member:
    return build_member(guild, vars(row), None if row.user is None else vars(row.user))


def _starts_with(prefix: str, column: Any) -> ColumnElement[bool]:
    """Return the condition that a text starts with `prefix`, ignoring case, in a form that can use an index.

    The index orders by bytes, and no character is greater than the last one of Unicode.
    """
    text, lowered = func.lower(column), func.lower(prefix)
    is_between = and_(text.op("~>=~")(lowered), text.op("~<~")(lowered.concat(chr(sys.maxunicode)).self_group()))
    return and_(is_between, func.starts_with(text, lowered))


def _equals(name: str, column: Any) -> ColumnElement[bool]:
    return func.lower(column) == func.lower(name)


def _is_named(known: str | None, name: str) -> bool:
    return known is not None and known.lower() == name.lower()


def _digits(discriminator: str | int) -> str:
    """Return a discriminator as Discord writes it: 0 or four digits."""
    digits = str(discriminator).removeprefix("#")
    return "0" if digits.strip("0") == "" else digits.zfill(4)


def _check_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise ValidationError(f"limit must be between 1 and {MAX_PAGE}, not {limit}")
    return limit

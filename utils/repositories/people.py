"""Users, their memberships, and what they did in a guild."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from sqlalchemy import BigInteger, ColumnElement, func, or_, select, type_coerce
from sqlalchemy.dialects.postgresql import ARRAY, insert

from models import Guild, Member, MemberStats, User
from utils.exceptions import ValidationError
from utils.repositories.base import MAX_PAGE, Page, Repository, With
from utils.repositories.guilds import GuildRepository

Key = tuple[int, int]


class UserRepository(Repository[User, int]):
    """The accounts that the bot has seen. Nothing tombstones them: they stay when their last guild is left."""

    model = User

    async def by_name(self, name: str, *, limit: int = 100) -> Sequence[User]:
        """Return who is called exactly so, in whatever case: by username (one at most nowadays) or display name.

        Those whose username it is come first. Case is what the database's locale takes for it: `C` knows A to Z only.
        """
        username, wanted = func.lower(User.username), func.lower(name)
        query = self._select(or_(username == wanted, func.lower(User.global_name) == wanted))
        return await self._all(query.order_by((username == wanted).desc().nulls_last(), User.id).limit(_bounded(limit)))

    async def search(self, prefix: str, *, limit: int = 25) -> Sequence[User]:
        """Return users whose username or display name begins so, in whatever case, by username."""
        wanted = func.lower(prefix)
        names = (func.lower(User.username), func.lower(User.global_name))
        query = self._select(or_(*(func.starts_with(name, wanted) for name in names)))
        return await self._all(query.order_by(func.lower(User.username), User.id).limit(_bounded(limit)))

    async def guilds_of(self, user_id: int, *, with_: With = ()) -> Sequence[Guild]:
        """Return the guilds that the bot shares with a user, by id; `with_`: relationships of the guilds."""
        return await GuildRepository(self._sessions).shared_with(user_id, with_=with_)


class MemberRepository(Repository[Member, Key]):
    """Who is in which guild; a key is (guild id, user id)."""

    model = Member

    async def of_guild(
        self, guild_id: int, *, after: Key | None = None, limit: int = 100, with_: With = (),
        include_gone: bool = False,
    ) -> Page[Member, Key]:  # fmt: skip
        """Return a guild's members by user id."""
        where = Member.guild_id == guild_id
        return await self.list(where, after=after, limit=limit, with_=with_, include_gone=include_gone)

    async def with_role(
        self, guild_id: int, role_id: int, *, after: Key | None = None, limit: int = 100, with_: With = ()
    ) -> Page[Member, Key]:
        """Return who holds a role, by user id; everybody for the role @everyone, whose id is the guild's."""
        return await self.list(*holds(guild_id, role_id), after=after, limit=limit, with_=with_)

    async def boosters(
        self, guild_id: int, *, after: Key | None = None, limit: int = 100, with_: With = ()
    ) -> Page[Member, Key]:
        """Return who boosts a guild, by user id."""
        where = (Member.guild_id == guild_id, Member.premium_since.is_not(None))
        return await self.list(*where, after=after, limit=limit, with_=with_)

    async def joined_between(
        self, guild_id: int, start: datetime, end: datetime, *, after: Key | None = None, limit: int = 100,
        with_: With = (),
    ) -> Page[Member, Key]:  # fmt: skip
        """Return who joined at or after `start` and before `end` and is there still; both need a time zone."""
        for name, moment in (("start", start), ("end", end)):
            if moment.tzinfo is None:
                raise ValidationError(
                    f"{name}={moment} has no time zone: use discord.utils.utcnow() or datetime.now(UTC)"
                )
        where = (Member.guild_id == guild_id, Member.joined_at >= start, Member.joined_at < end)
        return await self.list(*where, after=after, limit=limit, with_=with_)

    async def count_present(self, guild_id: int) -> int:
        """Return how many members a guild has, counted."""
        return await self.count(Member.guild_id == guild_id)


class MemberStatsRepository(Repository[MemberStats, Key]):
    """What members did, added up; it stays when they leave. A key is (guild id, user id)."""

    model = MemberStats

    async def top(
        self, guild_id: int, by: Literal["xp", "message_count"] = "xp", *, limit: int = 10, with_: With = ()
    ) -> Sequence[MemberStats]:
        """Return who has most, among those who are in the guild now."""
        if by not in ("xp", "message_count"):
            raise ValidationError(f"a ranking is by xp or message_count, not by {by!r}")
        column = MemberStats.xp if by == "xp" else MemberStats.message_count
        there = select(Member.user_id).where(
            Member.guild_id == guild_id, Member.user_id == MemberStats.user_id, Member.left_at.is_(None)
        )
        query = self._select(MemberStats.guild_id == guild_id, there.exists(), with_=with_)
        return await self._all(query.order_by(column.desc(), MemberStats.user_id).limit(_bounded(limit)))

    async def add_xp(self, guild_id: int, user_id: int, xp: int) -> int:
        """Add points (or take them, below zero), first ones too, and return the sum."""
        row = insert(MemberStats).values(guild_id=guild_id, user_id=user_id, xp=xp)
        query = row.on_conflict_do_update(
            index_elements=["guild_id", "user_id"], set_={"xp": MemberStats.xp + row.excluded.xp}
        ).returning(MemberStats.xp)
        async with self.session() as session:
            return (await session.execute(query)).scalar_one()


def holds(guild_id: int, role_id: int) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions for the holders of a role, such that the index on `members.roles` serves."""
    in_guild = Member.guild_id == guild_id
    if role_id == guild_id:
        return (in_guild,)
    return in_guild, type_coerce(Member.roles, ARRAY(BigInteger)).contains([role_id])


def _bounded(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise ValidationError(f"1 to {MAX_PAGE} rows can be asked for, not {limit}")
    return limit

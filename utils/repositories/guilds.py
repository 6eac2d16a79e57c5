"""Guilds, with their statistics and owners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Integer, and_, func, select
from sqlalchemy import cast as sql_cast

from models import Channel, Guild, Member, Role, User
from utils.exceptions import NotFound, ValidationError
from utils.repositories import upsert
from utils.repositories.base import Page, Repository, With


@dataclass(frozen=True, slots=True)
class GuildTotals:
    """All guilds that the bot is in, added up from what Discord said last: `member_count` drifts a little."""

    guilds: int
    members: int
    #: None without guilds of known size; so are the next ones.
    average_members: float | None
    boosts: int
    #: Guilds that Discord calls large.
    large: int
    #: Guilds with a boost level.
    premium: int
    #: When the bot last joined a guild.
    last_joined_at: datetime | None
    #: Days for which the bot has been in its guilds.
    average_age_days: float | None


@dataclass(frozen=True, slots=True)
class GuildStatistics:
    """One guild, counted from its rows."""

    guild_id: int
    members: int
    bots: int
    boosters: int
    #: Members who joined in the last seven days and stayed.
    joined_last_7_days: int
    roles: int
    #: Without threads.
    channels: int


class GuildRepository(Repository[Guild, int]):
    """The guilds that the bot is in. `member_count` is Discord's word; `MemberRepository.count_present` counts."""

    model = Guild

    async def active(self, *, after: int | None = None, limit: int = 100, with_: With = ()) -> Page[Guild, int]:
        """Return guilds that the bot is in and Discord can show: without those in an outage."""
        return await self.list(Guild.unavailable.is_(False), after=after, limit=limit, with_=with_)

    async def owned_by(self, user_id: int, *, with_: With = ()) -> Sequence[Guild]:
        """Return the guilds that a user owns, by id."""
        return await self._all(self._select(Guild.owner_id == user_id, with_=with_).order_by(Guild.id))

    async def shared_with(self, user_id: int, *, with_: With = ()) -> Sequence[Guild]:
        """Return the guilds that a user is in as well, by id."""
        query = self._select(Member.user_id == user_id, Member.left_at.is_(None), with_=with_)
        return await self._all(query.join(Member, Member.guild_id == Guild.id).order_by(Guild.id))

    async def with_owner(self, guild_id: int) -> Guild:
        """Return a guild with its `owner` loaded (None when they were never seen); raises `NotFound`."""
        return await self.get(guild_id, with_=("owner",))

    async def create_with_owner(self, guild: Mapping[str, Any], owner: Mapping[str, Any]) -> Guild:
        """Write a new guild and its owner, known or not, in one transaction; return it with `owner` loaded.

        `owner_id` is filled in. Raises `Conflict` when the guild is there already: the owner then stays as they were.
        """
        for values, table in ((guild, Guild.__tablename__), (owner, User.__tablename__)):
            if values.get("id") is None:
                raise ValidationError(f"a row of {table} needs its id, got {', '.join(values) or 'nothing'}")
        if guild.get("owner_id", owner["id"]) != owner["id"]:
            raise ValidationError(f"the guild's owner_id is {guild['owner_id']}, the owner's id {owner['id']}")
        upsert.check_columns(self._table, guild)
        people = User.metadata.tables[User.__tablename__]
        names, rows = await upsert.in_key_order(people, [owner])
        row = Guild(**{**guild, "owner_id": owner["id"]})
        async with self.session() as session:
            await session.execute(upsert.statement(people, names), upsert.arrays(people, names, rows))
            session.add(row)
            await session.flush()
            await session.refresh(row)
            await session.refresh(row, ["owner"])
        return row

    async def set_member_count(self, guild_id: int, count: int) -> Guild:
        """Set what Discord says of a guild's size, and return the guild; raises `NotFound`."""
        if count < 0:
            raise ValidationError(f"a guild cannot have {count} members")
        return await self.update(guild_id, member_count=count)

    async def statistics(self) -> GuildTotals:
        """Return the totals of all guilds that the bot is in."""
        age = func.extract("epoch", func.now() - Guild.joined_at) / 86_400
        query = select(
            func.count(),
            func.coalesce(func.sum(Guild.member_count), 0),
            func.avg(Guild.member_count),
            func.coalesce(func.sum(Guild.premium_subscription_count), 0),
            func.count().filter(Guild.large.is_(True)),
            func.count().filter(Guild.premium_tier > 0),
            func.max(Guild.joined_at),
            func.avg(age),
        ).where(Guild.left_at.is_(None))
        async with self.session() as session:
            guilds, members, average, boosts, large, premium, last, days = (await session.execute(query)).one()
        return GuildTotals(
            guilds, members, _float(average), boosts, large, premium, last_joined_at=last, average_age_days=_float(days)
        )

    async def statistics_of(self, guild_id: int) -> GuildStatistics:
        """Return what one guild has; raises `NotFound`."""
        there = and_(Member.guild_id == guild_id, Member.left_at.is_(None))
        week = func.now() - timedelta(days=7)
        people = (
            select(
                func.count().label("members"),
                func.count().filter(User.bot.is_(True)).label("bots"),
                func.count(Member.premium_since).label("boosters"),
                func.count().filter(Member.joined_at > week).label("joined"),
            )
            .select_from(Member)
            .outerjoin(User, User.id == Member.user_id)
            .where(there)
            .subquery()
        )
        roles = select(func.count()).where(Role.guild_id == guild_id, Role.deleted_at.is_(None)).scalar_subquery()
        channels = (
            select(func.count()).where(Channel.guild_id == guild_id, Channel.deleted_at.is_(None)).scalar_subquery()
        )
        known = select(func.count()).where(Guild.id == guild_id, Guild.left_at.is_(None)).scalar_subquery()
        async with self.session() as session:
            found = (await session.execute(select(sql_cast(known, Integer), people, roles, channels))).one()
        if not found[0]:
            raise NotFound(f"the bot is in no guild {guild_id}")
        return GuildStatistics(guild_id, *found[1:])


def _float(value: Any) -> float | None:
    return None if value is None else float(value)

"""The repository of guilds, their owners and statistics."""

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
from utils.repositories.base import Load, Page, Repository


@dataclass(frozen=True, slots=True)
class GuildTotals:
    """Totals over the guilds that the bot is in, without those that are unavailable in an outage.

    They are based on `guilds.member_count`, which drifts slightly between events.
    """

    guilds: int
    members: int
    #: None if no guild has a known size.
    average_members: float | None
    boosts: int
    #: Number of guilds that Discord flags as large.
    large: int
    #: Number of guilds with a boost level (premium tier) above 0.
    premium: int
    #: When the bot last joined a guild; None without guilds.
    last_joined_at: datetime | None
    #: Average number of days since the bot joined; None without guilds.
    average_age_days: float | None


@dataclass(frozen=True, slots=True)
class GuildStatistics:
    """Statistics of one guild, counted from its rows."""

    guild_id: int
    members: int
    bots: int
    boosters: int
    #: Members who joined in the last seven days and are still there.
    joined_last_7_days: int
    roles: int
    #: Without threads.
    channels: int


class GuildRepository(Repository[Guild, int]):
    """Reads and writes guilds; the key is the guild id.

    `Guild.member_count` is the number Discord last sent; `MemberRepository.count_present` counts the rows.
    """

    model = Guild

    async def active(self, *, after: int | None = None, limit: int = 100, load: Load = ()) -> Page[Guild, int]:
        """Return a page of the guilds that the bot is in, without those that are unavailable in an outage."""
        return await self.list(Guild.unavailable.is_(False), after=after, limit=limit, load=load)

    async def owned_by(self, user_id: int, *, load: Load = ()) -> Sequence[Guild]:
        """Return the guilds that a user owns, ordered by id."""
        return await self._fetch(self._select(Guild.owner_id == user_id, load=load).order_by(Guild.id))

    async def shared_with(self, user_id: int, *, load: Load = ()) -> Sequence[Guild]:
        """Return the guilds that the bot shares with a user, ordered by id."""
        query = self._select(Member.user_id == user_id, Member.left_at.is_(None), load=load)
        return await self._fetch(query.join(Member, Member.guild_id == Guild.id).order_by(Guild.id))

    async def with_owner(self, guild_id: int) -> Guild:
        """Return a guild with its `owner` loaded (None if the bot has never seen them). Raises `NotFound`."""
        return await self.get(guild_id, load=("owner",))

    async def create_with_owner(self, guild: Mapping[str, Any], owner: Mapping[str, Any]) -> Guild:
        """Insert a guild, its owner and the owner's membership in one transaction; return it with `owner` loaded.

        An owner who exists is updated; a membership that exists is kept, and its tombstone cleared.

        `owner_id` is set from `owner`. Raises `Conflict`, and writes nothing, if the guild exists already, and
        `ValidationError` if an id is missing or `guild["owner_id"]` is another one.
        """
        for values, table in ((guild, Guild.__tablename__), (owner, User.__tablename__)):
            if values.get("id") is None:
                raise ValidationError(f"a row of {table} needs an id, got only {', '.join(values) or 'nothing'}")
        if guild.get("owner_id", owner["id"]) != owner["id"]:
            raise ValidationError(f"owner_id of the guild is {guild['owner_id']}, but id of the owner is {owner['id']}")
        upsert.check_columns(self._table, guild)
        users = User.metadata.tables[User.__tablename__]
        names, rows = await upsert.sort_by_key(users, [owner])
        row = Guild(**{**guild, "owner_id": owner["id"]})
        async with self.session() as session:
            await session.execute(upsert.upsert_statement(users, names), upsert.array_parameters(users, names, rows))
            session.add(row)
            await session.flush()
            members, keys = Member.metadata.tables[Member.__tablename__], ("guild_id", "user_id")
            membership = {"guild_id": row.id, "user_id": owner["id"]}
            await session.execute(
                upsert.upsert_statement(members, keys), upsert.array_parameters(members, keys, [membership])
            )
            await session.refresh(row)
            await session.refresh(row, ["owner"])
        return row

    async def set_member_count(self, guild_id: int, count: int) -> Guild:
        """Set a guild's `member_count` and return the guild. Raises `NotFound`, and `ValidationError` below zero."""
        if count < 0:
            raise ValidationError(f"member_count must not be negative, got {count}")
        return await self.update(guild_id, member_count=count)

    async def statistics(self) -> GuildTotals:
        """Return totals over the guilds that the bot is in, without those that are unavailable in an outage."""
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
        ).where(Guild.left_at.is_(None), Guild.unavailable.is_(False))
        async with self.session() as session:
            guilds, members, average, boosts, large, premium, last, days = (await session.execute(query)).one()
        return GuildTotals(
            guilds, members, _float(average), boosts, large, premium, last_joined_at=last, average_age_days=_float(days)
        )

    async def statistics_of(self, guild_id: int) -> GuildStatistics:
        """Return the statistics of one guild. Raises `NotFound` if the bot is not in it."""
        is_present = and_(Member.guild_id == guild_id, Member.left_at.is_(None))
        week = func.now() - timedelta(days=7)
        members = (
            select(
                func.count().label("members"),
                func.count().filter(User.bot.is_(True)).label("bots"),
                func.count(Member.premium_since).label("boosters"),
                func.count().filter(Member.joined_at > week).label("joined"),
            )
            .select_from(Member)
            .outerjoin(User, User.id == Member.user_id)
            .where(is_present)
            .subquery()
        )
        roles = select(func.count()).where(Role.guild_id == guild_id, Role.deleted_at.is_(None)).scalar_subquery()
        channels = (
            select(func.count()).where(Channel.guild_id == guild_id, Channel.deleted_at.is_(None)).scalar_subquery()
        )
        is_known = select(func.count()).where(Guild.id == guild_id, Guild.left_at.is_(None)).scalar_subquery()
        async with self.session() as session:
            found = (await session.execute(select(sql_cast(is_known, Integer), members, roles, channels))).one()
        if not found[0]:
            raise NotFound(f"the bot is not in guild {guild_id}")
        return GuildStatistics(guild_id, *found[1:])


def _float(value: Any) -> float | None:
    return None if value is None else float(value)

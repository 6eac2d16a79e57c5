"""What guilds are made of: roles, channels and threads."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select

from models import Channel, Member, Role, Thread
from utils.repositories.base import Page, Repository, With


class RoleRepository(Repository[Role, tuple[int, int]]):
    """The roles of guilds; a key is (guild id, role id)."""

    model = Role

    async def of_guild(self, guild_id: int, *, with_: With = (), include_gone: bool = False) -> Sequence[Role]:
        """Return a guild's roles from the lowest to the highest: 250 at most (Discord API reference, "Limits")."""
        query = self._select(Role.guild_id == guild_id, with_=with_, include_gone=include_gone)
        return await self._all(query.order_by(Role.position, Role.id))

    async def of_member(self, guild_id: int, user_id: int) -> Sequence[Role]:
        """Return the roles that a member holds, from the lowest to the highest, without @everyone."""
        held = select(func.unnest(Member.roles)).where(
            Member.guild_id == guild_id, Member.user_id == user_id, Member.left_at.is_(None)
        )
        query = self._select(Role.guild_id == guild_id, Role.id.in_(held))
        return await self._all(query.order_by(Role.position, Role.id))

    async def by_name(self, guild_id: int, name: str) -> Sequence[Role]:
        """Return a guild's roles of that name in whatever case, by id: Discord lets several have one name."""
        query = self._select(Role.guild_id == guild_id, func.lower(Role.name) == func.lower(name))
        return await self._all(query.order_by(Role.id))


class ChannelRepository(Repository[Channel, tuple[int, int]]):
    """The channels of guilds, categories among them; a key is (guild id, channel id)."""

    model = Channel

    async def of_guild(
        self, guild_id: int, *, visible_only: bool = False, with_: With = (), include_gone: bool = False
    ) -> Sequence[Channel]:
        """Return a guild's channels by position: 500 at most. `visible_only`: without those hidden from the bot."""
        query = self._select(Channel.guild_id == guild_id, with_=with_, include_gone=include_gone)
        if visible_only:
            query = query.where(Channel.hidden.is_(False))
        return await self._all(query.order_by(Channel.position, Channel.id))

    async def in_category(self, guild_id: int, category_id: int | None) -> Sequence[Channel]:
        """Return the channels of a category by position; None: those in no category, categories among them."""
        query = self._select(Channel.guild_id == guild_id, Channel.parent_id.is_not_distinct_from(category_id))
        return await self._all(query.order_by(Channel.position, Channel.id))


class ThreadRepository(Repository[Thread, tuple[int, int]]):
    """The threads of guilds, active or archived; a key is (guild id, thread id)."""

    model = Thread

    async def of_guild(
        self,
        guild_id: int,
        *,
        archived: bool | None = None,
        after: tuple[int, int] | None = None,
        limit: int = 100,
        with_: With = (),
    ) -> Page[Thread, tuple[int, int]]:
        """Return a guild's threads; `archived`: only such, only active ones, or None for both."""
        where = [Thread.guild_id == guild_id]
        if archived is not None:
            where.append(Thread.archived.is_(archived))
        return await self.list(*where, after=after, limit=limit, with_=with_)

    async def of_channel(
        self,
        guild_id: int,
        channel_id: int,
        *,
        archived: bool | None = None,
        after: tuple[int, int] | None = None,
        limit: int = 100,
        with_: With = (),
    ) -> Page[Thread, tuple[int, int]]:
        """Return a channel's threads; `archived`: as in `of_guild`."""
        where = [Thread.guild_id == guild_id, Thread.parent_id == channel_id]
        if archived is not None:
            where.append(Thread.archived.is_(archived))
        return await self.list(*where, after=after, limit=limit, with_=with_)

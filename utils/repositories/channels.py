"""Repositories of roles, channels and threads."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select

from models import Channel, Member, Role, Thread
from utils.repositories.base import Load, Page, Repository


class RoleRepository(Repository[Role, tuple[int, int]]):
    """Reads and writes roles; the key is (guild id, role id)."""

    model = Role

    async def of_guild(self, guild_id: int, *, load: Load = (), include_deleted: bool = False) -> Sequence[Role]:
        """Return a guild's roles from lowest to highest (Discord allows 250)."""
        query = self._select(Role.guild_id == guild_id, load=load, include_deleted=include_deleted)
        return await self._fetch(query.order_by(Role.position, Role.id))

    async def of_member(self, guild_id: int, user_id: int) -> Sequence[Role]:
        """Return a member's roles from lowest to highest, without @everyone."""
        held = select(func.unnest(Member.roles)).where(
            Member.guild_id == guild_id, Member.user_id == user_id, Member.left_at.is_(None)
        )
        query = self._select(Role.guild_id == guild_id, Role.id.in_(held))
        return await self._fetch(query.order_by(Role.position, Role.id))

    async def by_name(self, guild_id: int, name: str) -> Sequence[Role]:
        """Return a guild's roles with this name, ignoring case, ordered by id. Role names are not unique."""
        query = self._select(Role.guild_id == guild_id, func.lower(Role.name) == func.lower(name))
        return await self._fetch(query.order_by(Role.id))


class ChannelRepository(Repository[Channel, tuple[int, int]]):
    """Reads and writes channels, including categories; the key is (guild id, channel id)."""

    model = Channel

    async def of_guild(
        self, guild_id: int, *, visible_only: bool = False, load: Load = (), include_deleted: bool = False
    ) -> Sequence[Channel]:
        """Return a guild's channels ordered by position; `visible_only` omits those that the bot cannot view."""
        query = self._select(Channel.guild_id == guild_id, load=load, include_deleted=include_deleted)
        if visible_only:
            query = query.where(Channel.hidden.is_(False))
        return await self._fetch(query.order_by(Channel.position, Channel.id))

    async def in_category(self, guild_id: int, category_id: int | None) -> Sequence[Channel]:
        """Return a category's channels ordered by position; for None, categories and channels without a category."""
        query = self._select(Channel.guild_id == guild_id, Channel.parent_id.is_not_distinct_from(category_id))
        return await self._fetch(query.order_by(Channel.position, Channel.id))


class ThreadRepository(Repository[Thread, tuple[int, int]]):
    """Reads and writes threads, active and archived; the key is (guild id, thread id)."""

    model = Thread

    async def of_guild(
        self,
        guild_id: int,
        *,
        archived: bool | None = None,
        after: tuple[int, int] | None = None,
        limit: int = 100,
        load: Load = (),
    ) -> Page[Thread, tuple[int, int]]:
        """Return a page of a guild's threads; `archived=None` returns active and archived ones."""
        where = [Thread.guild_id == guild_id]
        if archived is not None:
            where.append(Thread.archived.is_(archived))
        return await self.list(*where, after=after, limit=limit, load=load)

    async def of_channel(
        self,
        guild_id: int,
        channel_id: int,
        *,
        archived: bool | None = None,
        after: tuple[int, int] | None = None,
        limit: int = 100,
        load: Load = (),
    ) -> Page[Thread, tuple[int, int]]:
        """Return a page of a channel's threads; `archived` as in `of_guild`."""
        where = [Thread.guild_id == guild_id, Thread.parent_id == channel_id]
        if archived is not None:
            where.append(Thread.archived.is_(archived))
        return await self.list(*where, after=after, limit=limit, load=load)

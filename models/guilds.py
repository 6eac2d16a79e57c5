"""Guilds, roles, channels and threads."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, BigInteger, Computed, Index, Integer, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, Mirrored, Part, created_at_of, marked, related, snowflake, tombstone

if TYPE_CHECKING:
    from models.people import Member, User


class Guild(Mirrored, Base):
    """A guild that the bot is in, or was in."""

    __tablename__ = "guilds"

    id: Mapped[int] = snowflake(primary_key=True)
    name: Mapped[str | None] = marked(Text)
    icon: Mapped[str | None] = marked(Text)
    splash: Mapped[str | None] = marked(Text)
    discovery_splash: Mapped[str | None] = marked(Text)
    banner: Mapped[str | None] = marked(Text)
    description: Mapped[str | None] = marked(Text)
    owner_id: Mapped[int | None] = snowflake()
    preferred_locale: Mapped[str | None] = marked(Text)
    afk_channel_id: Mapped[int | None] = snowflake()
    afk_timeout: Mapped[int | None] = marked(Integer)
    verification_level: Mapped[int | None] = marked(SmallInteger)
    default_message_notifications: Mapped[int | None] = marked(SmallInteger)
    explicit_content_filter: Mapped[int | None] = marked(SmallInteger)
    mfa_level: Mapped[int | None] = marked(SmallInteger)
    nsfw_level: Mapped[int | None] = marked(SmallInteger)
    application_id: Mapped[int | None] = snowflake()
    system_channel_id: Mapped[int | None] = snowflake()
    system_channel_flags: Mapped[int | None] = marked(Integer)
    rules_channel_id: Mapped[int | None] = snowflake()
    public_updates_channel_id: Mapped[int | None] = snowflake()
    #: When the bot joined.
    joined_at: Mapped[datetime | None] = marked()
    large: Mapped[bool | None] = marked(part=Part.QUIET)
    #: True during an outage of Discord's: the bot is still in the guild but does not see its data.
    unavailable: Mapped[bool] = marked(nullable=False, server_default="false", part=Part.QUIET)
    #: Discord's latest figure, which drifts; `count(*)` over members who have not left is exact.
    member_count: Mapped[int | None] = marked(Integer, part=Part.QUIET)
    max_members: Mapped[int | None] = marked(Integer)
    premium_tier: Mapped[int | None] = marked(SmallInteger)
    premium_subscription_count: Mapped[int | None] = marked(Integer)
    vanity_url_code: Mapped[str | None] = marked(Text)
    #: Sorted, because Discord's order varies.
    features: Mapped[list[str] | None] = marked(ARRAY(Text))
    created_at: Mapped[datetime] = marked(created_at_of("id"))
    #: When the bot left or was removed; None while it is in the guild.
    left_at: Mapped[datetime | None] = tombstone()
    is_active: Mapped[bool] = marked(Computed("left_at IS NULL", persisted=True), sort_order=81)

    #: None if the owner was never seen.
    owner: Mapped[User | None] = related("foreign(Guild.owner_id) == User.id")
    #: Without those who have left. All of them are loaded at once: for large guilds, iterate over a repository's pages.
    members: Mapped[list[Member]] = related(
        "and_(Guild.id == foreign(Member.guild_id), Member.left_at.is_(None))", order_by="Member.user_id"
    )
    #: This and the next two exclude what was deleted.
    roles: Mapped[list[Role]] = related(
        "and_(Guild.id == foreign(Role.guild_id), Role.deleted_at.is_(None))", order_by="(Role.position, Role.id)"
    )
    channels: Mapped[list[Channel]] = related(
        "and_(Guild.id == foreign(Channel.guild_id), Channel.deleted_at.is_(None))",
        order_by="(Channel.position, Channel.id)",
    )
    threads: Mapped[list[Thread]] = related(
        "and_(Guild.id == foreign(Thread.guild_id), Thread.deleted_at.is_(None))", order_by="Thread.id"
    )


class Role(Mirrored, Base):
    """A role of a guild."""

    __tablename__ = "roles"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    id: Mapped[int] = snowflake(primary_key=True)
    name: Mapped[str | None] = marked(Text)
    color: Mapped[int | None] = marked(Integer)
    hoist: Mapped[bool | None] = marked()
    icon: Mapped[str | None] = marked(Text)
    unicode_emoji: Mapped[str | None] = marked(Text)
    position: Mapped[int | None] = marked(Integer)
    permissions: Mapped[int | None] = marked(BigInteger)
    managed: Mapped[bool | None] = marked()
    mentionable: Mapped[bool | None] = marked()
    tags: Mapped[dict[str, Any] | None] = marked(JSONB)
    flags: Mapped[int | None] = marked(Integer)
    deleted_at: Mapped[datetime | None] = tombstone()

    guild: Mapped[Guild | None] = related("foreign(Role.guild_id) == Guild.id")


class Channel(Mirrored, Base):
    """A channel of a guild, of any type except threads."""

    __tablename__ = "channels"
    __table_args__ = (Index(None, "guild_id", "parent_id"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    id: Mapped[int] = snowflake(primary_key=True)
    #: None if the channel has been hidden from the bot since it was first seen.
    name: Mapped[str | None] = marked(Text)
    type: Mapped[int | None] = marked(SmallInteger)
    parent_id: Mapped[int | None] = snowflake()
    position: Mapped[int | None] = marked(Integer)
    topic: Mapped[str | None] = marked(Text)
    nsfw: Mapped[bool | None] = marked()
    #: Seconds.
    slowmode: Mapped[int | None] = marked(Integer)
    #: Sorted by id, because Discord's order varies.
    permission_overwrites: Mapped[list[dict[str, Any]] | None] = marked(JSONB)
    #: Bits per second; voice channels only.
    bitrate: Mapped[int | None] = marked(Integer)
    user_limit: Mapped[int | None] = marked(Integer)
    rtc_region: Mapped[str | None] = marked(Text)
    #: Minutes.
    default_auto_archive_duration: Mapped[int | None] = marked(Integer)
    flags: Mapped[int | None] = marked(BigInteger)
    #: True while the bot may not view the channel; the other columns then keep their last known values.
    hidden: Mapped[bool] = marked(nullable=False, server_default="false", part=Part.QUIET)
    deleted_at: Mapped[datetime | None] = tombstone()

    guild: Mapped[Guild | None] = related("foreign(Channel.guild_id) == Guild.id")
    #: Archived ones included, deleted ones excluded.
    threads: Mapped[list[Thread]] = related(
        "and_(Channel.guild_id == foreign(Thread.guild_id), Channel.id == foreign(Thread.parent_id),"
        " Thread.deleted_at.is_(None))",
        order_by="Thread.id",
    )


class Thread(Mirrored, Base):
    """A thread, active or archived."""

    __tablename__ = "threads"
    __table_args__ = (Index(None, "guild_id", "parent_id"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    id: Mapped[int] = snowflake(primary_key=True)
    name: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    type: Mapped[int | None] = marked(SmallInteger)
    parent_id: Mapped[int | None] = snowflake()
    owner_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)
    archived: Mapped[bool | None] = marked()
    locked: Mapped[bool | None] = marked()
    invitable: Mapped[bool | None] = marked()
    #: Minutes.
    auto_archive_duration: Mapped[int | None] = marked(Integer)
    #: None while the thread is active.
    archived_at: Mapped[datetime | None] = marked()
    #: Seconds.
    slowmode: Mapped[int | None] = marked(Integer)
    flags: Mapped[int | None] = marked(BigInteger)
    #: Sorted, because Discord's order varies.
    applied_tags: Mapped[list[int] | None] = marked(ARRAY(BigInteger))
    deleted_at: Mapped[datetime | None] = tombstone()

    guild: Mapped[Guild | None] = related("foreign(Thread.guild_id) == Guild.id")
    #: The channel, even if deleted.
    parent: Mapped[Channel | None] = related(
        "and_(foreign(Thread.guild_id) == Channel.guild_id, foreign(Thread.parent_id) == Channel.id)"
    )
    #: None if the owner was never seen.
    owner: Mapped[User | None] = related("foreign(Thread.owner_id) == User.id")

"""History: changes of mirrored rows, membership events, and reconcile runs."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Index, Integer, Sequence, Text, false, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake, time_id

#: The low bits of time-ordered ids; in `ops`, so that a restore never resets it.
change_ids = Sequence("change_ids", schema="ops", metadata=Base.metadata)


class Change(Base):
    """One update, removal or return of a guild's row, or the creation of a guild, channel, role or thread."""

    __tablename__ = "changes"
    __table_args__ = (
        CheckConstraint("action IN ('create', 'update', 'remove', 'return')", name="action"),
        Index(None, "user_id", "id", postgresql_where=text("user_id IS NOT NULL")),
        Index(None, "id"),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    guild_id: Mapped[int] = snowflake(primary_key=True)
    #: Time-ordered: milliseconds since 2015 in the high bits, like a snowflake.
    id: Mapped[int] = snowflake(primary_key=True, server_default=text(time_id("ops.change_ids")))
    table_name: Mapped[str] = marked(Text, nullable=False)
    #: Primary key of the row, column by column.
    key: Mapped[dict[str, Any]] = marked(JSONB, nullable=False)
    action: Mapped[str] = marked(Text, nullable=False)
    #: The user that the row is about; None if it is not about a user.
    user_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)
    #: The changed columns with their old values; None for a creation.
    before: Mapped[dict[str, Any] | None] = marked(JSONB, erase=Erase.CLEAR)
    #: The changed columns with their new values.
    after: Mapped[dict[str, Any] | None] = marked(JSONB, erase=Erase.CLEAR)
    at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: True if found by a listing, false if Discord sent an event.
    inferred: Mapped[bool] = marked(Boolean, nullable=False, server_default=false())


class UserChange(Base):
    """One update of a user, which belongs to no guild."""

    __tablename__ = "user_changes"
    __table_args__ = (
        CheckConstraint("action IN ('update', 'remove', 'return')", name="action"),
        Index(None, "id"),
        {"postgresql_partition_by": "RANGE (id)"},
    )

    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    id: Mapped[int] = snowflake(primary_key=True, server_default=text(time_id("ops.change_ids")))
    table_name: Mapped[str] = marked(Text, nullable=False)
    key: Mapped[dict[str, Any]] = marked(JSONB, nullable=False)
    action: Mapped[str] = marked(Text, nullable=False)
    before: Mapped[dict[str, Any] | None] = marked(JSONB, erase=Erase.CLEAR)
    after: Mapped[dict[str, Any] | None] = marked(JSONB, erase=Erase.CLEAR)
    at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    inferred: Mapped[bool] = marked(Boolean, nullable=False, server_default=false())


class MemberEvent(Base):
    """A user joined, left, was banned or unbanned."""

    __tablename__ = "member_events"
    __table_args__ = (
        CheckConstraint("kind IN ('join', 'leave', 'ban', 'unban')", name="kind"),
        Index(None, "guild_id", "user_id", "stamp"),
        Index(None, "user_id"),
        Index(None, "id"),
    )

    guild_id: Mapped[int] = snowflake(primary_key=True)
    id: Mapped[int] = snowflake(primary_key=True, server_default=text(time_id("ops.change_ids")))
    user_id: Mapped[int] = snowflake(nullable=False, erase=Erase.SUBJECT)
    kind: Mapped[str] = marked(Text, nullable=False)
    #: Discord's timestamp for a join; for other kinds the time at which the event was received.
    at: Mapped[datetime] = marked(nullable=False)
    #: True if no process received the event: a complete listing proves that it happened.
    inferred: Mapped[bool] = marked(Boolean, nullable=False, server_default=false())
    #: Earliest and latest possible time, on the database's clock. Inferred: the times of the listings before and after;
    #: otherwise None and the time at which the event was received.
    earliest: Mapped[datetime | None] = marked()
    latest: Mapped[datetime | None] = marked()
    #: Stamp of the observation, as in rows; if inferred, the stamp of the listing.
    stamp: Mapped[int] = marked(BigInteger, nullable=False, server_default="0")


class SyncRun(Base):
    """One reconcile of a guild's members against a listing."""

    __tablename__ = "sync_runs"
    __table_args__ = (
        CheckConstraint("state IN ('complete', 'failed')", name="state"),
        CheckConstraint("source IN ('gateway', 'rest')", name="source"),
        Index("ix_sync_runs_guild_id_stamp", "guild_id", "stamp", postgresql_where=text("state = 'complete'")),
    )

    guild_id: Mapped[int] = snowflake(primary_key=True)
    id: Mapped[int] = snowflake(primary_key=True, server_default=text(time_id("ops.change_ids")))
    started_at: Mapped[datetime] = marked(nullable=False)
    finished_at: Mapped[datetime] = marked(nullable=False)
    state: Mapped[str] = marked(Text, nullable=False)
    #: Source of the listing: op 8 over the gateway, or GET /guilds/{id}/members.
    source: Mapped[str] = marked(Text, nullable=False)
    #: Why it ran: ready, available, request, retry.
    reason: Mapped[str] = marked(Text, nullable=False)
    #: Stamp of the listing: rows with an older stamp that it did not show are gone. None if it failed.
    stamp: Mapped[int | None] = marked(BigInteger)
    pages: Mapped[int] = marked(Integer, nullable=False)
    rows_seen: Mapped[int] = marked(Integer, nullable=False)
    rows_inserted: Mapped[int] = marked(Integer, nullable=False)
    rows_updated: Mapped[int] = marked(Integer, nullable=False)
    rows_left: Mapped[int] = marked(Integer, nullable=False)
    #: None if it succeeded.
    error: Mapped[str | None] = marked(Text)

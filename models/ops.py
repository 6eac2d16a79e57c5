"""Schema `ops`: operational state of the bot, which a restore never overwrites."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Double, Index, Integer, Text, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake


class Lease(Base):
    """The process that serves a shard, and its epoch: the high bits of every stamp."""

    __tablename__ = "leases"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    shard: Mapped[int] = marked(Integer, primary_key=True, autoincrement=False)
    holder: Mapped[str] = marked(Text, nullable=False)
    #: Increased by every process that takes over the shard.
    epoch: Mapped[int] = marked(BigInteger, nullable=False)
    taken_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: On the database's clock; None after a release.
    expires_at: Mapped[datetime | None] = marked()


class Position(Base):
    """The stamp up to which a journal's events are in the database, committed together with them."""

    __tablename__ = "positions"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    #: Name of the process that wrote the journal, as in `ops.leases.holder`.
    journal: Mapped[str] = marked(Text, primary_key=True)
    position: Mapped[int] = marked(BigInteger, nullable=False)
    updated_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())


class CountedMessage(Base):
    """A message counted in `member_stats`, remembered for a day so that a repeated event is not counted again."""

    __tablename__ = "counted_messages"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    id: Mapped[int] = snowflake(primary_key=True)


class DeadLetter(Base):
    """A row or event that the database rejected, or a change that a cog's listener failed on; the others went on."""

    __tablename__ = "dead_letters"
    __table_args__ = (Index(None, "at"), {"schema": "ops"})

    id: Mapped[int] = marked(BigInteger, primary_key=True)
    at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    table_name: Mapped[str] = marked(Text, nullable=False)
    #: Primary key of the row, column by column.
    key: Mapped[dict[str, Any]] = marked(JSONB, nullable=False)
    #: The user that the row is about; None if it is not about a user.
    user_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)
    #: The values that were to be written.
    payload: Mapped[dict[str, Any] | None] = marked(JSONB, erase=Erase.CLEAR)
    #: Stamp of the row or event; for a listener, the id of the change.
    stamp: Mapped[int] = marked(BigInteger, nullable=False)
    #: PostgreSQL's error code; None if the error did not come from PostgreSQL.
    sqlstate: Mapped[str | None] = marked(Text)
    error: Mapped[str] = marked(Text, nullable=False)
    #: The cog that added the row to a batch, or whose listener failed; None if the mirror wrote it.
    cog: Mapped[str | None] = marked(Text)


class AdminAction(Base):
    """Audit log: which operator ran which command, when, and with what result.

    Rows are kept for 400 days, and at most 100,000 of them, but those that decide something are kept for good. Of the
    refused commands of others, a few are recorded in each minute.
    """

    __tablename__ = "admin_actions"
    __table_args__ = (Index(None, "at"), {"schema": "ops"})

    id: Mapped[int] = marked(BigInteger, primary_key=True)
    at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: None for the command line.
    user_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)
    command: Mapped[str] = marked(Text, nullable=False)
    arguments: Mapped[dict[str, Any]] = marked(JSONB, nullable=False, server_default="{}")
    result: Mapped[str] = marked(Text, nullable=False)


class Migration(Base):
    """Who applied or reverted a revision of the schema, and who paused or resumed AUTO_MIGRATE. Append-only."""

    __tablename__ = "migrations"
    __table_args__ = (
        CheckConstraint("action IN ('upgrade', 'downgrade', 'stamp', 'pause', 'resume')", name="action"),
        {"schema": "ops"},
    )

    id: Mapped[int] = marked(BigInteger, primary_key=True)
    at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: The revision that was applied, reverted or stamped; for a pause, the one that the schema is downgraded to.
    revision: Mapped[str] = marked(Text, nullable=False)
    #: AUTO_MIGRATE is paused when the latest pause or resume is a pause.
    action: Mapped[str] = marked(Text, nullable=False)
    #: How long the revision took; None if it was not measured.
    seconds: Mapped[float | None] = marked(Double)
    #: Why AUTO_MIGRATE is paused; None for everything but a pause.
    reason: Mapped[str | None] = marked(Text)
    #: bot, command line, discord, alembic or sql file.
    applied_by: Mapped[str] = marked(Text, nullable=False)
    #: The operator, when the command came from Discord.
    user_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)


class TableSize(Base):
    """The size of a table, sampled every few hours to show growth."""

    __tablename__ = "table_sizes"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    at: Mapped[datetime] = marked(primary_key=True)
    #: With `ops.`, if it is one of the bot's own.
    table_name: Mapped[str] = marked(Text, primary_key=True)
    #: The planner's estimate.
    rows: Mapped[int] = marked(BigInteger, nullable=False)
    #: With indexes.
    bytes: Mapped[int] = marked(BigInteger, nullable=False)


class Application(Base):
    """The Discord application that the database belongs to: one row, written by the first login."""

    __tablename__ = "application"
    __table_args__ = (CheckConstraint("is_only", name="is_only"), UniqueConstraint("is_only"), {"schema": "ops"})

    id: Mapped[int] = snowflake(primary_key=True)
    #: Always true, and unique: there is one row.
    is_only: Mapped[bool] = marked(Boolean, nullable=False, server_default="true")
    since: Mapped[datetime] = marked(nullable=False, server_default=func.now())


class CommandTree(Base):
    """The slash commands last registered with Discord; they are registered again only if they changed."""

    __tablename__ = "command_trees"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    application_id: Mapped[int] = snowflake(primary_key=True)
    #: 0 for the global commands.
    guild_id: Mapped[int] = snowflake(primary_key=True)
    #: SHA-256 of the payload.
    digest: Mapped[str] = marked(Text, nullable=False)
    synced_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())


class Suppression(Base):
    """A user who asked not to be stored: nothing about them is written again."""

    __tablename__ = "suppressions"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    user_id: Mapped[int] = snowflake(primary_key=True)
    since: Mapped[datetime] = marked(nullable=False, server_default=func.now())

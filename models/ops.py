"""Schema `ops`: what the running bot keeps for itself, and what a restore never overwrites."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, Integer, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake


class Lease(Base):
    """Which process acts for a shard, and in which epoch: the high bits of every ordering stamp."""

    __tablename__ = "leases"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    shard: Mapped[int] = marked(Integer, primary_key=True, autoincrement=False)
    holder: Mapped[str] = marked(Text, nullable=False)
    #: Raised by every process that takes the shard over.
    epoch: Mapped[int] = marked(BigInteger, nullable=False)
    taken_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: On the database's clock. None: held until someone else starts.
    expires_at: Mapped[datetime | None] = marked()


class AdminAction(Base):
    """Who ran which operator's command, when, and with what result."""

    __tablename__ = "admin_actions"
    __table_args__ = (Index(None, "at"), {"schema": "ops"})

    id: Mapped[int] = marked(BigInteger, primary_key=True)
    at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: None for the command line.
    user_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)
    command: Mapped[str] = marked(Text, nullable=False)
    arguments: Mapped[dict[str, Any]] = marked(JSONB, nullable=False, server_default="{}")
    result: Mapped[str] = marked(Text, nullable=False)


class CommandTree(Base):
    """The slash commands last registered with Discord, so that a start registers them only when they changed."""

    __tablename__ = "command_trees"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    application_id: Mapped[int] = snowflake(primary_key=True)
    #: 0 for the global commands.
    guild_id: Mapped[int] = snowflake(primary_key=True)
    #: SHA-256 of the payload.
    digest: Mapped[str] = marked(Text, nullable=False)
    synced_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())


class Suppression(Base):
    """A person who asked not to be kept: nothing about them is written again."""

    __tablename__ = "suppressions"
    __table_args__ = {"schema": "ops"}  # noqa: RUF012 - read by SQLAlchemy, never changed

    user_id: Mapped[int] = snowflake(primary_key=True)
    since: Mapped[datetime] = marked(nullable=False, server_default=func.now())

"""The tables."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, DateTime, Index, Text, text
from sqlalchemy.orm import Mapped

from models.base import Base, marked, snowflake


class Case(Base):
    """What a moderator did about a member. Cases stay when people leave: bans need their history."""

    __tablename__ = "moderation_cases"
    __table_args__ = (
        Index("ix_moderation_cases_member", "guild_id", "user_id"),
        Index("ix_moderation_cases_due", "expires_at", postgresql_where=text("state = 'done'")),
    )

    guild_id: Mapped[int] = snowflake(primary_key=True)
    number: Mapped[int] = marked(BigInteger, primary_key=True, autoincrement=False)
    user_id: Mapped[int] = snowflake()
    moderator_id: Mapped[int] = snowflake()
    #: warn, timeout or ban.
    action: Mapped[str] = marked(Text)
    reason: Mapped[str] = marked(Text)
    created_at: Mapped[datetime] = marked(DateTime(timezone=True), server_default=text("now()"))
    #: When the timeout or ban ends; None: never, or it is a warning.
    expires_at: Mapped[datetime | None] = marked(DateTime(timezone=True))
    #: open until Discord has answered, then done or failed; expired once a ban was lifted.
    state: Mapped[str] = marked(Text, server_default="open")


class LastCase(Base):
    """The number of a guild's last case."""

    __tablename__ = "moderation_last_cases"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    number: Mapped[int] = marked(BigInteger)

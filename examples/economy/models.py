"""The tables."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, DateTime, Text
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake


class Account(Base):
    """The coins of a member."""

    __tablename__ = "economy_accounts"
    __table_args__ = (CheckConstraint("coins >= 0", name="not_negative"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    coins: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")
    #: When the member last took the daily coins; None: never.
    daily_at: Mapped[datetime | None] = marked(DateTime(timezone=True), erase=Erase.CLEAR)


class Purchase(Base):
    """How many of an item a member owns."""

    __tablename__ = "economy_purchases"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    item: Mapped[str] = marked(Text, primary_key=True)
    quantity: Mapped[int] = marked(BigInteger, server_default="1")

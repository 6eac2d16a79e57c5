"""The table."""

from __future__ import annotations

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake


class Score(Base):
    """The experience of a member, and what it comes from."""

    __tablename__ = "levels_scores"

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    xp: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")
    messages: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")
    stars: Mapped[int] = marked(BigInteger, erase=Erase.CLEAR, server_default="0")

"""What cogs keep without a table of their own: typed documents, by guild, namespace and key."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, marked, snowflake


class Document(Base):
    """One value of a cog's; what it may hold is said by the cog's model alone."""

    __tablename__ = "documents"

    #: 0: of no guild.
    guild_id: Mapped[int] = snowflake(primary_key=True)
    #: Which store it is in, chosen by the cog.
    namespace: Mapped[str] = marked(Text, primary_key=True)
    #: Ids in decimal. Ordered by code points on every server, so that the pages of a listing are.
    key: Mapped[str] = marked(Text(collation="C"), primary_key=True)
    value: Mapped[Any] = marked(JSONB, nullable=False)
    #: Raised by every write, and never one that the key had before.
    version: Mapped[int] = marked(BigInteger, nullable=False, server_default="1")
    updated_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: The last value that did not fit the model, as it was before it was repaired or replaced; None: there was none.
    quarantined: Mapped[Any | None] = marked(JSONB(none_as_null=True))
    #: Why it did not fit; None: there was none.
    problem: Mapped[str | None] = marked(Text)

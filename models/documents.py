"""Documents: JSON values that cogs store by guild, namespace and key, without a table of their own."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, marked, snowflake


class Document(Base):
    """A JSON value stored by a cog; the cog's model defines its shape."""

    __tablename__ = "documents"

    #: 0 for global documents.
    guild_id: Mapped[int] = snowflake(primary_key=True)
    #: The name of the store, chosen by the cog.
    namespace: Mapped[str] = marked(Text, primary_key=True)
    #: Ids are written in decimal. Sorted by code point on every server, so that listings page consistently.
    key: Mapped[str] = marked(Text(collation="C"), primary_key=True)
    value: Mapped[Any] = marked(JSONB, nullable=False)
    #: Increased by every write; a key never has the same version twice.
    version: Mapped[int] = marked(BigInteger, nullable=False, server_default="1")
    updated_at: Mapped[datetime] = marked(nullable=False, server_default=func.now())
    #: The last value that did not match the model, before it was repaired or replaced; None if there was none.
    quarantined: Mapped[Any | None] = marked(JSONB(none_as_null=True))
    #: Why it did not match; None if there was none.
    problem: Mapped[str | None] = marked(Text)

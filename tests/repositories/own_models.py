"""A table of an author's own. The lines that mypy must refuse say so: an unneeded `type: ignore` fails the build."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, BigInteger, DateTime, Integer, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, marked, snowflake, tombstone


class Case(Base):
    """A moderation case."""

    __tablename__ = "own_cases"
    guild_id: Mapped[int] = snowflake(primary_key=True)
    code: Mapped[str] = marked(Text, primary_key=True)
    user_id: Mapped[int | None] = snowflake(erase=Erase.SUBJECT)
    state: Mapped[str] = marked(Text, server_default="open")
    points: Mapped[int] = marked(Integer, server_default="0")
    notes: Mapped[list[str]] = marked(ARRAY(Text), server_default="{}")
    extra: Mapped[dict[str, Any] | None] = marked(JSONB)
    closed_at: Mapped[datetime | None] = marked(DateTime(timezone=True))


if TYPE_CHECKING:

    class Wrong(Base):
        """Each column has another type than its annotation says."""

        __tablename__ = "wrong"
        number: Mapped[int] = marked(Text)  # type: ignore[arg-type]
        text: Mapped[str] = marked(DateTime(timezone=True))  # type: ignore[arg-type]
        texts: Mapped[list[str]] = marked(ARRAY(BigInteger))  # type: ignore[arg-type]
        ids: Mapped[int] = marked(ARRAY(BigInteger))  # type: ignore[assignment]
        id: Mapped[str] = snowflake(primary_key=True)  # type: ignore[assignment]
        left_at: Mapped[datetime] = tombstone()  # type: ignore[assignment]

    def wrong(case: Case) -> None:
        """Each value has another type than its column."""
        case.state = 5  # type: ignore[assignment]
        case.points = Case.state  # type: ignore[assignment]
        case.notes = ["a", 1]  # type: ignore[list-item]

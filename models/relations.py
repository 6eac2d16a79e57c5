"""What belongs to users and members, as relationships: there are no foreign keys that SQLAlchemy could tell it from."""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_
from sqlalchemy.orm import foreign, relationship

from models.guilds import Guild
from models.people import Member, MemberStats, User


def _relate(model: type[Any], name: str, target: type[Any], join: Any, **kwargs: Any) -> None:
    """Add a relationship: read only, and never loaded unless it was asked for."""
    related = relationship(target, primaryjoin=join, viewonly=True, lazy="raise", **kwargs)
    model.__mapper__.add_property(name, related)


_relate(Member, "user", User, foreign(Member.user_id) == User.id)
_relate(Member, "guild", Guild, foreign(Member.guild_id) == Guild.id)
_relate(
    Member, "stats", MemberStats,
    and_(foreign(Member.guild_id) == MemberStats.guild_id, foreign(Member.user_id) == MemberStats.user_id),
)  # fmt: skip
_relate(MemberStats, "user", User, foreign(MemberStats.user_id) == User.id)
#: Where the user is now; left guilds are not among them.
_relate(
    User, "memberships", Member, and_(User.id == foreign(Member.user_id), Member.left_at.is_(None)),
    order_by=Member.guild_id,
)  # fmt: skip

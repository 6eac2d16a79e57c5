"""Users, and their memberships, statistics and preferences in guilds."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, BigInteger, ColumnElement, Index, Integer, SmallInteger, Text, literal_column, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, Mirrored, created_at_of, marked, related, snowflake, tombstone

if TYPE_CHECKING:
    from models.guilds import Guild


#: Orders an index of names by bytes whatever the collation, so that it serves searches by the beginning of a name.
_BY_BYTES = {"lowered": "text_pattern_ops"}


def _lowered(name: str) -> ColumnElement[str]:
    return literal_column(f"lower({name})", Text).label("lowered")


class User(Mirrored, Base):
    """A Discord account that the bot has seen. No foreign key refers to it, because all guilds share it."""

    __tablename__ = "users"
    __table_args__ = (
        Index("ix_users_lower_username", _lowered("username"), postgresql_ops=_BY_BYTES),
        Index(
            "ix_users_lower_global_name", _lowered("global_name"), postgresql_ops=_BY_BYTES,
            postgresql_where=text("global_name IS NOT NULL"),
        ),
    )  # fmt: skip

    id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    username: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: '0' for users, four digits for bots.
    discriminator: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    global_name: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    avatar: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: Sent by GET /users only; None if it was never requested.
    banner: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    accent_color: Mapped[int | None] = marked(Integer, erase=Erase.CLEAR)
    bot: Mapped[bool | None] = marked()
    system: Mapped[bool | None] = marked()
    public_flags: Mapped[int | None] = marked(BigInteger, erase=Erase.CLEAR)
    #: This and the next four are shown for the bot's own account only.
    flags: Mapped[int | None] = marked(BigInteger, erase=Erase.CLEAR)
    locale: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    mfa_enabled: Mapped[bool | None] = marked(erase=Erase.CLEAR)
    verified: Mapped[bool | None] = marked(erase=Erase.CLEAR)
    premium_type: Mapped[int | None] = marked(SmallInteger, erase=Erase.CLEAR)
    created_at: Mapped[datetime] = marked(created_at_of("id"))

    #: Guilds that the user is in, without those that they left.
    memberships: Mapped[list[Member]] = related(
        "and_(User.id == foreign(Member.user_id), Member.left_at.is_(None))", order_by="Member.guild_id"
    )

    @property
    def avatar_url(self) -> str:
        """The URL of the avatar, or of Discord's default one (Discord API reference, "Image Formatting")."""
        base = "https://cdn.discordapp.com"
        if self.avatar is None:
            index = (self.id >> 22) % 6 if self.discriminator in (None, "0") else int(self.discriminator) % 5
            return f"{base}/embed/avatars/{index}.png"
        extension = "gif" if self.avatar.startswith("a_") else "png"
        return f"{base}/avatars/{self.id}/{self.avatar}.{extension}"


class Member(Mirrored, Base):
    """A user's membership in a guild, present or past."""

    __tablename__ = "members"
    __table_args__ = (
        Index(None, "user_id"),
        Index(None, "roles", postgresql_using="gin"),
        Index(
            "ix_members_guild_id_lower_nick", "guild_id", _lowered("nick"), postgresql_ops=_BY_BYTES,
            postgresql_where=text("nick IS NOT NULL"),
        ),
    )  # fmt: skip

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    nick: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: Hash of the guild-specific avatar.
    avatar: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: Sorted, without @everyone.
    roles: Mapped[list[int]] = marked(ARRAY(BigInteger), nullable=False, server_default="{}", erase=Erase.CLEAR)
    #: None for guests, whom Discord reports without one.
    joined_at: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    premium_since: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    timed_out_until: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    pending: Mapped[bool | None] = marked()
    flags: Mapped[int | None] = marked(Integer)
    #: When the member left; None while they are in the guild.
    left_at: Mapped[datetime | None] = tombstone()

    user: Mapped[User | None] = related("foreign(Member.user_id) == User.id")
    guild: Mapped[Guild | None] = related("foreign(Member.guild_id) == Guild.id")
    stats: Mapped[MemberStats | None] = related(
        "and_(foreign(Member.guild_id) == MemberStats.guild_id, foreign(Member.user_id) == MemberStats.user_id)"
    )


class MemberStats(Base):
    """A member's activity counters in a guild; kept when they leave."""

    __tablename__ = "member_stats"
    __table_args__ = (Index(None, "user_id"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    message_count: Mapped[int] = marked(BigInteger, nullable=False, server_default="0", erase=Erase.CLEAR)
    #: When the last counted message was sent.
    last_active_at: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    #: For cogs that award experience points.
    xp: Mapped[int] = marked(BigInteger, nullable=False, server_default="0", erase=Erase.CLEAR)

    user: Mapped[User | None] = related("foreign(MemberStats.user_id) == User.id")


class MemberPreferences(Base):
    """A member's preferences in a guild; kept when they leave."""

    __tablename__ = "member_preferences"
    __table_args__ = (Index(None, "user_id"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    #: Whether the bot may send unsolicited notifications; None if not chosen.
    notifications: Mapped[bool | None] = marked(erase=Erase.CLEAR)
    #: A language tag (BCP 47) such as `de` or `pt-BR`; None if not chosen.
    language: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: For preferences defined by cogs.
    extra: Mapped[dict[str, Any]] = marked(JSONB, nullable=False, server_default="{}", erase=Erase.CLEAR)


#: The members of each role; Alembic does not compare views. Joins `roles`, because a view over unnest(roles) could not
#: use the GIN index.
ROLE_MEMBERSHIP = """
CREATE VIEW role_membership AS
SELECT r.guild_id, r.id AS role_id, m.user_id
FROM roles AS r
JOIN members AS m ON m.guild_id = r.guild_id AND m.roles @> ARRAY[r.id]
WHERE r.deleted_at IS NULL AND m.left_at IS NULL
""".strip()

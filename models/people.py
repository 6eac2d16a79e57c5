"""Users, and their memberships in guilds."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, BigInteger, Index, Integer, SmallInteger, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped

from models.base import Base, Erase, Mirrored, created_at_of, marked, snowflake, tombstone

if TYPE_CHECKING:
    from models.guilds import Guild


class User(Mirrored, Base):
    """A Discord account that the bot has seen. Nothing refers to it by foreign key: it is shared by all guilds."""

    __tablename__ = "users"

    id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    username: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: '0' for people, four digits for bots.
    discriminator: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    global_name: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    avatar: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: None also where it was never asked for: only GET /users sends it.
    banner: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    accent_color: Mapped[int | None] = marked(Integer, erase=Erase.CLEAR)
    bot: Mapped[bool | None] = marked()
    system: Mapped[bool | None] = marked()
    public_flags: Mapped[int | None] = marked(BigInteger, erase=Erase.CLEAR)
    #: This and the next four: for the bot's own account only, Discord shows them of no one else.
    flags: Mapped[int | None] = marked(BigInteger, erase=Erase.CLEAR)
    locale: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    mfa_enabled: Mapped[bool | None] = marked(erase=Erase.CLEAR)
    verified: Mapped[bool | None] = marked(erase=Erase.CLEAR)
    premium_type: Mapped[int | None] = marked(SmallInteger, erase=Erase.CLEAR)
    created_at: Mapped[datetime] = marked(created_at_of("id"))

    if TYPE_CHECKING:  # added in models/relations.py
        memberships: Mapped[list[Member]]

    @property
    def avatar_url(self) -> str:
        """The address of the avatar, or of Discord's default one (Discord API reference, "Image Formatting")."""
        base = "https://cdn.discordapp.com"
        if self.avatar is None:
            index = (self.id >> 22) % 6 if self.discriminator in (None, "0") else int(self.discriminator) % 5
            return f"{base}/embed/avatars/{index}.png"
        extension = "gif" if self.avatar.startswith("a_") else "png"
        return f"{base}/avatars/{self.id}/{self.avatar}.{extension}"


class Member(Mirrored, Base):
    """A user's membership in a guild, present or past."""

    __tablename__ = "members"
    __table_args__ = (Index(None, "user_id"), Index(None, "roles", postgresql_using="gin"))

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    nick: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: Hash of the avatar for this guild alone.
    avatar: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: Sorted, without @everyone.
    roles: Mapped[list[int]] = marked(ARRAY(BigInteger), nullable=False, server_default="{}", erase=Erase.CLEAR)
    #: None for guests whom Discord reports without one.
    joined_at: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    premium_since: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    timed_out_until: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    pending: Mapped[bool | None] = marked()
    flags: Mapped[int | None] = marked(Integer)
    #: When the member left; None while they are there.
    left_at: Mapped[datetime | None] = tombstone()

    if TYPE_CHECKING:  # added in models/relations.py
        user: Mapped[User | None]
        guild: Mapped[Guild | None]
        stats: Mapped[MemberStats | None]


class MemberStats(Base):
    """What a member did in a guild, added up; it stays when they leave."""

    __tablename__ = "member_stats"
    __table_args__ = (Index(None, "user_id"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    message_count: Mapped[int] = marked(BigInteger, nullable=False, server_default="0", erase=Erase.CLEAR)
    #: When the last message that was counted was written.
    last_active_at: Mapped[datetime | None] = marked(erase=Erase.CLEAR)
    #: For cogs that hand out points.
    xp: Mapped[int] = marked(BigInteger, nullable=False, server_default="0", erase=Erase.CLEAR)

    if TYPE_CHECKING:  # added in models/relations.py
        user: Mapped[User | None]


class MemberPreferences(Base):
    """What a member chose in a guild; it stays when they leave."""

    __tablename__ = "member_preferences"
    __table_args__ = (Index(None, "user_id"),)

    guild_id: Mapped[int] = snowflake(primary_key=True)
    user_id: Mapped[int] = snowflake(primary_key=True, erase=Erase.SUBJECT)
    #: Whether the bot may notify them of its own accord; None: they did not choose.
    notifications: Mapped[bool | None] = marked(erase=Erase.CLEAR)
    #: A language tag (BCP 47) like `de` or `pt-BR`; None: they did not choose.
    language: Mapped[str | None] = marked(Text, erase=Erase.CLEAR)
    #: For cogs that let members choose more.
    extra: Mapped[dict[str, Any]] = marked(JSONB, nullable=False, server_default="{}", erase=Erase.CLEAR)

"""Events: joins and leaves, member statistics, and the state that keeps both exactly-once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)
TIME_ID = (
    "(((extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1420070400000) << 22)"
    " | (nextval('ops.change_ids') & 4194303)"
)


def upgrade() -> None:
    op.create_table(
        "member_events",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), server_default=sa.text(TIME_ID), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", TIMESTAMP, nullable=False),
        sa.Column("inferred", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("earliest", TIMESTAMP),
        sa.Column("latest", TIMESTAMP),
        sa.Column("stamp", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("kind IN ('join', 'leave', 'ban', 'unban')", name=op.f("ck_member_events_kind")),
        sa.PrimaryKeyConstraint("guild_id", "id", name=op.f("pk_member_events")),
    )
    op.create_index(op.f("ix_member_events_guild_id_user_id_stamp"), "member_events", ["guild_id", "user_id", "stamp"])
    op.create_index(op.f("ix_member_events_user_id"), "member_events", ["user_id"])
    op.create_table(
        "member_stats",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("message_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_active_at", TIMESTAMP),
        sa.Column("xp", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("guild_id", "user_id", name=op.f("pk_member_stats")),
    )
    op.create_index(op.f("ix_member_stats_user_id"), "member_stats", ["user_id"])
    op.create_table(
        "positions",
        sa.Column("journal", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("journal", name=op.f("pk_positions")),
        schema="ops",
    )
    op.create_table(
        "counted_messages",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_counted_messages")),
        schema="ops",
    )
    op.create_table(
        "dead_letters",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("key", JSONB(), nullable=False),
        sa.Column("user_id", sa.BigInteger()),
        sa.Column("payload", JSONB()),
        sa.Column("stamp", sa.BigInteger(), nullable=False),
        sa.Column("sqlstate", sa.Text()),
        sa.Column("error", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dead_letters")),
        schema="ops",
    )
    op.create_index(op.f("ix_dead_letters_at"), "dead_letters", ["at"], schema="ops")


def downgrade() -> None:
    for table in ("dead_letters", "counted_messages", "positions"):
        op.drop_table(table, schema="ops")
    op.drop_table("member_stats")
    op.drop_table("member_events")

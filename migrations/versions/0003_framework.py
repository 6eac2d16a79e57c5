"""Framework: documents, member preferences, and whether a change was inferred."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)
HISTORY = ("changes", "user_changes")


def upgrade() -> None:
    op.create_table(
        "documents",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(collation="C"), nullable=False),
        sa.Column("value", JSONB(), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("updated_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("quarantined", JSONB()),
        sa.Column("problem", sa.Text()),
        sa.PrimaryKeyConstraint("guild_id", "namespace", "key", name=op.f("pk_documents")),
    )
    op.create_table(
        "member_preferences",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("notifications", sa.Boolean()),
        sa.Column("language", sa.Text()),
        sa.Column("extra", JSONB(), server_default="{}", nullable=False),
        sa.PrimaryKeyConstraint("guild_id", "user_id", name=op.f("pk_member_preferences")),
    )
    op.create_index(op.f("ix_member_preferences_user_id"), "member_preferences", ["user_id"])
    for table in HISTORY:  # a constant default: no row is rewritten; partitions inherit it
        op.add_column(table, sa.Column("inferred", sa.Boolean(), server_default=sa.false(), nullable=False))
    # Changes are delivered in the order of their ids. Partitioned tables cannot have an index created concurrently.
    op.execute("-- squawk-ignore require-concurrent-index-creation\nCREATE INDEX ix_changes_id ON changes (id)")
    op.execute(
        "-- squawk-ignore require-concurrent-index-creation\nCREATE INDEX ix_user_changes_id ON user_changes (id)"
    )
    op.execute(
        "-- squawk-ignore require-concurrent-index-creation\nCREATE INDEX ix_member_events_id ON member_events (id)"
    )


def downgrade() -> None:
    for table in (*HISTORY, "member_events"):
        op.drop_index(op.f(f"ix_{table}_id"), table)
    for table in HISTORY:
        op.drop_column(table, "inferred")
    op.drop_table("member_preferences")
    op.drop_table("documents")

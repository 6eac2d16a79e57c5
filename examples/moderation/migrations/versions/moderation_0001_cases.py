"""Create the cases and their numbers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "moderation_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "moderation_cases",
        sa.Column("guild_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("moderator_id", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("state", sa.Text(), server_default="open", nullable=False),
        sa.PrimaryKeyConstraint("guild_id", "number", name=op.f("pk_moderation_cases")),
    )
    op.create_index("ix_moderation_cases_member", "moderation_cases", ["guild_id", "user_id"])
    is_done = sa.text("state = 'done'")
    op.create_index("ix_moderation_cases_due", "moderation_cases", ["expires_at"], postgresql_where=is_done)
    op.create_table(
        "moderation_last_cases",
        sa.Column("guild_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("guild_id", name=op.f("pk_moderation_last_cases")),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("moderation_last_cases")
    op.drop_table("moderation_cases")

"""Create the accounts and the purchases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "economy_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "economy_accounts",
        sa.Column("guild_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("coins", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("daily_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("coins >= 0", name=op.f("ck_economy_accounts_not_negative")),
        sa.PrimaryKeyConstraint("guild_id", "user_id", name=op.f("pk_economy_accounts")),
    )
    op.create_table(
        "economy_purchases",
        sa.Column("guild_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("item", sa.Text(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("guild_id", "user_id", "item", name=op.f("pk_economy_purchases")),
    )


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("economy_purchases")
    op.drop_table("economy_accounts")

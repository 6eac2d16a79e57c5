"""Names: indexes for searches of members and users by the beginning of a name."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

#: `text_pattern_ops` orders by bytes, whatever the collation. In full, because what is ours is read from the revisions.
INDEXES = {
    "ix_users_lower_username": "CREATE INDEX ix_users_lower_username ON users (lower(username) text_pattern_ops)",
    "ix_users_lower_global_name": (
        "CREATE INDEX ix_users_lower_global_name ON users (lower(global_name) text_pattern_ops)"
        " WHERE global_name IS NOT NULL"
    ),
    "ix_members_guild_id_lower_nick": (
        "CREATE INDEX ix_members_guild_id_lower_nick ON members (guild_id, lower(nick) text_pattern_ops)"
        " WHERE nick IS NOT NULL"
    ),
}


def upgrade() -> None:
    # Writes wait meanwhile, for some seconds with a million members; the mirror keeps what comes in.
    for statement in INDEXES.values():
        op.execute(f"-- squawk-ignore require-concurrent-index-creation\n{statement}")


def downgrade() -> None:
    for name in INDEXES:
        op.execute(f"-- squawk-ignore require-concurrent-index-deletion\nDROP INDEX {name}")

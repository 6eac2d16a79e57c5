"""Names: indexes for searches of members and users by the beginning of a name."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

#: By name of the index, its table and what it indexes. `text_pattern_ops` orders by bytes, whatever the collation.
INDEXES = {
    "ix_users_lower_username": ("users", "(lower(username) text_pattern_ops)"),
    "ix_users_lower_global_name": (
        "users",
        "(lower(global_name) text_pattern_ops) WHERE global_name IS NOT NULL",
    ),
    "ix_members_guild_id_lower_nick": (
        "members",
        "(guild_id, lower(nick) text_pattern_ops) WHERE nick IS NOT NULL",
    ),
}


def upgrade() -> None:
    # Writes wait meanwhile, for some seconds with a million members; the mirror keeps what comes in.
    for name, (table, columns) in INDEXES.items():
        op.execute(f"-- squawk-ignore require-concurrent-index-creation\nCREATE INDEX {name} ON {table} {columns}")


def downgrade() -> None:
    for name in INDEXES:
        op.execute(f"-- squawk-ignore require-concurrent-index-deletion\nDROP INDEX {name}")

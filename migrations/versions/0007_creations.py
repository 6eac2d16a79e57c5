"""Creations: recorded like other changes; dead letters name the cog whose row or listener failed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

DROP = "-- squawk-ignore ban-drop-constraint\nALTER TABLE changes DROP CONSTRAINT ck_changes_action"
# Nothing is inserted while the rows are checked, which takes about a second for ten million of them.
ADD = """\
-- squawk-ignore constraint-missing-not-valid
ALTER TABLE changes ADD CONSTRAINT ck_changes_action CHECK (action IN ({actions}))"""
ACTIONS = ("update", "remove", "return")


def upgrade() -> None:
    op.execute(DROP)
    op.execute(ADD.format(actions=_quoted("create", *ACTIONS)))
    op.add_column("dead_letters", sa.Column("cog", sa.Text(), nullable=True), schema="ops")


def downgrade() -> None:
    op.drop_column("dead_letters", "cog", schema="ops")
    op.execute(DROP)
    op.execute("DELETE FROM changes WHERE action = 'create'")
    op.execute(ADD.format(actions=_quoted(*ACTIONS)))


def _quoted(*actions: str) -> str:
    return ", ".join(f"'{action}'" for action in actions)

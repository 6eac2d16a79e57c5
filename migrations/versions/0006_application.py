"""Application: whose bot the database belongs to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

#: The one application that has registered its commands from this database; none if there are several.
TAKE_OVER = """\
INSERT INTO ops.application (id) SELECT max(application_id) FROM ops.command_trees
HAVING count(DISTINCT application_id) = 1"""


def upgrade() -> None:
    op.create_table(
        "application",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("is_only", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("is_only", name=op.f("ck_application_is_only")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_application")),
        sa.UniqueConstraint("is_only", name=op.f("uq_application_is_only")),
        schema="ops",
    )
    op.execute(TAKE_OVER)


def downgrade() -> None:
    op.drop_table("application", schema="ops")

"""Migrations: who applied which revision when, and whether AUTO_MIGRATE is paused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

#: Operators' upgrades and downgrades, which earlier versions recorded in the text of a command's result alone.
RECORD_FORMER_COMMANDS = """\
INSERT INTO ops.migrations (at, revision, action, applied_by, user_id)
SELECT action.at, step.revision, CASE found.match[1] WHEN 'applied' THEN 'upgrade' ELSE 'downgrade' END,
    CASE WHEN action.user_id IS NULL THEN 'command line' ELSE 'discord' END, action.user_id
FROM ops.admin_actions AS action
CROSS JOIN LATERAL regexp_matches(action.result, '^(applied|taken back): ([0-9, ]+)$', 'n') AS found (match)
CROSS JOIN LATERAL unnest(string_to_array(found.match[2], ', ')) WITH ORDINALITY AS step (revision, position)
WHERE action.command IN ('db upgrade', 'db downgrade', 'db migrate upgrade', 'db migrate downgrade')
ORDER BY action.id, step.position"""
#: A pause of AUTO_MIGRATE, which earlier versions kept in a comment.
TAKE_OVER_PAUSE = """\
INSERT INTO ops.migrations (revision, action, reason, applied_by)
SELECT version.version_num, 'pause', substr(comment.text, length('AUTO_MIGRATE is off: ') + 1), 'command line'
FROM guildbook_version AS version
CROSS JOIN obj_description('guildbook_version'::regclass, 'pg_class') AS comment (text)
WHERE starts_with(comment.text, 'AUTO_MIGRATE is off: ')"""


def upgrade() -> None:
    op.create_table(
        "migrations",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double()),
        sa.Column("reason", sa.Text()),
        sa.Column("applied_by", sa.Text(), nullable=False),
        sa.Column("user_id", sa.BigInteger()),
        sa.CheckConstraint(
            "action IN ('upgrade', 'downgrade', 'stamp', 'pause', 'resume')", name=op.f("ck_migrations_action")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_migrations")),
        schema="ops",
    )
    op.execute(RECORD_FORMER_COMMANDS)
    op.execute(TAKE_OVER_PAUSE)


def downgrade() -> None:
    # A pause outlives it: whoever downgrades below this revision writes the comment (utils.operations.migrations).
    op.drop_table("migrations", schema="ops")

"""Foundation: guilds, people, history, and the schema ops."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# A revision copies what it needs from the models, so that later changes of the models do not change it.
NOW = sa.text("now()")
TIMESTAMP = sa.DateTime(timezone=True)
CREATED_AT = "to_timestamp(((id >> 22) + 1420070400000) / 1000.0)"
TIME_ID = (
    "(((extract(epoch FROM clock_timestamp()) * 1000)::bigint - 1420070400000) << 22)"
    " | (nextval('ops.change_ids') & 4194303)"
)
PARTITIONED = ("changes", "user_changes")
ROLE_MEMBERSHIP = """
CREATE VIEW role_membership AS
SELECT r.guild_id, r.id AS role_id, m.user_id
FROM roles AS r
JOIN members AS m ON m.guild_id = r.guild_id AND m.roles @> ARRAY[r.id]
WHERE r.deleted_at IS NULL AND m.left_at IS NULL
"""


def upgrade() -> None:
    # One who may not create schemas has it made by an administrator.
    if op.get_context().as_sql or op.get_bind().scalar(sa.text("SELECT to_regnamespace('ops') IS NULL")):
        op.execute("CREATE SCHEMA ops")
    op.execute(sa.schema.CreateSequence(sa.Sequence("change_ids", schema="ops")))
    _guilds()
    _people()
    _history()
    _ops()
    op.execute(ROLE_MEMBERSHIP)


def downgrade() -> None:
    op.execute("DROP VIEW role_membership")
    for table in ("suppressions", "command_trees", "admin_actions", "leases"):
        op.drop_table(table, schema="ops")
    # Dropping a partitioned table drops its partitions with it.
    for table in ("sync_runs", "user_changes", "changes", "members", "users", "threads", "channels", "roles", "guilds"):
        op.drop_table(table)
    op.execute(sa.schema.DropSequence(sa.Sequence("change_ids", schema="ops")))
    op.execute("DROP SCHEMA ops")


def _stamps() -> tuple[sa.Column[int], sa.Column[object]]:
    return (
        sa.Column("stamp", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("updated_at", TIMESTAMP, server_default=NOW, nullable=False),
    )


def _guilds() -> None:
    """Create guilds and what belongs to them."""
    op.create_table(
        "guilds",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("icon", sa.Text()),
        sa.Column("splash", sa.Text()),
        sa.Column("discovery_splash", sa.Text()),
        sa.Column("banner", sa.Text()),
        sa.Column("description", sa.Text()),
        sa.Column("owner_id", sa.BigInteger()),
        sa.Column("preferred_locale", sa.Text()),
        sa.Column("afk_channel_id", sa.BigInteger()),
        sa.Column("afk_timeout", sa.Integer()),
        sa.Column("verification_level", sa.SmallInteger()),
        sa.Column("default_message_notifications", sa.SmallInteger()),
        sa.Column("explicit_content_filter", sa.SmallInteger()),
        sa.Column("mfa_level", sa.SmallInteger()),
        sa.Column("nsfw_level", sa.SmallInteger()),
        sa.Column("application_id", sa.BigInteger()),
        sa.Column("system_channel_id", sa.BigInteger()),
        sa.Column("system_channel_flags", sa.Integer()),
        sa.Column("rules_channel_id", sa.BigInteger()),
        sa.Column("public_updates_channel_id", sa.BigInteger()),
        sa.Column("joined_at", TIMESTAMP),
        sa.Column("large", sa.Boolean()),
        sa.Column("unavailable", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("member_count", sa.Integer()),
        sa.Column("max_members", sa.Integer()),
        sa.Column("premium_tier", sa.SmallInteger()),
        sa.Column("premium_subscription_count", sa.Integer()),
        sa.Column("vanity_url_code", sa.Text()),
        sa.Column("features", sa.ARRAY(sa.Text())),
        sa.Column("created_at", TIMESTAMP, sa.Computed(CREATED_AT, persisted=True), nullable=False),
        sa.Column("left_at", TIMESTAMP),
        sa.Column("is_active", sa.Boolean(), sa.Computed("left_at IS NULL", persisted=True), nullable=False),
        *_stamps(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_guilds")),
    )
    op.create_table(
        "roles",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("color", sa.Integer()),
        sa.Column("hoist", sa.Boolean()),
        sa.Column("icon", sa.Text()),
        sa.Column("unicode_emoji", sa.Text()),
        sa.Column("position", sa.Integer()),
        sa.Column("permissions", sa.BigInteger()),
        sa.Column("managed", sa.Boolean()),
        sa.Column("mentionable", sa.Boolean()),
        sa.Column("tags", JSONB()),
        sa.Column("flags", sa.Integer()),
        sa.Column("deleted_at", TIMESTAMP),
        *_stamps(),
        sa.PrimaryKeyConstraint("guild_id", "id", name=op.f("pk_roles")),
    )
    op.create_table(
        "channels",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("type", sa.SmallInteger()),
        sa.Column("parent_id", sa.BigInteger()),
        sa.Column("position", sa.Integer()),
        sa.Column("topic", sa.Text()),
        sa.Column("nsfw", sa.Boolean()),
        sa.Column("slowmode", sa.Integer()),
        sa.Column("permission_overwrites", JSONB()),
        sa.Column("bitrate", sa.Integer()),
        sa.Column("user_limit", sa.Integer()),
        sa.Column("rtc_region", sa.Text()),
        sa.Column("default_auto_archive_duration", sa.Integer()),
        sa.Column("flags", sa.BigInteger()),
        sa.Column("hidden", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("deleted_at", TIMESTAMP),
        *_stamps(),
        sa.PrimaryKeyConstraint("guild_id", "id", name=op.f("pk_channels")),
    )
    op.create_index(op.f("ix_channels_guild_id_parent_id"), "channels", ["guild_id", "parent_id"])
    op.create_table(
        "threads",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("type", sa.SmallInteger()),
        sa.Column("parent_id", sa.BigInteger()),
        sa.Column("owner_id", sa.BigInteger()),
        sa.Column("archived", sa.Boolean()),
        sa.Column("locked", sa.Boolean()),
        sa.Column("invitable", sa.Boolean()),
        sa.Column("auto_archive_duration", sa.Integer()),
        sa.Column("archived_at", TIMESTAMP),
        sa.Column("slowmode", sa.Integer()),
        sa.Column("flags", sa.BigInteger()),
        sa.Column("applied_tags", sa.ARRAY(sa.BigInteger())),
        sa.Column("deleted_at", TIMESTAMP),
        *_stamps(),
        sa.PrimaryKeyConstraint("guild_id", "id", name=op.f("pk_threads")),
    )
    op.create_index(op.f("ix_threads_guild_id_parent_id"), "threads", ["guild_id", "parent_id"])


def _people() -> None:
    """Create users and memberships; no foreign key references users."""
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("username", sa.Text()),
        sa.Column("discriminator", sa.Text()),
        sa.Column("global_name", sa.Text()),
        sa.Column("avatar", sa.Text()),
        sa.Column("banner", sa.Text()),
        sa.Column("accent_color", sa.Integer()),
        sa.Column("bot", sa.Boolean()),
        sa.Column("system", sa.Boolean()),
        sa.Column("public_flags", sa.BigInteger()),
        sa.Column("flags", sa.BigInteger()),
        sa.Column("locale", sa.Text()),
        sa.Column("mfa_enabled", sa.Boolean()),
        sa.Column("verified", sa.Boolean()),
        sa.Column("premium_type", sa.SmallInteger()),
        sa.Column("created_at", TIMESTAMP, sa.Computed(CREATED_AT, persisted=True), nullable=False),
        *_stamps(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
    )
    op.create_table(
        "members",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("nick", sa.Text()),
        sa.Column("avatar", sa.Text()),
        sa.Column("roles", sa.ARRAY(sa.BigInteger()), server_default="{}", nullable=False),
        sa.Column("joined_at", TIMESTAMP),
        sa.Column("premium_since", TIMESTAMP),
        sa.Column("timed_out_until", TIMESTAMP),
        sa.Column("pending", sa.Boolean()),
        sa.Column("flags", sa.Integer()),
        sa.Column("left_at", TIMESTAMP),
        *_stamps(),
        sa.PrimaryKeyConstraint("guild_id", "user_id", name=op.f("pk_members")),
    )
    op.create_index(op.f("ix_members_roles"), "members", ["roles"], postgresql_using="gin")
    op.create_index(op.f("ix_members_user_id"), "members", ["user_id"])


def _history() -> None:
    """Create the change history, partitioned by time-ordered id, and the runs of the reconcile."""
    op.create_table(
        "changes",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), server_default=sa.text(TIME_ID), nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("key", JSONB(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("user_id", sa.BigInteger()),
        sa.Column("before", JSONB()),
        sa.Column("after", JSONB()),
        sa.Column("at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.CheckConstraint("action IN ('update', 'remove', 'return')", name=op.f("ck_changes_action")),
        sa.PrimaryKeyConstraint("guild_id", "id", name=op.f("pk_changes")),
        postgresql_partition_by="RANGE (id)",
    )
    op.create_index(
        op.f("ix_changes_user_id_id"), "changes", ["user_id", "id"], postgresql_where=sa.text("user_id IS NOT NULL")
    )
    op.create_table(
        "user_changes",
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), server_default=sa.text(TIME_ID), nullable=False),
        sa.Column("table_name", sa.Text(), nullable=False),
        sa.Column("key", JSONB(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("before", JSONB()),
        sa.Column("after", JSONB()),
        sa.Column("at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.CheckConstraint("action IN ('update', 'remove', 'return')", name=op.f("ck_user_changes_action")),
        sa.PrimaryKeyConstraint("user_id", "id", name=op.f("pk_user_changes")),
        postgresql_partition_by="RANGE (id)",
    )
    op.create_table(
        "sync_runs",
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.BigInteger(), server_default=sa.text(TIME_ID), nullable=False),
        sa.Column("started_at", TIMESTAMP, nullable=False),
        sa.Column("finished_at", TIMESTAMP, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("stamp", sa.BigInteger()),
        sa.Column("pages", sa.Integer(), nullable=False),
        sa.Column("rows_seen", sa.Integer(), nullable=False),
        sa.Column("rows_inserted", sa.Integer(), nullable=False),
        sa.Column("rows_updated", sa.Integer(), nullable=False),
        sa.Column("rows_left", sa.Integer(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint("source IN ('gateway', 'rest')", name=op.f("ck_sync_runs_source")),
        sa.CheckConstraint("state IN ('complete', 'failed')", name=op.f("ck_sync_runs_state")),
        sa.PrimaryKeyConstraint("guild_id", "id", name=op.f("pk_sync_runs")),
    )
    op.create_index(
        "ix_sync_runs_guild_id_stamp",
        "sync_runs",
        ["guild_id", "stamp"],
        postgresql_where=sa.text("state = 'complete'"),
    )
    for table in PARTITIONED:
        op.execute(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT")


def _ops() -> None:
    """Create the running bot's own state, which a restore never overwrites."""
    op.create_table(
        "leases",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("taken_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("expires_at", TIMESTAMP),
        sa.PrimaryKeyConstraint("shard", name=op.f("pk_leases")),
        schema="ops",
    )
    op.create_table(
        "admin_actions",
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.Column("user_id", sa.BigInteger()),
        sa.Column("command", sa.Text(), nullable=False),
        sa.Column("arguments", JSONB(), server_default="{}", nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_admin_actions")),
        schema="ops",
    )
    op.create_index(op.f("ix_admin_actions_at"), "admin_actions", ["at"], schema="ops")
    op.create_table(
        "command_trees",
        sa.Column("application_id", sa.BigInteger(), nullable=False),
        sa.Column("guild_id", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("synced_at", TIMESTAMP, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("application_id", "guild_id", name=op.f("pk_command_trees")),
        schema="ops",
    )
    op.create_table(
        "suppressions",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("since", TIMESTAMP, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_suppressions")),
        schema="ops",
    )

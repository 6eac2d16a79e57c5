"""Views, as versioned SQL: Alembic compares tables and indexes only."""

#: Who holds which role. Joined from `roles`, because a view over unnest(roles) cannot use the GIN index.
ROLE_MEMBERSHIP = """
CREATE VIEW role_membership AS
SELECT r.guild_id, r.id AS role_id, m.user_id
FROM roles AS r
JOIN members AS m ON m.guild_id = r.guild_id AND m.roles @> ARRAY[r.id]
WHERE r.deleted_at IS NULL AND m.left_at IS NULL
""".strip()

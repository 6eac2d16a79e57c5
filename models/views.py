"""Definitions of views, which Alembic does not compare."""

#: The members of each role. Joins `roles`, because a view over unnest(roles) could not use the GIN index.
ROLE_MEMBERSHIP = """
CREATE VIEW role_membership AS
SELECT r.guild_id, r.id AS role_id, m.user_id
FROM roles AS r
JOIN members AS m ON m.guild_id = r.guild_id AND m.roles @> ARRAY[r.id]
WHERE r.deleted_at IS NULL AND m.left_at IS NULL
""".strip()

-- The rows of people as they are before live rows are merged.

-- name: select_members
-- Return rows of `members`. $1 guild ids, $2 user ids (parallel arrays).
SELECT m.*
FROM unnest($1::bigint[], $2::bigint[]) AS k(guild_id, user_id)
JOIN members m ON m.guild_id = k.guild_id AND m.user_id = k.user_id


-- name: select_users
-- Return rows of `users`. $1 ids.
SELECT u.* FROM users u WHERE u.id = ANY($1::bigint[])

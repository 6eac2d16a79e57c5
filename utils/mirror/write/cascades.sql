-- What Discord sends no event for: what a deleted role, a deleted channel and a new session imply for other rows.
-- Each statement returns how many rows it changed and records them in `changes`.

-- name: strip_deleted_roles
-- Remove deleted roles from the role lists of members.
-- $1 guild ids, $2 role ids (parallel arrays); $3 whether a listing proved the deletion.
-- The members' stamps stay: no dispatch named these members, so a listing requested before the deletion is still newer in
-- every other column.
WITH deleted AS (
    SELECT * FROM unnest($1::bigint[], $2::bigint[]) AS d(guild_id, id)
),
matched AS MATERIALIZED (
    SELECT m.guild_id,
           m.user_id,
           m.roles AS old_roles,
           ARRAY(SELECT r FROM unnest(m.roles) AS r WHERE r <> ALL(array_agg(d.id)) ORDER BY r) AS roles
    FROM deleted d
    JOIN members m ON m.guild_id = d.guild_id AND m.roles @> ARRAY[d.id]
    GROUP BY m.guild_id, m.user_id, m.roles
),
updated AS (
    UPDATE members t
    SET roles = m.roles, updated_at = now()
    FROM matched m
    WHERE t.guild_id = m.guild_id AND t.user_id = m.user_id
    RETURNING t.guild_id, t.user_id
),
history AS (
    INSERT INTO changes (guild_id, user_id, table_name, key, action, before, after, inferred)
    SELECT m.guild_id,
           m.user_id,
           'members',
           jsonb_build_object('guild_id', m.guild_id, 'user_id', m.user_id),
           'update',
           jsonb_build_object('roles', m.old_roles),
           jsonb_build_object('roles', m.roles),
           $3::boolean
    FROM matched m
    JOIN updated u ON u.guild_id = m.guild_id AND u.user_id = m.user_id
)
SELECT count(*) FROM updated


-- name: delete_threads_of_channels
-- Tombstone the threads of deleted channels.
-- $1 guild ids, $2 channel ids, $3 stamps (parallel arrays); $4 the time; $5 whether a listing proved the deletion.
WITH deleted AS (
    SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS d(guild_id, id, stamp)
),
matched AS MATERIALIZED (
    SELECT t.guild_id,
           t.id,
           t.owner_id,
           t.deleted_at AS old_deleted_at,
           $4::timestamptz AS deleted_at,
           greatest(t.stamp, d.stamp) AS stamp
    FROM deleted d
    JOIN threads t ON t.guild_id = d.guild_id AND t.parent_id = d.id
    WHERE t.deleted_at IS NULL
),
updated AS (
    UPDATE threads t
    SET deleted_at = m.deleted_at, stamp = m.stamp, updated_at = now()
    FROM matched m
    WHERE t.guild_id = m.guild_id AND t.id = m.id
    RETURNING t.guild_id, t.id
),
history AS (
    INSERT INTO changes (guild_id, user_id, table_name, key, action, before, after, inferred)
    SELECT m.guild_id,
           m.owner_id,
           'threads',
           jsonb_build_object('guild_id', m.guild_id, 'id', m.id),
           'remove',
           jsonb_build_object('deleted_at', m.old_deleted_at),
           jsonb_build_object('deleted_at', m.deleted_at),
           $5::boolean
    FROM matched m
    JOIN updated u ON u.guild_id = m.guild_id AND u.id = m.id
)
SELECT count(*) FROM updated


-- name: leave_unlisted_guilds
-- Mark as left the guilds of a shard that its READY did not name: READY names every guild that the bot is in.
-- $1 shard id, $2 number of shards, $3 guild ids of READY, $4 its stamp, $5 the time.
WITH matched AS MATERIALIZED (
    SELECT g.id, g.left_at AS old_left_at, $5::timestamptz AS left_at
    FROM guilds g
    WHERE g.left_at IS NULL
      AND (g.id >> 22) % $2::int = $1::int
      AND g.id <> ALL($3::bigint[])
      AND g.stamp < $4::bigint
),
updated AS (
    UPDATE guilds t
    SET left_at = m.left_at, stamp = $4, updated_at = now()
    FROM matched m
    WHERE t.id = m.id
    RETURNING t.id
),
history AS (
    INSERT INTO changes (guild_id, table_name, key, action, before, after, inferred)
    SELECT m.id,
           'guilds',
           jsonb_build_object('id', m.id),
           'remove',
           jsonb_build_object('left_at', m.old_left_at),
           jsonb_build_object('left_at', m.left_at),
           true
    FROM matched m
    JOIN updated u ON u.id = m.id
)
SELECT count(*) FROM updated

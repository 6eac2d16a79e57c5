-- What the change feed reads.

-- name: select_horizon
-- Return the ids of now (`present`) and of the horizon: every change with an id below the horizon is visible or was
-- rolled back. $1 the first millisecond of 2015, zero of a snowflake. Both are rounded as models.base.time_id does.
--
-- A transaction that inserts holds ROW EXCLUSIVE on the table from before it takes its first id from the clock until
-- after it is visible. So what is not visible yet has an id from the start of the oldest such transaction on. (Whether a
-- backend has a transaction id does not tell: it gets one with its first row, after its first id.) A start that is
-- hidden, because it is another role's or has just ended, counts as the beginning of time: nothing is passed.
WITH writers AS (
    SELECT DISTINCT pid
    FROM pg_locks
    WHERE locktype = 'relation'
      AND granted
      AND mode = 'RowExclusiveLock'
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND relation IN ('changes'::regclass, 'user_changes'::regclass, 'member_events'::regclass)
),
moments AS (
    SELECT now() AS present,
           least(now(), (
               SELECT min(coalesce(xact_start, to_timestamp(0)))
               FROM writers
               LEFT JOIN pg_stat_activity USING (pid)
           )) AS horizon
)
SELECT ((extract(epoch FROM present) * 1000)::bigint - $1::bigint) << 22 AS present,
       ((extract(epoch FROM horizon) * 1000)::bigint - $1::bigint) << 22 AS horizon
FROM moments


-- name: select_changes
-- Return changes in the order of their ids. $1 the position, $2 the horizon, $3 how many at most.
SELECT * FROM (
    (SELECT id, table_name, key, action, guild_id, user_id, before, after, inferred, at
     FROM changes
     WHERE id > $1 AND id < $2
     ORDER BY id
     LIMIT $3)
    UNION ALL
    (SELECT id, table_name, key, action, NULL, user_id, before, after, inferred, at
     FROM user_changes
     WHERE id > $1 AND id < $2
     ORDER BY id
     LIMIT $3)
    UNION ALL
    (SELECT id, 'member_events', jsonb_build_object('guild_id', guild_id, 'user_id', user_id), kind, guild_id, user_id,
            NULL, NULL, inferred, at
     FROM member_events
     WHERE id > $1 AND id < $2
     ORDER BY id
     LIMIT $3)
) AS recorded
ORDER BY id
LIMIT $3


-- name: select_listeners
-- The positions of listeners. $1 what their names begin with.
SELECT journal, position FROM ops.positions WHERE starts_with(journal, $1)

-- The statements that write events: messages counted, joins, leaves and bans, and how far each journal has been written.

-- name: count_messages
-- Count the messages whose ids are new. Returns how many there were.
-- $1 guild ids, $2 user ids, $3 message ids (parallel arrays); $4 the first millisecond of 2015, zero of a snowflake.
WITH given AS MATERIALIZED (
    SELECT DISTINCT ON (id) *
    FROM unnest($1::bigint[], $2::bigint[], $3::bigint[]) AS g(guild_id, user_id, id)
    ORDER BY id
),
counted AS (
    INSERT INTO ops.counted_messages (id)
    SELECT id FROM given
    ON CONFLICT (id) DO NOTHING
    RETURNING id
),
totals AS (
    SELECT guild_id, user_id, count(*) AS messages, max(id) AS newest
    FROM given JOIN counted USING (id)
    GROUP BY guild_id, user_id
),
updated_stats AS (
    INSERT INTO member_stats AS s (guild_id, user_id, message_count, last_active_at)
    SELECT guild_id, user_id, messages, to_timestamp(((newest >> 22) + $4::bigint) / 1000.0)
    FROM totals
    ORDER BY guild_id, user_id
    ON CONFLICT (guild_id, user_id) DO UPDATE
    SET message_count = s.message_count + excluded.message_count,
        last_active_at = greatest(s.last_active_at, excluded.last_active_at)
)
SELECT count(*) FROM counted


-- name: record_memberships
-- Record joins, leaves, bans and unbans, leaving out those that are already recorded. Returns how many were new.
--
-- $1 guild ids, $2 user ids, $3 kinds, $4 times, $5 stamps, $6 when each was received (parallel arrays);
-- $7 the first stamp of this lease epoch; $8 and $9 the first and last stamp to write (the other events are only
-- compared with); $10 the number of counter bits in a stamp (the bits above them are the epoch).
--
-- A join is identified by its time, which Discord sends. Of a leave or a ban each process knows only when it received it:
--   * In the current epoch a leave is a repeat if a listing has just inferred the same one.
--   * An event from an earlier epoch is being replayed from a journal, and the process that took over may have received
--     it too. Both know the time of a join, so a leave is located by the nearest join that both recorded. Without such a
--     join, the order in which the two processes received the events decides.
-- Events of one class only are compared: joins with leaves, bans with unbans. An implied event (see below) was received by
-- no process, so it is not compared with.
--
-- The first event of a person proves one before it: a join of somebody whose row shows an earlier join, a leave; a leave
-- of somebody whom the guild's last complete listing did not show, a join.
WITH given AS MATERIALIZED (
    SELECT g.*,
           g.kind IN ('ban', 'unban') AS is_ban,
           g.stamp >> $10::int AS epoch,
           -- A listing may show a leave before the gateway sends it. More than a minute apart, it is another leave.
           g.received - interval '1 minute' AS earliest_match,
           g.received + interval '1 minute' AS latest_match
    FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::timestamptz[], $5::bigint[], $6::timestamptz[])
         AS g(guild_id, user_id, kind, at, stamp, received)
),
received AS NOT MATERIALIZED (
    SELECT e.*
    FROM member_events e
    WHERE NOT (e.inferred AND EXISTS (
        SELECT FROM member_events n
        WHERE n.guild_id = e.guild_id AND n.user_id = e.user_id AND n.stamp = e.stamp AND NOT n.inferred
    ))
),
candidates AS (
    SELECT g.*,
           g.stamp < $7::bigint AS is_replayed,
           -- Is it the last event that its process received of this user, and the first that a later process received?
           -- NULL: no later process received anything at about that time.
           CASE WHEN g.kind = 'leave' AND g.stamp < $7::bigint THEN (
               SELECT bool_or(
                   first.kind = g.kind
                   AND NOT EXISTS (
                       SELECT FROM given h
                       WHERE h.guild_id = g.guild_id AND h.user_id = g.user_id AND h.is_ban = g.is_ban
                         AND h.stamp > g.stamp
                   )
               )
               FROM (
                   SELECT DISTINCT ON (e.stamp >> $10::int) e.kind, e.latest
                   FROM received e
                   WHERE e.guild_id = g.guild_id AND e.user_id = g.user_id
                     AND (e.kind IN ('ban', 'unban')) = g.is_ban
                     AND e.stamp >> $10::int > g.epoch
                   ORDER BY e.stamp >> $10::int, e.stamp, e.id
               ) first
               WHERE first.latest BETWEEN g.earliest_match AND g.latest_match
           ) END AS is_last_and_first,
           -- What the other process recorded after the join before this leave: a kind, or 'nothing'.
           -- NULL: no other process recorded that join.
           CASE WHEN g.kind = 'leave' AND g.stamp < $7::bigint THEN (
               SELECT coalesce(
                   (SELECT n.kind
                    FROM received n
                    WHERE n.guild_id = g.guild_id AND n.user_id = g.user_id
                      AND (n.kind IN ('ban', 'unban')) = g.is_ban
                      AND n.stamp >> $10::int = e.stamp >> $10::int
                      AND (n.stamp, n.id) > (e.stamp, e.id)
                    ORDER BY n.stamp, n.id
                    LIMIT 1),
                   'nothing'
               )
               FROM (
                   SELECT h.kind, h.at
                   FROM given h
                   WHERE h.guild_id = g.guild_id AND h.user_id = g.user_id AND h.is_ban = g.is_ban
                     AND h.stamp < g.stamp
                   ORDER BY h.stamp DESC
                   LIMIT 1
               ) previous
               JOIN received e
                 ON e.guild_id = g.guild_id AND e.user_id = g.user_id AND e.kind = 'join' AND e.at = previous.at
                AND e.stamp >> $10::int <> g.epoch
               WHERE previous.kind = 'join'
               LIMIT 1
           ) END AS after_shared_join,
           -- Likewise, what the other process recorded before the join after this leave.
           CASE WHEN g.kind = 'leave' AND g.stamp < $7::bigint THEN (
               SELECT coalesce(
                   (SELECT n.kind
                    FROM received n
                    WHERE n.guild_id = g.guild_id AND n.user_id = g.user_id
                      AND (n.kind IN ('ban', 'unban')) = g.is_ban
                      AND n.stamp >> $10::int = e.stamp >> $10::int
                      AND (n.stamp, n.id) < (e.stamp, e.id)
                    ORDER BY n.stamp DESC, n.id DESC
                    LIMIT 1),
                   'nothing'
               )
               FROM (
                   SELECT h.kind, h.at
                   FROM given h
                   WHERE h.guild_id = g.guild_id AND h.user_id = g.user_id AND h.is_ban = g.is_ban
                     AND h.stamp > g.stamp
                   ORDER BY h.stamp
                   LIMIT 1
               ) following
               JOIN received e
                 ON e.guild_id = g.guild_id AND e.user_id = g.user_id AND e.kind = 'join' AND e.at = following.at
                AND e.stamp >> $10::int <> g.epoch
               WHERE following.kind = 'join'
               LIMIT 1
           ) END AS before_shared_join
    FROM given g
    WHERE g.stamp BETWEEN $8::bigint AND $9::bigint
),
accepted AS MATERIALIZED (
    SELECT g.*
    FROM candidates g
    WHERE NOT CASE
        -- A join that a listing has inferred is recorded again, in its place among the events: `settle` removes the other.
        WHEN g.kind = 'join' THEN EXISTS (
            SELECT FROM member_events e
            WHERE e.guild_id = g.guild_id AND e.user_id = g.user_id AND e.kind = 'join' AND e.at = g.at
              AND (NOT e.inferred OR g.is_replayed)
        )
        WHEN g.is_replayed THEN CASE
            WHEN g.kind = 'leave' AND g.is_last_and_first THEN true
            WHEN g.kind = 'leave' AND coalesce(g.after_shared_join, g.before_shared_join) IS NOT NULL
                THEN 'leave' IN (g.after_shared_join, g.before_shared_join) IS TRUE
            WHEN g.kind = 'leave' AND g.is_last_and_first IS NOT NULL THEN false
            -- By the order of receipt: is the event before or after it, in the table or in the journal, of its kind?
            ELSE coalesce(
                (SELECT n.kind
                 FROM (
                     SELECT e.kind, e.latest AS received,
                            CASE WHEN e.stamp >> $10::int = g.epoch THEN e.stamp ELSE e.id END AS turn
                     FROM received e
                     WHERE e.guild_id = g.guild_id AND e.user_id = g.user_id
                       AND (e.kind IN ('ban', 'unban')) = g.is_ban
                       -- What the same process received is ordered by its stamps, also within one instant.
                       AND CASE
                           WHEN e.stamp >> $10::int = g.epoch THEN e.stamp < g.stamp
                           ELSE e.latest <= g.received
                       END
                     UNION ALL
                     SELECT h.kind, h.received, h.stamp
                     FROM given h
                     WHERE h.guild_id = g.guild_id AND h.user_id = g.user_id AND h.is_ban = g.is_ban
                       AND h.stamp < g.stamp
                 ) n
                 ORDER BY n.received DESC, n.turn DESC
                 LIMIT 1) = g.kind,
                false
            ) OR coalesce(
                (SELECT n.kind
                 FROM (
                     SELECT e.kind, e.latest AS received,
                            CASE WHEN e.stamp >> $10::int = g.epoch THEN e.stamp ELSE e.id END AS turn
                     FROM received e
                     WHERE e.guild_id = g.guild_id AND e.user_id = g.user_id
                       AND (e.kind IN ('ban', 'unban')) = g.is_ban
                       -- What the same process received is ordered by its stamps, also within one instant.
                       AND CASE
                           WHEN e.stamp >> $10::int = g.epoch THEN e.stamp > g.stamp
                           ELSE e.latest > g.received
                       END
                     UNION ALL
                     SELECT h.kind, h.received, h.stamp
                     FROM given h
                     WHERE h.guild_id = g.guild_id AND h.user_id = g.user_id AND h.is_ban = g.is_ban
                       AND h.stamp > g.stamp
                 ) n
                 ORDER BY n.received, n.turn
                 LIMIT 1) = g.kind,
                false
            )
        END
        WHEN g.kind = 'leave' THEN
            coalesce(
                (SELECT e.kind = 'leave' AND e.inferred AND e.latest > g.earliest_match
                 FROM member_events e
                 WHERE e.guild_id = g.guild_id AND e.user_id = g.user_id
                   AND (e.kind IN ('ban', 'unban')) = g.is_ban
                 ORDER BY e.stamp DESC, e.id DESC  -- an inferred leave and return have one stamp
                 LIMIT 1),
                false
            )
            AND NOT EXISTS (
                SELECT FROM given h
                WHERE h.guild_id = g.guild_id AND h.user_id = g.user_id AND h.is_ban = g.is_ban
                  AND h.stamp < g.stamp
            )
        ELSE false
    END
),
implied AS (
    SELECT a.guild_id,
           a.user_id,
           CASE a.kind WHEN 'join' THEN 'leave' ELSE 'join' END AS kind,
           a.at,
           a.received,
           a.stamp,
           r.earliest
    FROM accepted a
    LEFT JOIN members m ON m.guild_id = a.guild_id AND m.user_id = a.user_id
    CROSS JOIN LATERAL (
        SELECT max(r.started_at) AS earliest
        FROM sync_runs r
        WHERE r.guild_id = a.guild_id AND r.state = 'complete'
    ) r
    WHERE NOT a.is_ban
      AND CASE a.kind
          WHEN 'join' THEN m.left_at IS NULL AND m.joined_at < a.at
          ELSE r.earliest IS NOT NULL AND (m.user_id IS NULL OR m.left_at IS NOT NULL)
      END
      AND NOT EXISTS (
          SELECT FROM member_events e
          WHERE e.guild_id = a.guild_id AND e.user_id = a.user_id AND e.kind IN ('join', 'leave')
      )
      AND NOT EXISTS (
          SELECT FROM accepted h
          WHERE h.guild_id = a.guild_id AND h.user_id = a.user_id AND NOT h.is_ban AND h.stamp < a.stamp
      )
),
inserted AS (
    INSERT INTO member_events (guild_id, user_id, kind, at, inferred, earliest, latest, stamp)
    SELECT n.guild_id, n.user_id, n.kind, n.at, n.inferred, n.earliest, n.received, n.stamp
    FROM (
        SELECT guild_id, user_id, kind, at, true AS inferred, earliest, received, stamp FROM implied
        UNION ALL
        SELECT guild_id, user_id, kind, at, false, NULL, received, stamp FROM accepted
    ) n
    ORDER BY n.stamp, n.inferred DESC
)
SELECT count(*) FROM accepted


-- name: unsettled_people
-- The people whose joins and leaves do not alternate, have ids in another order, or include a join twice, among those of
-- whom this transaction has recorded any and those given: settling them may have been put off until now.
-- $1 the first millisecond of 2015, zero of an id; $2 guild ids, $3 user ids (parallel arrays).
WITH touched AS MATERIALIZED (
    SELECT guild_id, user_id
    FROM member_events
    WHERE id >= ((extract(epoch FROM now()) * 1000)::bigint - $1::bigint) << 22 AND kind IN ('join', 'leave')
    UNION
    SELECT g.guild_id, g.user_id FROM unnest($2::bigint[], $3::bigint[]) AS g(guild_id, user_id)
)
SELECT guild_id, user_id
FROM (
    SELECT e.guild_id,
           e.user_id,
           e.kind,
           e.at,
           e.id,
           lag(e.kind) OVER in_order AS previous_kind,
           lag(e.id) OVER in_order AS previous_id
    FROM touched t
    JOIN member_events e ON e.guild_id = t.guild_id AND e.user_id = t.user_id AND e.kind IN ('join', 'leave')
    WINDOW in_order AS (PARTITION BY e.guild_id, e.user_id ORDER BY e.stamp, e.id)
) h
GROUP BY guild_id, user_id
HAVING bool_or(kind = previous_kind OR id < previous_id)
    OR count(*) FILTER (WHERE kind = 'join') > count(DISTINCT at) FILTER (WHERE kind = 'join')
ORDER BY guild_id, user_id


-- name: select_history
-- The joins and leaves of one person, in order. $1 guild id, $2 user id.
SELECT id, kind, at, inferred, earliest, latest, stamp
FROM member_events
WHERE guild_id = $1 AND user_id = $2 AND kind IN ('join', 'leave')
ORDER BY stamp, id


-- name: delete_events
-- $1 guild id, $2 event ids.
DELETE FROM member_events WHERE guild_id = $1 AND id = ANY($2::bigint[])


-- name: insert_event
-- $1 guild id, $2 user id, $3 kind, $4 time, $5 inferred, $6 and $7 earliest and latest time, $8 stamp.
INSERT INTO member_events (guild_id, user_id, kind, at, inferred, earliest, latest, stamp)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)


-- name: advance_position
-- Record that a journal has been written up to a position; a position never goes back. $1 journal, $2 position.
INSERT INTO ops.positions AS p (journal, position)
VALUES ($1, $2)
ON CONFLICT (journal) DO UPDATE
SET position = excluded.position, updated_at = now()
WHERE p.position < excluded.position


-- name: select_position
-- $1 journal.
SELECT position FROM ops.positions WHERE journal = $1


-- name: delete_position
-- $1 journal.
DELETE FROM ops.positions WHERE journal = $1


-- name: prune_counted_messages
-- Delete some of the message ids below $1, at most $2 of them.
DELETE FROM ops.counted_messages
WHERE id IN (SELECT id FROM ops.counted_messages WHERE id < $1 ORDER BY id LIMIT $2)

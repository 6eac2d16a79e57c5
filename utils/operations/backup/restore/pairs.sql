-- What the comparison of live tables with scratch tables asks the catalogue.

-- name: shapes
-- Of each live table ($1, with its scratch table in $2): the columns that both have, and the types of those that differ;
-- the columns of its key; and whether rows must be changed in place, because foreign keys refer to it or because it has
-- columns that a backup does not know.
WITH pair AS (
    SELECT number, to_regclass(live)::oid AS live, to_regclass(scratch)::oid AS scratch
    FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (live, scratch, number)
)
SELECT pair.number::int, c.relkind = 'p' AS is_partitioned,
    ARRAY(
        SELECT l.attname::text
        FROM pg_attribute AS l JOIN pg_attribute AS s ON s.attrelid = pair.scratch AND s.attname = l.attname
        WHERE l.attrelid = pair.live AND l.attnum > 0 AND NOT l.attisdropped AND NOT s.attisdropped
            AND l.attgenerated = '' ORDER BY l.attnum
    ) AS columns,
    ARRAY(
        SELECT CASE WHEN l.atttypid <> s.atttypid THEN format_type(l.atttypid, l.atttypmod) END
        FROM pg_attribute AS l JOIN pg_attribute AS s ON s.attrelid = pair.scratch AND s.attname = l.attname
        WHERE l.attrelid = pair.live AND l.attnum > 0 AND NOT l.attisdropped AND NOT s.attisdropped
            AND l.attgenerated = ''
        ORDER BY l.attnum
    ) AS casts,
    coalesce((
        SELECT ARRAY(
            SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
            JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
            WHERE k.position <= i.indnkeyatts ORDER BY k.position
        )
        FROM pg_index AS i WHERE i.indrelid = pair.live AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
            AND i.indexprs IS NULL AND i.indimmediate AND NOT EXISTS (
                SELECT FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
                JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                WHERE k.position <= i.indnkeyatts AND NOT a.attnotnull)
        ORDER BY i.indisprimary DESC, i.indexrelid LIMIT 1
    ), '{}') AS key,
    EXISTS (SELECT FROM pg_constraint AS r WHERE r.contype = 'f' AND r.confrelid = pair.live) OR EXISTS (
        SELECT FROM pg_attribute AS l WHERE l.attrelid = pair.live AND l.attnum > 0 AND NOT l.attisdropped
            AND l.attgenerated = '' AND NOT EXISTS (
                SELECT FROM pg_attribute AS s WHERE s.attrelid = pair.scratch AND s.attname = l.attname
                AND NOT s.attisdropped)
    ) AS must_update
FROM pair JOIN pg_class AS c ON c.oid = pair.live WHERE pair.scratch IS NOT NULL ORDER BY pair.number;

-- name: references
-- Foreign keys among these tables.
SELECT DISTINCT r.conrelid::regclass::text AS source, r.confrelid::regclass::text AS target
FROM pg_constraint AS r
WHERE r.contype = 'f' AND r.conrelid <> r.confrelid AND r.conparentid = 0
    AND r.conrelid = ANY($1::text[]::regclass[]) AND r.confrelid = ANY($1::text[]::regclass[]);

-- Foreign keys between the tables that a restore replaces and others.

-- name: keys_onto
-- Foreign keys of tables that are not among $2 onto $1.
SELECT r.conname AS name, r.conrelid::regclass::text AS source, r.confrelid::regclass::text AS target,
    r.confdeltype::text AS on_delete,
    ARRAY(SELECT a.attname::text FROM unnest(r.conkey) WITH ORDINALITY AS k (attnum, position)
        JOIN pg_attribute AS a ON a.attrelid = r.conrelid AND a.attnum = k.attnum ORDER BY k.position) AS columns,
    ARRAY(SELECT a.attname::text FROM unnest(r.confkey) WITH ORDINALITY AS k (attnum, position)
        JOIN pg_attribute AS a ON a.attrelid = r.confrelid AND a.attnum = k.attnum ORDER BY k.position) AS referenced
FROM pg_constraint AS r
WHERE r.contype = 'f' AND r.conparentid = 0 AND r.confrelid = ANY($1::text[]::regclass[])
    AND r.conrelid <> ALL($2::text[]::regclass[])
ORDER BY 2, 1;

-- name: keys_from
-- Foreign keys of tables ($1) onto tables that are not among them.
SELECT r.conname AS name, r.conrelid::regclass::text AS source, r.confrelid::regclass::text AS target,
    ARRAY(SELECT a.attname::text FROM unnest(r.conkey) WITH ORDINALITY AS k (attnum, position)
        JOIN pg_attribute AS a ON a.attrelid = r.conrelid AND a.attnum = k.attnum ORDER BY k.position) AS columns,
    ARRAY(SELECT a.attname::text FROM unnest(r.confkey) WITH ORDINALITY AS k (attnum, position)
        JOIN pg_attribute AS a ON a.attrelid = r.confrelid AND a.attnum = k.attnum ORDER BY k.position) AS referenced
FROM pg_constraint AS r
WHERE r.contype = 'f' AND r.conparentid = 0 AND r.conrelid = ANY($1::text[]::regclass[])
    AND r.confrelid <> ALL($1::text[]::regclass[])
ORDER BY 2, 1;

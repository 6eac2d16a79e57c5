-- What the replacement of rows asks the catalogue.

-- name: triggers
-- Triggers that would fire; those of partitions come with their tables.
SELECT t.tgrelid::regclass::text AS table, quote_ident(t.tgname) AS name, t.tgenabled::text AS state
FROM pg_trigger AS t
WHERE t.tgrelid = ANY($1::text[]::regclass[]) AND NOT t.tgisinternal AND t.tgenabled <> 'D'
    AND NOT EXISTS (SELECT FROM pg_inherits AS i JOIN pg_trigger AS p ON p.tgrelid = i.inhparent
        AND p.tgname = t.tgname AND NOT p.tgisinternal WHERE i.inhrelid = t.tgrelid)
ORDER BY 1, 2;

-- name: foreign_owner
-- A table that somebody else owns.
SELECT name, pg_get_userbyid(c.relowner) AS owner, current_user::text AS role
FROM unnest($1::text[]) AS name JOIN pg_class AS c ON c.oid = to_regclass(name)
WHERE NOT pg_has_role(c.relowner, 'USAGE') ORDER BY name LIMIT 1;

-- name: raise_sequence
-- Raise a sequence to at least a state. {name} is its name in SQL.
SELECT setval($1::text::regclass, $2, $3) FROM pg_sequence AS s, {name} AS now
WHERE s.seqrelid = $1::text::regclass
    AND (CASE WHEN s.seqincrement > 0 THEN (now.last_value, now.is_called) < ($2, $3)
        ELSE (-now.last_value, now.is_called) < (-$2, $3) END);

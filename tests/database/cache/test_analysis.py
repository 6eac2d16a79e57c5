"""What a statement reads and writes, inferred from its text and a real catalog."""

from __future__ import annotations

import pytest

from utils.database import Pool
from utils.database.cache import QueryCache, Statement
from utils.database.cache.analysis import MAX_LENGTH
from utils.database.statements import WriteLog

SCHEMA = """
CREATE SEQUENCE numbers;
CREATE TABLE owner_ (id int PRIMARY KEY, age int, version int, tags jsonb, at timestamptz DEFAULT now());
CREATE TABLE shop (id int PRIMARY KEY, owner_id int REFERENCES owner_ ON DELETE CASCADE ON UPDATE CASCADE);
CREATE TABLE item (id int PRIMARY KEY, shop_id int REFERENCES shop ON DELETE SET NULL);
CREATE TABLE sale (item_id int REFERENCES item);
CREATE TABLE watched (id int PRIMARY KEY);
CREATE TABLE guarded (id int);
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
CREATE TABLE ruled (id int);
CREATE RULE copy_it AS ON INSERT TO ruled DO ALSO INSERT INTO sale VALUES (NULL);
CREATE TABLE log_ (id int, at date) PARTITION BY RANGE (at);
CREATE TABLE log_2024 PARTITION OF log_ FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE SCHEMA other;
CREATE TABLE other.shop (id int);
CREATE TABLE other."Odd Name" (id int);
CREATE VIEW shops AS SELECT s.id, o.age FROM shop s JOIN owner_ o ON o.id = s.owner_id;
CREATE VIEW shops_twice AS SELECT * FROM shops UNION ALL SELECT * FROM shops;
CREATE VIEW recent AS SELECT * FROM owner_ WHERE at > now() - interval '1 day';
CREATE VIEW plain AS SELECT * FROM item;
CREATE VIEW catalogued AS SELECT relname FROM pg_class;
CREATE VIEW described AS SELECT table_name FROM information_schema.tables;
CREATE VIEW numbered AS SELECT nextval('numbers') AS n FROM item;
CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS n FROM item;
CREATE FUNCTION bump() RETURNS int LANGUAGE sql VOLATILE AS 'INSERT INTO sale VALUES (NULL) RETURNING 1';
CREATE FUNCTION count_items() RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM item';
CREATE FUNCTION wealth(o owner_) RETURNS bigint LANGUAGE sql STABLE AS 'SELECT count(*) FROM shop';
CREATE TABLE defaulted (id int DEFAULT bump());
CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER watch BEFORE INSERT ON watched FOR EACH ROW EXECUTE FUNCTION watch();
CREATE TABLE base (id int);
CREATE TABLE heir (extra int) INHERITS (base);
"""


@pytest.fixture
async def cache(database: Pool) -> QueryCache:
    await database.execute(SCHEMA)
    made = QueryCache()
    await made.load(database)
    return made


def of(*names: str) -> frozenset[str]:
    return frozenset(name if "." in name else f"public.{name}" for name in names)


CACHEABLE = {
    "SELECT * FROM shop": of("shop"),
    "select count(*), max(age) from Public.OWNER_ where id = any($1::int[]) limit $2": of("owner_"),
    "TABLE shop": of("shop"),
    "(SELECT id FROM shop) UNION (SELECT id FROM item) ORDER BY 1": of("shop", "item"),
    "SELECT * FROM other.shop -- SELECT * FROM item": of("other.shop"),
    "SELECT /* now() /* nested */ */ version, age FROM owner_;": of("owner_"),
    'SELECT * FROM other."Odd Name"': of("other.Odd Name"),
    "SELECT * FROM shops_twice": of("shop", "owner_"),
    "SELECT * FROM totals": of("totals"),
    "SELECT * FROM log_2024": of("log_"),
    "SELECT * FROM base": of("base"),
    "SELECT * FROM heir": of("base"),
    "WITH x(a, b) AS (SELECT id, 1 FROM item), y AS (SELECT a FROM x) SELECT * FROM y": of("item"),
    "WITH shop AS (SELECT * FROM item) SELECT * FROM shop": of("shop", "item"),
    "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT * FROM r, item": of("item"),
    "SELECT (SELECT id FROM item LIMIT 1), EXISTS (SELECT FROM sale) FROM shop": of("item", "sale", "shop"),
    "SELECT * FROM generate_series(1, $1) AS g(n), LATERAL (SELECT * FROM item WHERE id = n) i": of("item"),
    "SELECT tags ->> 'now_or_never', coalesce(age, 0)::numeric(10, 2) FROM owner_ WHERE tags ? 'k'": of("owner_"),
    "SELECT row_number() OVER (PARTITION BY age ORDER BY id), count(*) FILTER (WHERE age > 1) FROM owner_": of(
        "owner_"
    ),
    "SELECT extract(epoch FROM at), date_trunc('day', at), to_char(at, 'DD') FROM owner_": of("owner_"),
    "SELECT * FROM shop JOIN item USING (id) WHERE (shop.id, item.id) IN (SELECT 1, 2 FROM sale)": of(
        "shop", "item", "sale"
    ),
    "SELECT age, count(*) FROM owner_ GROUP BY GROUPING SETS ((age), ()), ROLLUP (age, id)": of("owner_"),
    "SELECT sum(age) OVER w, ARRAY(SELECT id FROM item) FROM owner_ WINDOW w AS (ORDER BY id)": of("owner_", "item"),
    "SELECT CAST(age AS varchar(10)), at::timestamp(0) + interval '1 day' FROM owner_": of("owner_"),
    "SELECT string_agg(id::text, ',' ORDER BY id), array_agg(DISTINCT id) FROM ONLY shop": of("shop"),
    "SELECT DISTINCT ON (lower(id::text)) greatest(id, 1), CASE WHEN (id > 1) THEN left('ab', 1) END FROM shop"
    " WHERE id BETWEEN $1 AND $2 AND NOT (id = ALL ($3)) OFFSET $4 ROWS FETCH FIRST 3 ROWS ONLY": of("shop"),
    "SELECT * FROM unnest($1::bigint[], $2::text[]) WITH ORDINALITY AS u(id, name, n) JOIN item USING (id)": of("item"),
    "SELECT * FROM jsonb_to_recordset($1::jsonb) AS r(id int, name text) LEFT JOIN shop USING (id)": of("shop"),
    "VALUES ($1, $2)": of(),
    "SELECT $1::int": of(),
    "SELECT 'SELECT now()', $$now()$$, E'it\\'s now()' FROM shop": of("shop"),
}


@pytest.mark.parametrize("sql", CACHEABLE)
async def test_cacheable_queries(cache: QueryCache, sql: str) -> None:
    assert cache.statement(sql) == Statement(CACHEABLE[sql], of(), True)


UNCACHEABLE = """
SELECT now() FROM shop
SELECT * FROM owner_ WHERE at > CURRENT_TIMESTAMP
SELECT * FROM owner_ WHERE at > current_date
SELECT 'now'::timestamptz
SELECT timestamp 'Yesterday'
SELECT current_user
SELECT user
SELECT random() FROM shop
SELECT gen_random_uuid()
SELECT clock_timestamp()
SELECT pg_catalog.now()
SELECT "now"()
SELECT age(at) FROM owner_
SELECT current_setting('TimeZone')
SELECT txid_current()
SELECT pg_backend_pid()
SELECT nextval('s')
SELECT set_config('a.b', '1', false)
SELECT pg_notify('a', 'b')
SELECT * FROM shop FOR UPDATE
SELECT * FROM shop FOR KEY SHARE SKIP LOCKED
SELECT * FROM shop TABLESAMPLE SYSTEM (50)
SELECT * FROM pg_class
SELECT * FROM pg_catalog.pg_class
SELECT * FROM information_schema.tables
SELECT 'shop'::regclass
SELECT * FROM nowhere
SELECT * FROM recent
SELECT * FROM catalogued
SELECT * FROM described
SELECT * FROM numbered
SELECT last_value FROM numbers
SELECT * FROM guarded
SELECT count_items()
SELECT public.count_items()
SELECT o.wealth FROM owner_ o
SELECT table_to_xml('shop', true, true, '')
SELECT FROM WHERE
SHOW TimeZone
EXPLAIN SELECT * FROM shop
SET work_mem = '8MB'
BEGIN
ROLLBACK TO SAVEPOINT a
LISTEN x
"""


@pytest.mark.parametrize("sql", UNCACHEABLE.strip().splitlines())
async def test_uncacheable_queries(cache: QueryCache, sql: str) -> None:
    told = cache.statement(sql)
    assert not told.is_cacheable
    assert told.writes == of()


WRITES = {
    "INSERT INTO shop (id) VALUES ($1), ($2) ON CONFLICT (id) DO NOTHING": of("shop"),
    "INSERT INTO shop AS s SELECT * FROM item ON CONFLICT (id) DO UPDATE SET id = 1 RETURNING *": of("shop"),
    "UPDATE ONLY other.shop SET id = $1": of("other.shop"),
    "UPDATE owner_ SET age = 1": of("owner_", "shop"),
    "DELETE FROM owner_ USING item WHERE true": of("owner_", "shop", "item"),
    "DELETE FROM shop": of("shop", "item"),
    "DELETE FROM item": of("item"),
    "TRUNCATE sale, item": of("sale", "item"),
    "MERGE INTO item USING shop ON item.id = shop.id WHEN MATCHED THEN UPDATE SET id = 2"
    " WHEN NOT MATCHED THEN INSERT VALUES (1, 2)": of("item"),
    "WITH gone AS (DELETE FROM item RETURNING id) SELECT * FROM gone": of("item"),
    "WITH gone AS (DELETE FROM item RETURNING id) INSERT INTO sale SELECT id FROM gone": of("item", "sale"),
    "INSERT INTO log_2024 VALUES (1, '2024-02-02')": of("log_"),
    "INSERT INTO plain VALUES (1)": of("item"),
    "UPDATE base SET id = 1": of("base"),
    "INSERT INTO heir VALUES (1, 2)": of("base"),
    "REFRESH MATERIALIZED VIEW CONCURRENTLY public.totals WITH DATA": of("totals"),
    "INSERT INTO owner_ (id, at) VALUES (1, now()), ((SELECT max(id) FROM shop), clock_timestamp())": of("owner_"),
}


@pytest.mark.parametrize("sql", WRITES)
async def test_writes_include_cascades(cache: QueryCache, sql: str) -> None:
    told = cache.statement(sql)
    assert told.writes == WRITES[sql]
    assert not told.is_cacheable


UNTOLD = """
TRUNCATE TABLE shop CASCADE
SELECT bump()
SELECT * FROM public.bump() AS b(n)
EXPLAIN ANALYZE DELETE FROM shop
EXPLAIN (ANALYZE) SELECT bump()
INSERT INTO watched VALUES (1)
INSERT INTO ruled VALUES (1)
INSERT INTO defaulted DEFAULT VALUES
INSERT INTO nowhere VALUES (1)
INSERT INTO pg_catalog.pg_class DEFAULT VALUES
SELECT * INTO copied FROM shop
SELECT 1; DELETE FROM shop
CREATE TABLE t (a int)
ALTER TABLE shop ADD COLUMN x int
DROP VIEW shops
DO $$ BEGIN DELETE FROM shop; END $$
CALL something()
EXECUTE prepared(1)
COPY shop FROM STDIN
INSERT INTO shop VALUES (((
WITH x AS (DELETE FROM shop RETURNING )))
"""


@pytest.mark.parametrize("sql", UNTOLD.strip().splitlines())
async def test_unknown_writes(cache: QueryCache, sql: str) -> None:
    told = cache.statement(sql)
    assert told.writes is None
    assert not told.is_cacheable


async def test_everything_is_unknown_before_load(database: Pool) -> None:
    cache = QueryCache()
    assert cache.statement("SELECT 1") == Statement(None, None, False)
    await cache.load(database)
    assert cache.statement("SELECT 1").is_cacheable


async def test_copy_writes_like_an_insert(cache: QueryCache) -> None:
    def copied(table: str) -> frozenset[str] | None:
        return cache.tables_of(WriteLog(tables={(table, "INSERT")}))

    assert copied("shop") == of("shop")
    assert copied("other.shop") == of("other.shop")
    assert copied("public.log_2024") == of("log_")
    assert copied("watched") is None
    assert copied("nowhere") is None


async def test_long_value_lists_are_shortened(cache: QueryCache) -> None:
    row = "($1::INTEGER, NULL, 12)"
    long = " ".join(["INSERT INTO shop VALUES", ", ".join([row] * 5_000), "ON CONFLICT DO NOTHING"])
    assert len(long) > MAX_LENGTH
    assert cache.statement(long).writes == of("shop")
    assert cache.statement(f"SELECT {'1 + ' * MAX_LENGTH}1").writes is None


async def test_text_near_the_limit_is_analysed(cache: QueryCache) -> None:
    long = " + ".join(["SELECT id FROM shop WHERE id = $1", *["$1"] * 1_500])
    assert len(long) < MAX_LENGTH
    assert cache.statement(long) == Statement(of("shop"), of(), True)
